"""Additive attention in tiles of PyTorch operations: any device, any magnitude, the slower engine.

Tensors are float32 or float64; masked keys and values are 0.  ``lse`` is in log2 units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements of one [B, block_q, block_k, D] tile of tanh: 1 MiB of float32, to stay in a core's cache.
TILE_ELEMENTS = 1 << 18

_LOG2_E = 1.0 / math.log(2.0)


class Call:
    """One call: q [B, Lq, D], k [B, Lk, D], v [B, Lk, Dv], w [D], mask bool [B, Lk] or None."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None):
        self.inputs = q, k, v, w, mask

    def forward(self) -> tuple[Tensor, Tensor]:
        """out [B, Lq, Dv] and lse [B, Lq]."""
        q, k, v, w, mask = self.inputs
        batch, rows, _ = q.shape
        maximum = q.new_full((batch, rows), float("-inf"))
        total = q.new_zeros(batch, rows)
        out = q.new_zeros(batch, rows, v.shape[2])
        for i, j in _tiles(q, k):
            score = _scores(q, k, w, mask, i, j)
            new_maximum = torch.maximum(maximum[:, i], score.amax(-1))
            finite = new_maximum.clamp_min(torch.finfo(q.dtype).min)  # -inf - -inf would be NaN
            correction = (maximum[:, i] - finite).exp2()
            p = (score - finite[:, :, None]).exp2()
            total[:, i] = total[:, i] * correction + p.sum(-1)
            out[:, i] = out[:, i] * correction[:, :, None] + p @ v[:, j]
            maximum[:, i] = new_maximum
        empty = total == 0
        out = out / total.masked_fill(empty, 1.0)[:, :, None]
        return out, (maximum + total.log2()).masked_fill(empty, float("-inf"))

    def backward(self, lse: Tensor, delta: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, and of w for each sequence [B, D]; delta [B, Lq] is rowsum(grad_out * out)."""
        q, k, v, w, mask = self.inputs
        grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
        grad_w = w.new_zeros(q.shape[0], w.shape[0])
        lse = _finite(lse)
        for i, j in _tiles(q, k):
            t = torch.tanh(q[:, i, None] + k[:, None, j])  # [B, block_q, block_k, D]
            p = (_masked(t @ w * _LOG2_E, mask, j) - lse[:, i, None]).exp2()  # [B, block_q, block_k]
            grad_v[:, j] += p.transpose(1, 2) @ grad_out[:, i]
            grad_score = p * (grad_out[:, i] @ v[:, j].transpose(1, 2) - delta[:, i, None])
            grad_w += (grad_score.flatten(1)[:, None] @ t.flatten(1, 2))[:, 0]
            grad_t = (1 - t * t) * grad_score[..., None] * w
            grad_q[:, i] += grad_t.sum(2)
            grad_k[:, j] += grad_t.sum(1)
        if mask is not None:  # a weight of 0 does not keep out what is not finite in grad_out
            for grad in (grad_k, grad_v):
                grad.masked_fill_(~mask[:, :, None], 0.0)
        return grad_q, grad_k, grad_v, grad_w


def weights(q: Tensor, k: Tensor, w: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax weights [B, Lq, Lk]; 0 in a row with nothing to attend to."""
    out = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    for i, j in _tiles(q, k):
        out[:, i, j] = _masked(torch.tanh(q[:, i, None] + k[:, None, j]) @ w, mask, j)
    # Not against the lse of an engine, whose last bit may differ: a single key's weight is 1, and they add up to 1.
    out = out.softmax(-1)
    return out if mask is None else out.masked_fill_(~mask[:, None], 0.0)


def _scores(q, k, w, mask, i, j):
    """Scores of a tile in log2 units, [B, block_q, block_k]; -inf where masked."""
    return _masked(torch.tanh(q[:, i, None] + k[:, None, j]) @ w * _LOG2_E, mask, j)


def _masked(score, mask, j):
    return score if mask is None else score.masked_fill(~mask[:, None, j], float("-inf"))


def _finite(lse):
    """A row with nothing to attend to has only scores of -inf: against 0 they give weights of 0."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices (rows, columns) that cover the scores with at most TILE_ELEMENTS tanh each."""
    batch, rows, features = q.shape
    columns = k.shape[1]
    pairs = max(1, TILE_ELEMENTS // max(1, batch * features))
    block_q = max(1, min(rows, int(pairs**0.5)))
    block_k = max(1, pairs // block_q)
    for i in range(0, rows, block_q):
        for j in range(0, columns, block_k):
            yield slice(i, min(i + block_q, rows)), slice(j, min(j + block_k, columns))
