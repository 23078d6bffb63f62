"""The public function: :func:`scaled_dot_product_attention`, and :func:`explain` for its calls."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from fastattn import dispatch, ops, plain
from fastattn.checks import check_flag
from fastattn.fork import serial_after_fork
from fastattn.problem import (
    Arguments,
    check_arguments,
    check_problem,
    draw_rng_state,
    problem_from_arguments,
)
from fastattn.subclasses import has_rules, is_causal_bias


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | list[int] | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T + mask) V, fused: the score matrix is never stored.

    A call of :func:`torch.nn.functional.scaled_dot_product_attention` works unchanged. The method
    is that of FlashAttention (Dao et al., arXiv:2205.14135).

    Args:
        query: [..., Hq, Lq, D]; float32, bfloat16, float16 or float64. Three dimensions are
            [batch, Lq, D].
        key: [..., Hkv, Lk, D]. Batch sizes of 1 broadcast.
        value: [..., Hkv, Lk, Dv].
        attn_mask: broadcastable to [..., Hq, Lq, Lk]. bool: True = attend, as in torch's function, and the
            opposite of what it means to :class:`MultiHeadAttention`, as to ``nn.MultiheadAttention``. float: added
            to the scores, differentiable; -inf forbids. ``torch.nn.attention.bias.causal_upper_left`` and
            ``causal_lower_right`` mean their triangle. Other subclasses with rules of their own are asked
            (``__torch_function__``), and refused where they would have their memory read.
        dropout_p: probability in [0, 1] to drop a weight. Which are dropped depends on PyTorch's
            generator of the device and on the position in the score matrix alone.
        is_causal: the same as ``causal="upper_left"``. With ``attn_mask``, both apply.
        scale: of the scores; None is 1 / sqrt(D). Under torch.compile a float that varies compiles anew for
            each value, as in torch; a tensor without dimensions, or a function of the sizes, does not.
        enable_gqa: let Hq be a multiple of Hkv, which key and value may have each of its own (the fewer
            heads are then copied).
        causal: "upper_left": query i attends to keys up to i. "lower_right": up to i + n - Lq, n
            being the sequence's number of keys, so that the last query sees the last key.
        window: (left, right): only keys from ``left`` before the query's position to ``right``
            after it. None is open.
        key_lengths: int [batch]; the keys of a sequence at and past its length are padding, and
            cost nothing. On a GPU they are clamped to the valid range rather than checked.
        backend: "auto", "cpu", "triton", "torch" or "reference". An explicit backend never falls back. "torch" is
            torch's own attention for CPU tensors, in calls that it computes exactly, as "auto" takes it where the
            C++ engine is missing.
        return_lse: also return log(sum(exp(scores))), float32 (float64 for float64) [..., Hq, Lq].

    Returns:
        [..., Hq, Lq, Dv] in query's dtype (the autocast dtype under autocast), or with
        ``return_lse`` a pair. A query that may attend to nothing yields 0, its lse is -inf, and no
        gradient passes.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what would be right.
    """
    if causal is None and window is None and return_lse is False and backend in ("auto", "triton"):
        out = plain.attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths, backend
        )
        if out is not None:
            return out
    if has_rules(query, key, value, attn_mask, key_lengths):
        return handle_torch_function(
            scaled_dot_product_attention,
            [x for x in (query, key, value, attn_mask, key_lengths) if not is_causal_bias(x)],
            *(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa),
            causal=causal,
            window=window,
            key_lengths=key_lengths,
            backend=backend,
            return_lse=return_lse,
        )
    if backend != "auto":
        dispatch.check_backend_name(backend)
    check_flag("return_lse", return_lse)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    arguments = check_arguments(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal, window, key_lengths
    )
    rng_state = draw_rng_state_for(arguments)
    if return_lse:
        out, lse = ops.attention_forward(*arguments, rng_state, backend)
    else:
        out = ops.attention_output(*arguments, rng_state, backend)
    if value.shape[-1] == 0:
        out = out[..., :0]  # the engines were given a column
    out = _in_given_rank(out, query, key, value)
    return (out, _in_given_rank(lse, query, key, value)) if return_lse else out


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | list[int] | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> dispatch.Explanation:
    """Which backend :func:`scaled_dot_product_attention` would use for these arguments, and why.

    The arguments are those of the call, with the same meaning: True in a bool ``attn_mask`` = attend.

    Returns an object with ``backend`` (None if an explicit one cannot compute the call) and
    ``reasons``, for each other backend a list of why it does not run. Computes nothing.

    Raises TypeError or ValueError for arguments that do not fit, as the call does.
    """
    dispatch.check_backend_name(backend)
    check_flag("return_lse", return_lse)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    arguments = check_arguments(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal, window, key_lengths
    )
    rng_state = torch.zeros(2, dtype=torch.int64, device=query.device) if arguments.dropout_p > 0.0 else None
    problem = problem_from_arguments(*arguments, rng_state)
    check_problem(problem)
    return dispatch.explain_problem(problem, backend)


def draw_rng_state_for(arguments: Arguments) -> Tensor | None:
    """A new dropout state, or None if the call does not drop."""
    if arguments.dropout_p == 0.0:
        return None
    if type(arguments.query).__name__ == "DTensor":
        raise ValueError(
            f"dropout_p must be 0.0 where query is a DTensor, got {arguments.dropout_p}: each rank would drop by the "
            "positions in its own part"
        )
    return draw_rng_state(arguments.query.device)


@serial_after_fork
def _autocast(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The floating tensors in the autocast dtype, where autocast is on; float64 stays, as in torch."""
    if not torch._C._is_any_autocast_enabled():
        return query, key, value, attn_mask
    device = query.device.type if isinstance(query, Tensor) else "meta"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if not isinstance(tensor, Tensor) or is_causal_bias(tensor):
            return tensor
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(query), cast(key), cast(value), cast(attn_mask)


def _in_given_rank(result: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, H, ...] in the rank that was given, with its batch dimensions."""
    rank = max(query.dim(), key.dim(), value.dim())
    if rank == 4:
        return result
    if rank == 2:
        return result[0, 0]
    if rank == 3:
        return result.squeeze(1)
    padded = ((1,) * (rank - tensor.dim()) + tuple(tensor.shape) for tensor in (query, key, value))
    return result.unflatten(0, torch.broadcast_shapes(*(shape[:-3] for shape in padded)))
