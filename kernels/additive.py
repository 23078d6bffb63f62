"""Additive attention (Bahdanau et al., 2015): score(i, j) = sum_d weight[d] tanh(query[i, d] + key[j, d]).

A program owns a block of queries (forward, and the gradient of the queries) or of keys (the other gradients)
and walks over the blocks of the other side.  The tanh of a tile are made BLOCK_F features at a time.

All tensors are contiguous float32: query [B, Lq, D], key [B, Lk, D], value [B, Lk, DV], weight [D], and
``allowed`` int8 [B, Lk].  Scores and lse are in log2 units: ``weight`` comes multiplied by log2(e).
"""

import torch
import triton
import triton.language as tl

from .arguments import on_device

BLOCK_M, BLOCK_N, BLOCK_F = 16, 16, 16


@triton.jit
def batch_and_block(blocks):
    """(batch entry, block) of this program: the grid has one dimension, whose limit is 2^31."""
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks


@triton.jit
def tanh(x):
    """1 - 2 / (e^(2x) + 1): right at both ends, where the exponential is 0 or infinite."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def load_features(base, rows, length, features, D):
    """[rows, features] of a [length, D] tensor; 0 past its ends."""
    inside = (rows < length)[:, None] & (features < D)[None, :]
    return tl.load(base + rows[:, None].to(tl.int64) * D + features[None, :], inside, 0.0)


@triton.jit
def tile_scores(query, key, weight, rows, columns, Lq, Lk, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_F: tl.constexpr):  # fmt: skip
    """Scores of a tile, [BM, BN]."""
    scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_F):
        features = start + tl.arange(0, BLOCK_F)
        q = load_features(query, rows, Lq, features, D)  # [BM, BF]
        k = load_features(key, columns, Lk, features, D)  # [BN, BF]
        w = tl.load(weight + features, features < D, 0.0)
        t = tanh(q[:, None, :] + k[None, :, :])  # [BM, BN, BF]
        scores += tl.sum(t * w[None, None, :], 2)
    return scores


@triton.jit
def tile_probability(scores, lse, seen):
    """2^(score - lse), [BM, BN]; 0 where a key is not seen or a query sees none."""
    return tl.where(seen[None, :] & (lse > float("-inf"))[:, None], tl.exp2(scores - lse[:, None]), 0.0)


@triton.jit
def additive_forward(query, key, value, weight, allowed, out, lse, Lq, Lk, D, DV, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    b, block = batch_and_block(tl.cdiv(Lq, BLOCK_M))
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query, key, value, allowed = query + b * Lq * D, key + b * Lk * D, value + b * Lk * DV, allowed + b * Lk
    dims = tl.arange(0, BLOCK_V)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, Lk, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        seen = tl.load(allowed + columns, columns < Lk, 0) != 0
        scores = tile_scores(query, key, weight, rows, columns, Lq, Lk, D, BLOCK_M, BLOCK_N, BLOCK_F)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        reference = tl.where(higher > float("-inf"), higher, 0.0)  # -inf - -inf would be NaN
        p = tl.exp2(scores - reference[:, None])
        factor = tl.exp2(largest - reference)
        total = total * factor + tl.sum(p, 1)
        v = load_features(value, columns, Lk, dims, DV)
        acc = acc * factor[:, None] + tl.dot(p, v, input_precision="ieee")
        largest = higher
    inside = rows < Lq
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    offsets = (b * Lq + rows)[:, None] * DV + dims[None, :]
    tl.store(out + offsets, acc, inside[:, None] & (dims < DV)[None, :])
    tl.store(lse + b * Lq + rows, largest + tl.log2(total), inside)


@triton.jit
def tile_gradient(query, key, value, weight, allowed, grad_out, lse, delta, rows, columns, Lq, Lk, D, DV,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
                  BLOCK_V: tl.constexpr):  # fmt: skip
    """The tile's probabilities, its grad_out, and the gradient of its scores in natural units."""
    dims = tl.arange(0, BLOCK_V)
    seen = tl.load(allowed + columns, columns < Lk, 0) != 0
    saved = tl.load(lse + rows, rows < Lq, float("-inf"))
    scores = tile_scores(query, key, weight, rows, columns, Lq, Lk, D, BLOCK_M, BLOCK_N, BLOCK_F)
    p = tile_probability(scores, saved, seen)
    go = load_features(grad_out, rows, Lq, dims, DV)
    v = load_features(value, columns, Lk, dims, DV)
    dp = tl.dot(go, tl.trans(v), input_precision="ieee")
    return p, go, p * (dp - tl.load(delta + rows, rows < Lq, 0.0)[:, None])


@triton.jit
def additive_backward_queries(query, key, value, weight, allowed, grad_out, lse, delta, grad_query, Lq, Lk, D, DV,
                              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
                              BLOCK_V: tl.constexpr):  # fmt: skip
    """grad_query, zero-filled before, is summed in memory: a program's rows are its own."""
    b, block = batch_and_block(tl.cdiv(Lq, BLOCK_M))
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query, key, value, allowed = query + b * Lq * D, key + b * Lk * D, value + b * Lk * DV, allowed + b * Lk
    grad_out, grad_query, lse, delta = grad_out + b * Lq * DV, grad_query + b * Lq * D, lse + b * Lq, delta + b * Lq
    for start in range(0, Lk, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        _, _, ds = tile_gradient(query, key, value, weight, allowed, grad_out, lse, delta, rows, columns, Lq, Lk, D,
                                 DV, BLOCK_M, BLOCK_N, BLOCK_F, BLOCK_V)  # fmt: skip
        for first in range(0, D, BLOCK_F):
            features = first + tl.arange(0, BLOCK_F)
            q = load_features(query, rows, Lq, features, D)
            k = load_features(key, columns, Lk, features, D)
            t = tanh(q[:, None, :] + k[None, :, :])  # [BM, BN, BF]
            inside = (rows < Lq)[:, None] & (features < D)[None, :]
            target = grad_query + rows[:, None].to(tl.int64) * D + features[None, :]
            tl.store(target, tl.load(target, inside, 0.0) + tl.sum(ds[:, :, None] * (1.0 - t * t), 1), inside)
        tl.debug_barrier()  # the next block's loads must see these stores, whichever thread made them


@triton.jit
def additive_backward_keys(query, key, value, weight, allowed, grad_out, lse, delta, grad_key, grad_value,
                           grad_weight, Lq, Lk, D, DV, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                           BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """grad_key [B, Lk, D] and grad_weight [B, blocks of keys, D], zero-filled before; grad_value."""
    blocks = tl.cdiv(Lk, BLOCK_N)
    b, block = batch_and_block(blocks)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    query, key, value, allowed = query + b * Lq * D, key + b * Lk * D, value + b * Lk * DV, allowed + b * Lk
    grad_out, grad_key, lse, delta = grad_out + b * Lq * DV, grad_key + b * Lk * D, lse + b * Lq, delta + b * Lq
    grad_weight += (b * blocks + block) * D
    dims = tl.arange(0, BLOCK_V)
    of_value = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, Lq, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        p, go, ds = tile_gradient(query, key, value, weight, allowed, grad_out, lse, delta, rows, columns, Lq, Lk, D,
                                  DV, BLOCK_M, BLOCK_N, BLOCK_F, BLOCK_V)  # fmt: skip
        of_value += tl.dot(tl.trans(p), go, input_precision="ieee")
        for first in range(0, D, BLOCK_F):
            features = first + tl.arange(0, BLOCK_F)
            q = load_features(query, rows, Lq, features, D)
            k = load_features(key, columns, Lk, features, D)
            t = tanh(q[:, None, :] + k[None, :, :])  # [BM, BN, BF]
            inside = (columns < Lk)[:, None] & (features < D)[None, :]
            target = grad_key + columns[:, None].to(tl.int64) * D + features[None, :]
            tl.store(target, tl.load(target, inside, 0.0) + tl.sum(ds[:, :, None] * (1.0 - t * t), 0), inside)
            of_weight = tl.sum(tl.sum(ds[:, :, None] * t, 0), 0)
            old = tl.load(grad_weight + features, features < D, 0.0)
            tl.store(grad_weight + features, old + of_weight, features < D)
        tl.debug_barrier()  # the next block's loads must see these stores, whichever thread made them
    offsets = (b * Lk + columns)[:, None] * DV + dims[None, :]
    tl.store(grad_value + offsets, of_value, (columns < Lk)[:, None] & (dims < DV)[None, :])


def blocks_for(value_dim: int) -> dict[str, int]:
    block_v = max(16, triton.next_power_of_2(value_dim))
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_F": BLOCK_F, "BLOCK_V": block_v}


def launch_forward(query, key, value, weight, allowed) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, Lq, DV] and lse [B, Lq]."""
    batch, rows, features = query.shape
    keys, value_dim = value.shape[1:]
    out, lse = query.new_empty(batch, rows, value_dim), query.new_empty(batch, rows)
    with on_device(query):
        additive_forward[(triton.cdiv(rows, BLOCK_M) * batch,)](
            query, key, value, weight, allowed, out, lse, rows, keys, features, value_dim, **blocks_for(value_dim)
        )
    return out, lse


def launch_backward(query, key, value, weight, allowed, grad_out, lse, delta) -> tuple[torch.Tensor, ...]:
    """grad_query and grad_key, both still to be multiplied by the weight, grad_value, grad_weight [B, D]."""
    batch, rows, features = query.shape
    keys, value_dim = value.shape[1:]
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    grad_weight = query.new_zeros(batch, triton.cdiv(keys, BLOCK_N), features)
    inputs = (query, key, value, weight, allowed, grad_out, lse, delta)
    sizes = (rows, keys, features, value_dim)
    blocks = blocks_for(value_dim)
    with on_device(query):
        additive_backward_queries[(triton.cdiv(rows, BLOCK_M) * batch,)](*inputs, grad_query, *sizes, **blocks)
        additive_backward_keys[(triton.cdiv(keys, BLOCK_N) * batch,)](
            *inputs, grad_key, grad_value, grad_weight, *sizes, **blocks
        )
    return grad_query, grad_key, grad_value, grad_weight.sum(1)
