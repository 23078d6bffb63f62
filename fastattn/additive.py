"""Additive attention (Bahdanau, Cho, Bengio, 2015) in tiles: O(L) memory, forward and backward.

    score[i, j] = sum_d weight[d] * tanh(query[i, d] + key[j, d])
    out[i]      = sum_j softmax_j(score[i, j]) * value[j]

The naive form stores a tanh for every (batch, query, key, feature); here a tile of them lives at a
time, the softmax is accumulated online, and the backward pass computes the tiles again from the
saved logarithm of the sum of exponentials (lse), as in flash attention:

    dS = P * (dO V^T - rowsum(dO * O)),   dT[i, j, d] = dS[i, j] * weight[d] * (1 - tanh^2)
    dquery = sum_j dT,   dkey = sum_i dT,   dweight = sum_ij dS * tanh,   dvalue = P^T dO
"""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fastattn.backends import additive_cpu, additive_tiles, additive_triton
from fastattn.checks import check_dense
from fastattn.integrations.symbolic import LeafModule, is_symbolic, record_function_call
from fastattn.problem import INTEGER_DTYPES


def additive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    key_lengths: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax of additive scores, times the values: ``[B, Lq, Dv]`` in the query's dtype.

    Args:
        query, key: projected, ``[B, Lq, D]`` and ``[B, Lk, D]``.
        value: ``[B, Lk, Dv]``.
        weight: the score's vector v, ``[D]``.
        key_lengths: int ``[B]``, keys at or past it are padding.
        key_mask: bool ``[B, Lk]``, True = attend; combined with ``key_lengths`` by AND.

    Computed in float32 (float64 for float64).  A query with no key to attend to gives 0, and
    gradients 0; what is masked out may be NaN or infinite.  Raises ``ValueError`` or ``TypeError``.
    """
    arguments = (query, key, value, weight, key_lengths, key_mask)
    if is_symbolic(arguments):
        return record_function_call(additive_attention, arguments)
    return _call(*arguments)[0]


def additive_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor,
    key_lengths: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The softmax weights ``[B, Lq, Lk]`` of :func:`additive_attention`, for inspection (no gradient)."""
    arguments = (query, key, weight, key_lengths, key_mask)
    if is_symbolic(arguments):
        return record_function_call(additive_weights, arguments)
    with torch.no_grad():
        mask = _checked_mask(query, key, key, weight, key_lengths, key_mask)
        query, key, weight = (_working(x) for x in (query, key, weight))
        return additive_tiles.weights(query, _without_masked(key, mask), weight, mask)


class AdditiveAttention(LeafModule):
    """Bahdanau's attention as a module: projects queries and keys, then :func:`additive_attention`.

    Args:
        query_dim, key_dim: the inputs' features.
        hidden_dim: features D of the score (default: ``query_dim``).
    """

    def __init__(self, query_dim: int, key_dim: int | None = None, hidden_dim: int | None = None):
        super().__init__()
        key_dim, hidden_dim = key_dim or query_dim, hidden_dim or query_dim
        self.query_proj = nn.Linear(query_dim, hidden_dim, bias=False)
        self.key_proj = nn.Linear(key_dim, hidden_dim)
        self.weight = nn.Parameter(torch.empty(hidden_dim))
        nn.init.uniform_(self.weight, -(hidden_dim**-0.5), hidden_dim**-0.5)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None = None,
        *,
        key_lengths: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``([B, Lq, Dv], weights [B, Lq, Lk] or None)`` from ``[B, Lq, query_dim]`` and ``[B, Lk, key_dim]``.

        ``value`` ``[B, Lk, Dv]`` defaults to the key.  ``key_padding_mask`` bool ``[B, Lk]``, True = padding.
        """
        value = key if value is None else value
        key_mask = None if key_padding_mask is None else ~key_padding_mask
        query, key = self.query_proj(query), self.key_proj(key)
        out = additive_attention(query, key, value, self.weight, key_lengths, key_mask)
        weights = additive_weights(query, key, self.weight, key_lengths, key_mask) if need_weights else None
        return out, weights


@torch.compiler.disable
def _call(query, key, value, weight, key_lengths, key_mask):
    mask = _checked_mask(query, key, value, weight, key_lengths, key_mask)
    return _Additive.apply(query, key, value, weight, mask)


def _checked_mask(query, key, value, weight, key_lengths, key_mask):
    """Validate the call; the mask of the keys, bool ``[B, Lk]``, or None."""
    inputs = {"query": query, "key": key, "value": value, "weight": weight}
    masks = {"key_lengths": key_lengths, "key_mask": key_mask}
    for name, tensor in (inputs | {name: mask for name, mask in masks.items() if mask is not None}).items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    for name, tensor in inputs.items():
        dims = 1 if name == "weight" else 3
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    batch, length = key.shape[:2]
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.shape[0] != batch or value.shape[:2] != key.shape[:2] or query.shape[2] != key.shape[2]:
        raise ValueError(f"query [B, Lq, D], key [B, Lk, D] and value [B, Lk, Dv] do not fit: {shapes}")
    if weight.shape[0] != query.shape[2]:
        raise ValueError(f"weight must have the {query.shape[2]} features of query, got {weight.shape[0]}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, length)):
        given = f"{key_mask.dtype} {tuple(key_mask.shape)}"
        raise ValueError(f"key_mask must be bool {(batch, length)}, got {given}")
    if key_lengths is not None:
        if key_lengths.shape != (batch,) or key_lengths.dtype not in INTEGER_DTYPES:
            given = f"{key_lengths.dtype} {tuple(key_lengths.shape)}"
            raise ValueError(f"key_lengths must be int [{batch}], got {given}")
        valid = torch.arange(length, device=key.device) < key_lengths[:, None]
        key_mask = valid if key_mask is None else valid & key_mask
    return key_mask


def _working(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _without_masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Keys or values with those masked set to 0: zero times a masked NaN would be NaN."""
    return x if mask is None else x.masked_fill(~mask[:, :, None], 0.0)


def _make_call(query, key, value, weight, mask):
    for engine in (additive_cpu, additive_triton):
        if not engine.reasons(query, key, value):
            return engine.Call(query, key, value, weight, mask)
    return additive_tiles.Call(query, key, value, weight, mask)


class _Additive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, weight, mask):
        q, k, v, w = (_working(x) for x in (query, key, value, weight))
        ctx.call = _make_call(q, _without_masked(k, mask), _without_masked(v, mask), w, mask)
        ctx.dtypes = [x.dtype for x in (query, key, value, weight)]
        out, lse = ctx.call.forward()
        ctx.save_for_backward(out, lse)
        ctx.mark_non_differentiable(lse)
        return out.to(query.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        out, lse = ctx.saved_tensors
        grad_out = _working(grad_out)
        grads = ctx.call.backward(lse, (grad_out * out).sum(-1), grad_out)
        return *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)), None
