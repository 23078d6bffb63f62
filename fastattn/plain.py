"""The plain call: tensors that an engine takes as they are, and nothing that asks for more.

It gives what :func:`fastattn.ops.attention_output` gives. Less is looked at on the way, where a call on a
tiny input spends most of its time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _is_any_autocast_enabled

from fastattn import dispatch
from fastattn.eager import PLAIN_TENSORS, is_eager, is_ordinary
from fastattn.ops import attention_gradients, empty_like, empty_lse, empty_residual, empty_result
from fastattn.problem import Problem, check_length_values, check_lengths


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_lengths: Tensor | list[int] | None,
    backend: str = "auto",
) -> Tensor | None:
    """out [B, Hq, Lq, Dv] of a plain call, differentiable; None if the call is not one.

    A plain call has no dropout and no mask that needs a gradient, is eager, outside autocast, and on tensors that
    fit one another without a change; ``backend`` is "auto" or "triton". On a GPU it has no mask at all and needs no
    gradient. All others, those with wrong arguments included, have to go the general way.

    Raises TypeError or ValueError for ``key_lengths`` that are wrong, as the general way does.
    """
    if not is_eager() or _is_any_autocast_enabled() or type(dropout_p) is not float or dropout_p != 0.0:
        return None
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return None
    plain = dispatch.select_plain(query, key, value, enable_gqa) if backend == "auto" else None
    if plain is None:
        is_alone = attn_mask is None and key_lengths is None
        return _attention_on_gpu(query, key, value, is_causal, scale, enable_gqa) if is_alone else None
    engine, head_dims = plain
    if scale is None:
        scale = 1.0 / math.sqrt(head_dims[0])
    elif type(scale) is not float or not math.isfinite(scale):
        return None
    if key_lengths is not None:
        if type(key_lengths) is not list and type(key_lengths) not in PLAIN_TENSORS:
            return None
        key_lengths = check_lengths(key_lengths, query, key.shape[2], query.shape[:1])
    problem = _problem(query, key, value, attn_mask, key_lengths, scale, "upper_left" if is_causal else None)
    if problem is None:
        return None
    if key_lengths is not None:
        check_length_values(problem)
    if is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _differentiable(plain, query, key, value, attn_mask, problem)
    out = _empty_out(query, head_dims)
    engine.forward(problem, out, None)
    return out


def _attention_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, enable_gqa: bool
) -> Tensor | None:
    """The same of a plain call without a mask, on tensors of a GPU; None where a gradient is wanted."""
    # First, as training should not pay for the rest; these may still be anything.
    if is_grad_enabled() and any(getattr(x, "requires_grad", True) is not False for x in (query, key, value)):
        return None
    plain = dispatch.select_plain(query, key, value, enable_gqa, "triton")
    if plain is None:
        return None
    engine, head_dims = plain
    if scale is None:
        scale = 1.0 / math.sqrt(head_dims[0])
    elif type(scale) is not float or not math.isfinite(scale):
        return None
    out = _empty_out(query, head_dims)
    engine.forward(Problem(query, key, value, scale, "upper_left" if is_causal else None), out, empty_lse(query))
    return out


def _empty_out(query: Tensor, head_dims: tuple[int, int]) -> Tensor:
    head_dim, value_dim = head_dims  # a tensor's shape is slow to ask for
    return empty_like(query) if value_dim == head_dim else empty_result(query, value_dim)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    causal: str | None,
) -> Problem | None:
    """The problem of a plain call; None if its mask is not plain: one that has to be looked at or converted."""
    if mask is None:
        return Problem(query, key, value, scale, causal, None, None, key_lengths)
    if not is_ordinary(mask) or not mask.is_cpu:
        return None
    dtype = mask.dtype
    if dtype is not torch.bool and (dtype is not query.dtype or (mask.requires_grad and is_grad_enabled())):
        return None
    batch, heads, queries, _ = query.shape
    try:
        mask = mask.expand(batch, heads, queries, key.shape[2])
    except RuntimeError:
        return None
    allowed, bias = (mask, None) if dtype is torch.bool else (None, mask)
    return Problem(query, key, value, scale, causal, None, None, key_lengths, allowed, bias)


class _Attention(torch.autograd.Function):
    """out of a plain call and its gradients, which need not be plain themselves."""

    @staticmethod
    def forward(
        ctx, plain: dispatch.Plain, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, problem: Problem
    ):
        engine, head_dims = plain
        out, lse = _empty_out(query, head_dims), empty_lse(query)
        residual = None if out.dtype is torch.float32 else empty_residual(out)
        engine.forward(problem, out, lse, residual)
        # The mask as it was given: hooks may copy what is saved, and would copy an expanded one in full.
        ctx.save_for_backward(query, key, value, out, lse, residual, mask, problem.key_lengths)
        ctx.options = problem.scale, problem.causal
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor | None):
        if grad_out is None:
            return (None,) * 6
        _, *needs, _, _ = ctx.needs_input_grad
        return None, *_gradients(grad_out, *ctx.saved_tensors, *ctx.options, *needs), None, None


#: The apply() of Python takes care of functorch's tensors, which no plain call has.
_differentiable = super(torch.autograd.Function, _Attention).apply


def _gradients(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    out_residual: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    causal: str | None,
    needs_query: bool,
    needs_key: bool,
    needs_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of query, key and value, None where one is not needed."""
    plain = problem = None
    # Hooks may return saved tensors in another form.
    as_engines_read = _has_unit_last_stride(grad_out) and _has_unit_last_stride(out) and lse.is_contiguous()
    as_engines_read = as_engines_read and (out_residual is None or _has_unit_last_stride(out_residual))
    as_engines_read = as_engines_read and (key_lengths is None or key_lengths.is_contiguous())
    if as_engines_read and is_ordinary(grad_out) and is_eager() and not is_grad_enabled():
        plain = dispatch.select_plain(query, key, value, True)
    if plain is not None:
        problem = _problem(query, key, value, mask, key_lengths, scale, causal)
        if problem is not None and key_lengths is not None:
            check_length_values(problem)
    if problem is None:
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
        masks = (mask, None) if mask is None or mask.dtype == torch.bool else (None, mask)
        arguments = (query, key, value, *masks, key_lengths, scale, causal, None, None, 0.0, None, "auto")
        given = (grad_out, None, out, lse, out_residual)
        return attention_gradients(*given, *arguments, needs_query, needs_key, needs_value, False)[:3]
    grad_query = empty_like(query) if needs_query else None
    grad_key = empty_like(key) if needs_key else None
    grad_value = empty_like(value) if needs_value else None
    engine, _ = plain
    engine.backward(problem, out, lse, grad_out, None, grad_query, grad_key, grad_value, None, out_residual)
    return grad_query, grad_key, grad_value


def _has_unit_last_stride(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.stride(3) == 1  # the stride of a contiguous one is slow to ask for
