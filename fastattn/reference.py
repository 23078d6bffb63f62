"""The specification: dense attention in plain, differentiable PyTorch.

Every ingredient of a :class:`~fastattn.problem.Problem` is one branch here, written for reading.
The functions compute in the dtype of their inputs, so the same code is the truth (tests run it in
float64) and the "naive attention" that benchmarks and error budgets compare with.

Notation: scores ``S = scale * Q K^T + bias``, weights ``P = softmax(S)`` over the allowed keys,
``out = P V`` and ``lse = log(sum(exp(S)))``.  A row that may attend to nothing has weights 0,
out 0 and lse -inf, and passes no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from fastattn.problem import Problem

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF


def _in_own_dtype(function: Callable) -> Callable:
    """The problem's dtype is the caller's choice, so autocast does not change it."""

    @wraps(function)
    def run(problem: Problem, *arguments, **keywords):
        device = problem.query.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(problem, *arguments, **keywords)
        with torch.autocast(device, enabled=False):
            return function(problem, *arguments, **keywords)

    return run


@_in_own_dtype
def attention(problem: Problem) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] in the value's dtype and lse [B, Hq, Lq] in ``problem.lse_dtype``."""
    probabilities, lse = _softmax(problem)
    value = _per_query_head(_without_unattended(problem.value, problem), problem)
    return _apply_dropout(probabilities, problem).to(value.dtype) @ value, lse


@_in_own_dtype
def weights(problem: Problem, average: bool = False) -> Tensor:
    """The softmax weights after dropout, [B, Hq, Lq, Lk], or their mean over heads [B, Lq, Lk]."""
    result = _apply_dropout(_softmax(problem)[0], problem)
    return result.mean(dim=1) if average else result


@_in_own_dtype
def gradients(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and bias (full [B, Hq, Lq, Lk], or None) by the formulas.

    With ``P`` the softmax weights and ``M`` the dropout mask (1 kept, 0 dropped; 1 without)::

        dV = (P * M / (1 - p))^T dO               dP = dO V^T
        dS = P * (M * dP / (1 - p) - delta)       delta = rowsum(dO * O) - dlse
        dQ = scale * dS K                         dK = scale * dS^T Q            dbias = dS

    Written out, rather than left to autograd, because this is what the fused kernels compute; it
    is itself differentiable, which gives the second derivative.
    """
    probabilities, _ = _softmax(problem)
    key = _per_query_head(_without_unattended(problem.key, problem), problem)
    value = _per_query_head(_without_unattended(problem.value, problem), problem)
    dropped = _apply_dropout(probabilities, problem).to(value.dtype)
    out = dropped @ value
    delta = (grad_out * out).sum(dim=-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_weights = _apply_dropout(grad_out @ value.transpose(-2, -1), problem)
    grad_scores = probabilities * (grad_weights - delta.unsqueeze(-1))
    grad_scores_low = grad_scores.to(key.dtype)  # a float32 bias lifts low-precision scores to float32
    grad_query = problem.scale * (grad_scores_low @ key)
    grad_key = problem.scale * (grad_scores_low.transpose(-2, -1) @ problem.query)
    grad_value = dropped.transpose(-2, -1) @ grad_out
    return (
        grad_query,
        _without_unattended(_sum_over_group(grad_key, problem), problem),
        _without_unattended(_sum_over_group(grad_value, problem), problem),
        grad_scores if problem.bias is not None else None,
    )


def allowed(problem: Problem) -> Tensor:
    """bool, broadcastable to [B, Hq, Lq, Lk]: may query i attend to key j?"""
    queries, keys = problem.query.shape[-2], problem.key.shape[-2]
    device = problem.query.device
    j = torch.arange(keys, device=device)  # [Lk]
    length = torch.full((1,), keys, device=device) if problem.key_lengths is None else problem.key_lengths
    length = length[:, None, None, None]  # [B or 1, 1, 1, 1]
    position = torch.arange(queries, device=device)[:, None]  # [Lq, 1]
    if problem.causal == "lower_right":
        position = position + length - queries
    result = j < length
    if problem.causal is not None:
        result = result & (j <= position)
    if problem.window_left is not None:
        result = result & (j >= position - problem.window_left)
    if problem.window_right is not None:
        result = result & (j <= position + problem.window_right)
    if problem.attn_mask is not None:
        result = result & problem.attn_mask
    if problem.bias is not None:
        result = result & (problem.bias != -torch.inf)
    return result.expand(result.shape[0], result.shape[1], queries, keys)


def dropout_keep(problem: Problem) -> Tensor:
    """bool [B, Hq, Lq, Lk]: the weights that dropout keeps.

    Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011)
    with key (seed low, seed high) and counter (j // 4, i, b * Hq + h, offset low); the weight of
    key j takes output word j % 4 and is dropped if it is below floor(p * 2^32).
    """
    batch, heads, queries, _ = problem.query.shape
    keys = problem.key.shape[-2]
    device = problem.query.device
    seed, offset = problem.rng_state[0], problem.rng_state[1]
    counter = (
        torch.arange((keys + 3) // 4, device=device).view(1, 1, 1, -1),
        torch.arange(queries, device=device).view(1, 1, -1, 1),
        torch.arange(batch * heads, device=device).view(batch, heads, 1, 1),
        offset & WORD,
    )
    words = philox(counter, (seed & WORD, (seed >> 32) & WORD))
    words = [word.expand(batch, heads, queries, (keys + 3) // 4) for word in words]
    words = torch.stack(words, dim=-1).flatten(-2)[..., :keys]
    return words >= int(problem.dropout_p * 2**32)


def philox(counter: tuple, key: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The 64-bit product wraps to a signed number with the right bits.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & WORD, (product1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD, high0 ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + PHILOX_KEY_INCREMENTS[0]) & WORD, (k1 + PHILOX_KEY_INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem with every floating tensor converted to ``dtype``."""
    return problem._replace(
        query=problem.query.to(dtype),
        key=problem.key.to(dtype),
        value=problem.value.to(dtype),
        bias=None if problem.bias is None else problem.bias.to(dtype),
    )


def _is_restricted(problem: Problem) -> bool:
    """Does any ingredient forbid a key to a query?"""
    return any(
        ingredient is not None
        for ingredient in (
            problem.causal,
            problem.window_left,
            problem.window_right,
            problem.key_lengths,
            problem.attn_mask,
            problem.bias,
        )
    )


def _softmax(problem: Problem) -> tuple[Tensor, Tensor]:
    """(softmax weights [B, Hq, Lq, Lk], lse [B, Hq, Lq]) before dropout."""
    key = _per_query_head(_without_unattended(problem.key, problem), problem)
    scores = (problem.query @ key.transpose(-2, -1)) * problem.scale
    if problem.bias is not None:
        # A finite bias must not become -inf by rounding in the sum: only a mask forbids.
        scores = scores + problem.bias
        scores = scores.masked_fill(scores == -torch.inf, torch.finfo(scores.dtype).min)
    if not _is_restricted(problem):
        return scores.softmax(dim=-1), _logsumexp(scores.to(problem.lse_dtype))
    permitted = allowed(problem)
    row_attends = permitted.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~permitted, -torch.inf).masked_fill(~row_attends, 0.0)
    lse = _logsumexp(scores.to(problem.lse_dtype)).masked_fill(~row_attends.squeeze(-1), -torch.inf)
    return scores.softmax(dim=-1).masked_fill(~permitted, 0.0), lse


def _logsumexp(scores: Tensor) -> Tensor:
    """torch's, whose gradient is exp(scores - lse): not the weights where the lse has no place for their sum."""
    if scores.shape[-1] == 0:
        return scores.logsumexp(dim=-1)
    largest = scores.detach().amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 0.0)
    return (scores - largest).exp().sum(dim=-1).log() + largest.squeeze(-1)


def _apply_dropout(weights: Tensor, problem: Problem) -> Tensor:
    """Zero the dropped elements and scale the kept ones by 1 / (1 - p)."""
    if problem.dropout_p == 0.0:
        return weights
    kept = weights.masked_fill(~dropout_keep(problem), 0.0)
    return kept if problem.dropout_p == 1.0 else kept / (1.0 - problem.dropout_p)


def _without_unattended(rows: Tensor, problem: Problem) -> Tensor:
    """Keys, values or their gradients [B, Hkv, Lk, *] with those zeroed that no query attends to.

    A weight of 0 does not protect from NaN or inf in padding, or in a query's gradient, since 0 * NaN is NaN.
    """
    if not _is_restricted(problem):
        return rows
    attended = allowed(problem).any(dim=-2)  # [B or 1, Hq or 1, Lk]
    if attended.shape[1] != 1:
        attended = attended.unflatten(1, (problem.key.shape[1], problem.group_size)).any(dim=2)
    return rows.masked_fill(~attended.unsqueeze(-1), 0.0)


def _per_query_head(rows: Tensor, problem: Problem) -> Tensor:
    """[B, Hkv, Lk, *] -> [B, Hq, Lk, *]: query head h reads key head h // group_size."""
    return rows if problem.group_size == 1 else rows.repeat_interleave(problem.group_size, dim=1)


def _sum_over_group(grad: Tensor, problem: Problem) -> Tensor:
    """[B, Hq, Lk, *] -> [B, Hkv, Lk, *], the transpose of :func:`_per_query_head`."""
    if problem.group_size == 1:
        return grad
    return grad.unflatten(1, (problem.key.shape[1], problem.group_size)).sum(dim=2)
