"""Additive attention on a GPU, by the Triton kernels of ``fastattn.kernels.additive``.

With ``TRITON_INTERPRET=1`` set before Triton is imported it takes CPU tensors, for checking.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.backends import triton

#: The values of a key lie in one tile.
LARGEST_VALUE_DIM = 512

_LOG2_E = 1.0 / math.log(2.0)


def reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why the kernels cannot take the tensors; empty if they can."""
    missing = triton.unavailable()
    if missing:
        return [missing]
    why = []
    if q.is_cuda:
        reason = triton.device_reason(q.get_device())
        why += [reason] if reason else []
    elif not (q.device.type == "cpu" and triton.interpreted()):
        why.append(f"the tensors are on {q.device}, not on a CUDA device")
    if q.dtype != torch.float32:
        why.append(f"computed in {q.dtype}, not in float32")
    if v.shape[2] > LARGEST_VALUE_DIM:
        why.append(f"the value dimension is {v.shape[2]}, over {LARGEST_VALUE_DIM}")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        why.append("a tensor is empty")
    return why


class Call:
    """One call of the kernels: q [B, Lq, D], k [B, Lk, D], v [B, Lk, Dv], w [D], mask bool [B, Lk] or None."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None):
        self.weight, self.mask = w, mask
        allowed = torch.ones(k.shape[:2], dtype=torch.int8, device=k.device) if mask is None else mask.to(torch.int8)
        self.inputs = (*(x.contiguous() for x in (q, k, v, w * _LOG2_E)), allowed.contiguous())

    def forward(self) -> tuple[Tensor, Tensor]:
        """out [B, Lq, Dv] and lse [B, Lq]."""
        from fastattn.kernels.additive import launch_forward

        return launch_forward(*self.inputs)

    def backward(self, lse: Tensor, delta: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, and of w for each sequence [B, D]; delta [B, Lq] is rowsum(grad_out * out)."""
        from fastattn.kernels.additive import launch_backward

        saved = (x.contiguous() for x in (grad_out, lse, delta))
        grad_query, grad_key, grad_value, grad_weight = launch_backward(*self.inputs, *saved)
        grad_key.mul_(self.weight)
        if self.mask is not None:  # a weight of 0 does not keep out what is not finite in grad_out
            for grad in (grad_key, grad_value):
                grad.masked_fill_(~self.mask[:, :, None], 0.0)
        return grad_query.mul_(self.weight), grad_key, grad_value, grad_weight
