"""Additive attention on the C++ engine.

With ``a = exp(2 q)`` and ``b = exp(2 k)``, computed once for each query and key, ``tanh(q + k)`` is
``1 - 2 / (1 + a b)``: the engine needs one multiply-add and a share of a division for each (query, key,
feature).  Tensors are float32 or float64; masked keys and values are 0.  ``lse`` is in log2 units.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.backends import cpu

#: Larger projections go to the other engine: a product of four exp(2 q + 2 k) must stay finite in float32.
LARGEST = 21.0
#: Features and value dimensions are padded to a multiple of this, the lanes of the widest vectors.
LANES = 16

_LOG2_E = 1.0 / math.log(2.0)


def reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why the engine cannot take the tensors; empty if it can."""
    missing = cpu.unavailable()
    if missing:
        return [missing]
    if q.device.type != "cpu":
        return [f"the tensors are on {q.device}, not on the CPU"]
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return ["a tensor is empty"]
    return []


class Call:
    """One call of the engine: q [B, Lq, D], k [B, Lk, D], v [B, Lk, Dv], w [D], mask bool [B, Lk] or None.

    ``overflows``: the projections are beyond :data:`LARGEST`, or not finite; the call can compute nothing then.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None):
        self.features, self.value_dim = q.shape[2], v.shape[2]
        (self.query, most_of_query), (self.key, most_of_key) = map(_exponentials, (q, k))
        self.overflows = not (most_of_query <= LARGEST and most_of_key <= LARGEST)
        self.value, self.slope = _padded(v), _padded(-4.0 * w)
        weight, mask = _padded(-2.0 * _LOG2_E * w), None if mask is None else mask.contiguous()
        # As csrc/bindings.cpp reads it.
        self.problem = (self.query, self.key, self.value, weight, mask, _LOG2_E * w.double().sum().item())

    def forward(self) -> tuple[Tensor, Tensor]:
        """out [B, Lq, Dv] and lse [B, Lq]."""
        batch, rows, _ = self.query.shape
        out = self.value.new_empty(batch, rows, self.value.shape[2])
        largest, total = out.new_empty(batch, rows), out.new_empty(batch, rows)
        cpu._C.additive_forward(self.problem, out, largest, total, torch.get_num_threads())
        return out[:, :, : self.value_dim].contiguous(), largest + total.log2()

    def backward(self, lse: Tensor, delta: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, and of w for each sequence [B, D]; delta [B, Lq] is rowsum(grad_out * out)."""
        batch, keys, padded = self.key.shape
        # By the shape alone: the sums' order, and so their rounding, must not depend on the threads.
        chunks = max(1, min(-(-keys // 256), 16 // batch))
        grad_query = self.query.new_empty(chunks, *self.query.shape)
        grad_weight = self.query.new_empty(chunks, batch, padded)
        grad_key, grad_value = torch.empty_like(self.key), torch.empty_like(self.value)
        inputs = (lse.contiguous(), delta.contiguous(), _padded(grad_out))
        outputs = (grad_query, grad_key, grad_value, grad_weight)
        cpu._C.additive_backward(self.problem, *inputs, *outputs, torch.get_num_threads())
        # The engine sums dS (r^2 - r) and dS (r - 1/2), with r = (1 - tanh) / 2: 1 - tanh^2 is -4 (r^2 - r).
        return (
            grad_query.sum(0).mul_(self.slope)[:, :, : self.features].contiguous(),
            grad_key.mul_(self.slope)[:, :, : self.features].contiguous(),
            grad_value[:, :, : self.value_dim].contiguous(),
            -2.0 * grad_weight.sum(0)[:, : self.features],
        )


def _exponentials(x: Tensor) -> tuple[Tensor, float]:
    """exp(2 x), padded by ones, and the largest magnitude in x, NaN where one is not finite."""
    out = x.new_empty(*x.shape[:2], x.shape[2] + -x.shape[2] % LANES)
    return out, cpu._C.additive_exponentials(x.contiguous(), out, torch.get_num_threads())


def _padded(x: Tensor) -> Tensor:
    missing = -x.shape[-1] % LANES
    return F.pad(x, (0, missing)) if missing else x.contiguous()
