"""The plain call: query, key and value that an engine takes as they are, and nothing that asks for more.

It gives what :func:`fastattn.ops.attention_output` gives. Less is looked at on the way, where a call on a
tiny input spends most of its time.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from fastattn import dispatch
from fastattn.eager import is_eager, is_ordinary
from fastattn.ops import attention_gradients, empty_gradient, empty_lse, empty_result
from fastattn.problem import Problem


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """out [B, Hq, Lq, Dv] of a plain call, differentiable; None if the call is not one.

    A plain call has no dropout, is eager, outside autocast, and on tensors that fit one another without a change.
    All others, those with wrong arguments included, have to go the general way.
    """
    if not is_eager() or _is_any_autocast_enabled() or type(dropout_p) is not float or dropout_p != 0.0:
        return None
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return None
    engine = dispatch.select_plain(query, key, value, enable_gqa)
    if engine is None:
        return None
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[3])
    elif type(scale) is not float or not math.isfinite(scale):
        return None
    causal = "upper_left" if is_causal else None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _differentiable(engine, query, key, value, scale, causal)
    out = empty_result(query, value.shape[3])
    engine.forward(Problem(query, key, value, scale, causal), out, None)
    return out


class _Attention(torch.autograd.Function):
    """out of a plain call and its gradients, which need not be plain themselves."""

    @staticmethod
    def forward(ctx, engine: ModuleType, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: str | None):
        out, lse = empty_result(query, value.shape[3]), empty_lse(query)
        engine.forward(Problem(query, key, value, scale, causal), out, lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = scale, causal
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor | None):
        if grad_out is None:
            return (None,) * 6
        query, key, value, out, lse = ctx.saved_tensors
        _, *needs, _, _ = ctx.needs_input_grad
        grads = _gradients(grad_out, out, lse, query, key, value, *ctx.options, *needs)
        return None, *grads, None, None


#: The apply() of Python takes care of functorch's tensors, which no plain call has.
_differentiable = super(torch.autograd.Function, _Attention).apply


def _gradients(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: str | None,
    needs_query: bool,
    needs_key: bool,
    needs_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of query, key and value, None where one is not needed."""
    engine = None
    # Hooks may return saved tensors in another form.
    as_engines_read = grad_out.stride(3) == 1 == out.stride(3) and lse.is_contiguous()
    if as_engines_read and is_ordinary(grad_out) and is_eager() and not torch.is_grad_enabled():
        engine = dispatch.select_plain(query, key, value, True)
    if engine is None:
        arguments = (query, key, value, None, None, None, scale, causal, None, None, 0.0, None, "auto")
        return attention_gradients(grad_out, None, out, lse, *arguments, needs_query, needs_key, needs_value, False)[:3]
    grad_query = empty_gradient(query) if needs_query else None
    grad_key = empty_gradient(key) if needs_key else None
    grad_value = empty_gradient(value) if needs_value else None
    problem = Problem(query, key, value, scale, causal)
    engine.backward(problem, out, lse, grad_out, None, grad_query, grad_key, grad_value, None)
    return grad_query, grad_key, grad_value
