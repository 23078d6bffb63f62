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

#: Elements of one [B, block_q, block_k, D] tile of tanh: 1 MiB of float32, to stay in a core's cache.
TILE_ELEMENTS = 1 << 18


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
    return _call(query, key, value, weight, key_lengths, key_mask)[0]


def additive_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor,
    key_lengths: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The softmax weights ``[B, Lq, Lk]`` of :func:`additive_attention`, for inspection (no gradient)."""
    with torch.no_grad():
        mask = _checked_mask(query, key, key, weight, key_lengths, key_mask)
        lse = _call(query, key, key[..., :1], weight, None, mask)[1]
        query, key, weight = (_working(x) for x in (query, key, weight))
        if mask is not None:
            key = key.masked_fill(~mask[:, :, None], 0.0)
        out = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
        for rows, columns in _tiles(query, key):
            score = torch.tanh(query[:, rows, None] + key[:, None, columns]) @ weight
            out[:, rows, columns] = _probability(score, lse[:, rows], mask, columns)
        return out


class AdditiveAttention(nn.Module):
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


def _call(query, key, value, weight, key_lengths, key_mask):
    mask = _checked_mask(query, key, value, weight, key_lengths, key_mask)
    return _Additive.apply(query, key, value, weight, mask)


def _checked_mask(query, key, value, weight, key_lengths, key_mask):
    """Validate the call; the mask of the keys, bool ``[B, Lk]``, or None."""
    inputs = {"query": (query, 3), "key": (key, 3), "value": (value, 3), "weight": (weight, 1)}
    for name, (tensor, dims) in inputs.items():
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
        if key_lengths.shape != (batch,) or key_lengths.is_floating_point():
            given = f"{key_lengths.dtype} {tuple(key_lengths.shape)}"
            raise ValueError(f"key_lengths must be int [{batch}], got {given}")
        valid = torch.arange(length, device=key.device) < key_lengths[:, None]
        key_mask = valid if key_mask is None else valid & key_mask
    return key_mask


def _working(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _tiles(query: torch.Tensor, key: torch.Tensor):
    """Slices (rows, columns) that cover the scores with at most TILE_ELEMENTS tanh each."""
    batch, rows, features = query.shape
    columns = key.shape[1]
    pairs = max(1, TILE_ELEMENTS // max(1, batch * features))
    block_q = max(1, min(rows, int(pairs**0.5)))
    block_k = max(1, pairs // block_q)
    for i in range(0, rows, block_q):
        for j in range(0, columns, block_k):
            yield slice(i, min(i + block_q, rows)), slice(j, min(j + block_k, columns))


def _probability(score, lse, mask, columns):
    """exp(score - lse) ``[B, rows, columns]``, 0 where masked and in rows with nothing to attend to."""
    p = (score - lse[:, :, None]).exp()
    return p if mask is None else p.masked_fill(~mask[:, None, columns], 0.0)


class _Additive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, weight, mask):
        q, k, v, w = (_working(x) for x in (query, key, value, weight))
        if mask is not None:  # zero times a masked NaN would be NaN
            k, v = (x.masked_fill(~mask[:, :, None], 0.0) for x in (k, v))
        out, lse = _forward(q, k, v, w, mask)
        ctx.save_for_backward(query, key, value, weight, mask, out, lse)
        ctx.mark_non_differentiable(lse)
        return out.to(query.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        query, key, value, weight, mask, out, lse = ctx.saved_tensors
        q, k, v, w = (_working(x) for x in (query, key, value, weight))
        if mask is not None:
            k, v = (x.masked_fill(~mask[:, :, None], 0.0) for x in (k, v))
        grads = _backward(q, k, v, w, mask, out, lse, _working(grad_out))
        return *(g.to(x.dtype) for g, x in zip(grads, (query, key, value, weight), strict=True)), None


def _forward(q, k, v, w, mask):
    batch, rows, _ = q.shape
    maximum = q.new_full((batch, rows), float("-inf"))
    total = q.new_zeros(batch, rows)
    out = q.new_zeros(batch, rows, v.shape[2])
    for i, j in _tiles(q, k):
        score = torch.tanh(q[:, i, None] + k[:, None, j]) @ w  # [B, block_q, block_k]
        if mask is not None:
            score = score.masked_fill(~mask[:, None, j], float("-inf"))
        new_maximum = torch.maximum(maximum[:, i], score.amax(-1))
        finite = new_maximum.clamp_min(torch.finfo(q.dtype).min)  # -inf - -inf would be NaN
        correction = (maximum[:, i] - finite).exp()
        p = (score - finite[:, :, None]).exp()
        total[:, i] = total[:, i] * correction + p.sum(-1)
        out[:, i] = out[:, i] * correction[:, :, None] + p @ v[:, j]
        maximum[:, i] = new_maximum
    empty = total == 0
    out = out / total.masked_fill(empty, 1.0)[:, :, None]
    return out, (maximum + total.log()).masked_fill(empty, float("-inf"))


def _backward(q, k, v, w, mask, out, lse, grad_out):
    grad_q, grad_k, grad_v, grad_w = (torch.zeros_like(x) for x in (q, k, v, w))
    delta = (grad_out * out).sum(-1)  # [B, Lq]
    lse = lse.masked_fill(lse == float("-inf"), 0.0)  # such rows are masked everywhere
    for i, j in _tiles(q, k):
        t = torch.tanh(q[:, i, None] + k[:, None, j])  # [B, block_q, block_k, D]
        p = _probability(t @ w, lse[:, i], mask, j)  # [B, block_q, block_k]
        grad_v[:, j] += p.transpose(1, 2) @ grad_out[:, i]
        grad_score = p * (grad_out[:, i] @ v[:, j].transpose(1, 2) - delta[:, i, None])
        grad_w += (grad_score.flatten()[None] @ t.flatten(0, 2))[0]
        grad_t = (1 - t * t) * grad_score[..., None] * w
        grad_q[:, i] += grad_t.sum(2)
        grad_k[:, j] += grad_t.sum(1)
    return grad_q, grad_k, grad_v, grad_w
