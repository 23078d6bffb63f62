"""torch's own fused attention for CPU tensors as a backend: what computes where the C++ engine is missing.

Its kernel (FlashAttention, Dao et al., arXiv:2205.14135; no dropout, one float mask, equal head dimensions) is given
a problem that it solves exactly: bands, key lengths and masks as one float mask, in the fewest dimensions that tell
it; head dimensions padded with zeros; 16 bits as float32, unless out is all that is wanted (which may then differ by a
rounding from out beside lse). What the kernel would get wrong is put right around it: a query that may attend to
nothing, and keys and values that no query may attend to, are zeroed.

The kernel's backward knows the weights by exp(score - lse) alone. So the dense reference computes, in O(Lq * Lk)
memory, a bias's own gradient, and all gradients where some |lse| is over :data:`LARGEST_LSE`. Below it weights are off
by a share of |lse| 2^-24 and some units of the kernel's exponentials: gradients have up to three times their error
budget where scores pass 10. Those of 16-bit calls that cancel keep the rounding of out, and up to four times.

Scores that are not finite are left to the reference, in the forward. In the backward a NaN in what some query may
attend to reaches all queries, and one in a query, or in its gradient, all keys that any query may attend to. One in a
value reaches all queries, as in dense attention.

Results are the same over runs, and over the numbers of threads that were tried (1, 2 and 4), but torch promises that
for neither its kernel nor the matrix products in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn.problem import SUPPORTED_DTYPES, Problem

LSE_IS_OPTIONAL = True
KEEPS_RESIDUAL = False
#: Beyond this a rounded lse makes the weights too coarse.
LARGEST_LSE = 64.0

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def unavailable() -> str | None:
    """Why the kernel cannot be used at all, else None."""
    if _forward is None or _backward is None:
        return f"torch {torch.__version__} has no fused attention for CPU tensors under the name that is known here"
    return None


def reasons(problem: Problem) -> list[str]:
    """Why the kernel cannot take the problem exactly; empty if it can."""
    query = problem.query
    why = []
    if not query.is_cpu:
        why.append(f"the tensors are on {query.device}, not on the CPU")
    if query.dtype not in SUPPORTED_DTYPES:
        why.append(f"dtype {query.dtype} is not one of {', '.join(str(dtype) for dtype in SUPPORTED_DTYPES)}")
    if 0.0 < problem.dropout_p < 1.0:  # what drops all is described to an engine without its values
        why.append("its kernel has no dropout")
    return why


def notes(problem: Problem) -> list[str]:
    dense = [f"every gradient where |lse| is over {LARGEST_LSE:g}"]
    if problem.bias is not None:
        dense.append("the gradient of a bias")
    _, allowed = _visible(problem._replace(attn_mask=_narrow(problem.attn_mask), bias=_narrow(problem.bias)))
    if allowed is not None and allowed.shape[2] > 1 and problem.attn_mask is None:
        dense.append("the mask that says what a query may attend to")
    return [f"dense, in O(Lq * Lk) memory: {'; '.join(dense)}"]


class _Call(NamedTuple):
    """A problem in the kernel's terms: equal heads and head dimensions, one dtype, nothing masked that could leak."""

    query: Tensor  # [B, Hq, Lq, E]
    key: Tensor  # [B, Hq, keys, E]
    value: Tensor  # [B, Hq, keys, E]
    scale: float
    is_causal: bool  # from the upper left, where that is all
    mask: Tensor | None  # float [B|1, Hq|1, Lq|1, keys|1]
    attends: Tensor | None  # bool [B|1, Hq|1, Lq|1, 1]: may the query attend to any key? None: all may
    attended: Tensor | None  # bool [B|1, Hq|1, keys|1, 1]: the rows of key and value that are no zeros. None: all rows


def _call(
    problem: Problem, dtype: torch.dtype, grad_out: Tensor | None = None, grad_lse: Tensor | None = None
) -> _Call:
    """The kernel's call for the problem in ``dtype``; with grad_lse a column of zeros is added."""
    query, key, value, scale = *problem[:3], float(problem.scale)
    bias = _narrow(problem.bias)
    mask, attends, attended = None if bias is None else bias.to(problem.lse_dtype), None, None
    is_causal, allowed = _visible(problem._replace(attn_mask=_narrow(problem.attn_mask), bias=bias))
    if allowed is not None:
        mask = _forbidding(allowed, problem.lse_dtype) if mask is None else torch.where(allowed, mask, -torch.inf)
        attends, attended = _unless_all(_any(allowed, -1)), _unless_all(_any(allowed, -2).mT)
    may_leak = (attends is not None or attended is not None) and not _is_all_finite(problem, grad_out, grad_lse)
    if not may_leak:
        attended = None
    width = max(query.shape[3], value.shape[3]) + (grad_lse is not None)
    query = _zeroed(_widened(query, width, dtype), attends if may_leak else None)
    key, value = (_zeroed(_per_query_head(_widened(rows, width, dtype), problem), attended) for rows in (key, value))
    return _Call(query, key, value, scale, is_causal, mask, attends, attended)


def _is_all_finite(problem: Problem, grad_out: Tensor | None, grad_lse: Tensor | None) -> bool:
    """Is every score and every gradient of a weight finite, by the largest elements? A weight of 0 then hides it."""
    gradients = _largest(problem.value)
    if grad_out is not None:
        gradients *= _largest(grad_out) * grad_out.shape[3]
    if grad_lse is not None:
        gradients += _largest(grad_lse)
    return _are_scores_finite(problem) and gradients < torch.finfo(problem.lse_dtype).max / 4  # False for NaN


def _are_scores_finite(given: Problem | _Call) -> bool:
    query, key = given.query, given.key
    scores = _largest(query) * _largest(key) * key.shape[3] * max(1.0, abs(given.scale))
    return scores < torch.finfo(torch.float64 if query.dtype == torch.float64 else torch.float32).max / 4


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one."""
    low, high = torch.aminmax(tensor)
    return float(torch.maximum(-low, high))


def _widened(rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    rows = rows.to(dtype)
    return rows if rows.shape[3] == width else F.pad(rows, (0, width - rows.shape[3]))


def _without_unseen_end(problem: Problem) -> Problem:
    """The problem without the last keys, those that key lengths or causality from the upper left hide from all."""
    lengths, end = problem.key_lengths, problem.key.shape[2]
    if problem.causal == "upper_left":
        end = min(end, problem.query.shape[2])
    if lengths is not None:
        given = [min(length, end) for length in lengths.tolist()]
        end = max(given, default=0)
        lengths = None if min(given, default=0) == end else lengths.clamp(max=end)
    return problem._replace(
        key=problem.key[:, :, :end],
        value=problem.value[:, :, :end],
        key_lengths=lengths,
        attn_mask=None if problem.attn_mask is None else problem.attn_mask[..., :end],
        bias=None if problem.bias is None else problem.bias[..., :end],
    )


def _visible(problem: Problem) -> tuple[bool, Tensor | None]:
    """(whether the kernel's own causality says it all, else bool [B|1, Hq|1, Lq|1, keys|1], None if all is visible)."""
    is_square = problem.query.shape[2] == problem.key.shape[2] and problem.key_lengths is None
    is_upper_left = problem.causal == "upper_left" or (problem.causal == "lower_right" and is_square)
    others = (problem.window_left, problem.window_right, problem.key_lengths, problem.attn_mask, problem.bias)
    if all(ingredient is None for ingredient in others):
        if problem.causal is None:
            return False, None
        if is_upper_left and problem.scale > 0.0:  # the kernel multiplies its -inf by the scale
            return True, None
    return False, _unless_all(_narrow(reference.allowed(problem)))


def _narrow(tensor: Tensor | None) -> Tensor | None:
    """The tensor with size 1 in the dimensions in which it repeats itself."""
    if tensor is None:
        return None
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _forbidding(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where it is allowed and -inf elsewhere: 1 - 1 / 1 and 1 - 1 / 0, a third of the time of torch.where's."""
    return 1.0 - allowed.to(dtype).reciprocal_()


def _unless_all(allowed: Tensor) -> Tensor | None:
    return None if bool(allowed.view(torch.uint8).amin()) else allowed


def _any(allowed: Tensor, dim: int) -> Tensor:
    """``allowed.any(dim, keepdim=True)``, in a twentieth of the time."""
    return allowed.view(torch.uint8).amax(dim, keepdim=True).view(torch.bool)


def _zeroed(rows: Tensor, kept: Tensor | None) -> Tensor:
    """The rows that are not kept as zeros, whatever they hold: a weight of 0 does not make nothing of NaN."""
    return rows if kept is None else rows.masked_fill(~kept, 0.0)


def _per_query_head(rows: Tensor, problem: Problem) -> Tensor:
    if problem.group_size == 1:
        return rows
    heads = problem.query.shape[1]
    if rows.shape[1] == 1:
        return rows.expand(-1, heads, -1, -1)
    return rows.repeat_interleave(problem.group_size, dim=1)


def _is_empty(problem: Problem) -> bool:
    """Is there no query, or no key to attend to? The kernel divides by such sizes."""
    return 0 in problem.query.shape or problem.key.shape[2] == 0


def forward(problem: Problem, out: Tensor, lse: Tensor | None) -> None:
    """Write attention's output [B, Hq, Lq, Dv] and, unless None, its natural-log lse [B, Hq, Lq]."""
    problem = _without_unseen_end(problem)
    if _is_empty(problem):
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    # In 16 bits the kernel's exponentials have 16 bits too: enough for out, not for lse.
    call = _call(problem, problem.query.dtype if lse is None else problem.lse_dtype)
    if _are_scores_finite(call):
        options = {"attn_mask": call.mask, "scale": call.scale}
        result, result_lse = _forward(call.query, call.key, call.value, 0.0, call.is_causal, **options)
    else:  # a query whose scores are NaN is for the kernel one that may attend to nothing
        result, result_lse = reference.attention(reference.in_dtype(problem, problem.lse_dtype))
    out.copy_(_zeroed(result[..., : out.shape[3]], call.attends))
    if lse is not None:
        lse.copy_(result_lse)
        if call.attends is not None:
            lse.masked_fill_(~call.attends.squeeze(-1), -torch.inf)


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients that are not None, given the forward's results and their gradients."""
    buffers, seen = (grad_query, grad_key, grad_value), _without_unseen_end(problem)
    if _is_empty(seen):
        results = (None, None, None)
    elif grad_bias is not None or _is_coarse(lse):
        exact = reference.in_dtype(problem, problem.lse_dtype)
        *results, result_bias = reference.gradients(exact, grad_out.to(problem.lse_dtype), grad_lse)
        if grad_bias is not None:
            grad_bias.copy_(result_bias.sum_to_size(grad_bias.shape))
    else:
        results = _gradients(seen, out, lse, grad_out, grad_lse)
    for buffer, result in zip(buffers, results, strict=True):
        if buffer is not None:
            _write(buffer, result)


def _is_coarse(lse: Tensor) -> bool:
    return bool((lse.masked_fill(lse == -torch.inf, 0.0).abs() > LARGEST_LSE).any())


def _gradients(
    problem: Problem, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of query [B, Hq, Lq, D], and of key and value without the keys past all that are seen.

    With a column more, in which value is 0, grad_out 1 and out -grad_lse, the kernel's rowsum(grad_out * out) is less
    by grad_lse, as it has to be, and all else the same.
    """
    call = _call(problem, problem.lse_dtype, grad_out, grad_lse)
    width, value_dim = call.query.shape[3], out.shape[3]
    out, grad_out = (_widened(rows, width, call.query.dtype) for rows in (out, _zeroed(grad_out, call.attends)))
    if grad_lse is not None:
        grad_out[..., -1] = 1.0
        out[..., -1] = -_zeroed(grad_lse.unsqueeze(-1), call.attends).squeeze(-1)
    if call.attends is not None:
        lse = lse.masked_fill(~call.attends.squeeze(-1), 0.0)  # exp(-inf - 0) is 0, exp(-inf + inf) NaN
    options = {"attn_mask": call.mask, "scale": call.scale}
    grad_query, grad_key, grad_value = _backward(
        grad_out, call.query, call.key, call.value, out, lse, 0.0, call.is_causal, **options
    )
    grad_key, grad_value = (
        _summed_over_group(_zeroed(rows, call.attended), problem) for rows in (grad_key, grad_value)
    )
    head_dim = problem.query.shape[3]
    return grad_query[..., :head_dim], grad_key[..., :head_dim], grad_value[..., :value_dim]


def _summed_over_group(rows: Tensor, problem: Problem) -> Tensor:
    """[B, Hq, keys, *] -> [B, Hkv, keys, *]"""
    return rows if problem.group_size == 1 else rows.unflatten(1, (-1, problem.group_size)).sum(dim=2)


def _write(buffer: Tensor, result: Tensor | None) -> None:
    """The result, of as many rows as it has, and zeros in the others."""
    rows = 0 if result is None else result.shape[2]
    buffer[:, :, rows:] = 0.0
    if rows:
        buffer[:, :, :rows] = result


def weights(problem: Problem, lse: Tensor, out: Tensor, average: bool) -> None:
    """Write the softmax weights [B, Hq, Lq, Lk], or their mean over the heads [B, Lq, Lk]."""
    out.copy_(reference.weights(reference.in_dtype(problem, problem.lse_dtype), average))
