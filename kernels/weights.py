"""The attention weights, recomputed from the saved lse; their mean over the heads without storing them all."""

import triton
import triton.language as tl

from .backward_tiles import probabilities
from .masks import band_of, dropout_keep, masked_scores
from .statistics import load_rescale
from .tiles import load_tile, rows_product


@triton.jit
def attention_weights(
    query,
    key,
    log2_lse,
    rescale,
    weights,
    key_lengths,
    mask,
    bias,
    dropout,
    sizes,
    left,
    right,
    scale,
    OPTIONS: tl.constexpr,
    AVERAGE: tl.constexpr,
):
    """One program: one tile of [B, Lq, Lk] (AVERAGE, the mean over the heads) or of [B, Hq, Lq, Lk]."""
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    Lq = sizes.Lq
    Lk = sizes.Lk
    heads = sizes.heads
    blocks_n = tl.cdiv(Lk, BLOCK_N)
    blocks_m = tl.cdiv(Lq, BLOCK_M)
    pid = tl.program_id(0)
    column0 = pid % blocks_n * BLOCK_N
    row0 = pid // blocks_n % blocks_m * BLOCK_M
    slab = pid // blocks_n // blocks_m
    if AVERAGE:
        b, first, last = slab, 0, heads
    else:
        b, first, last = slab // heads, slab % heads, slab % heads + 1
    band = band_of(key_lengths, b, left, right, sizes, OPTIONS)
    rows = row0 + tl.arange(0, BLOCK_M)
    columns = column0 + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for h in tl.range(first, last):
        head = tl.cast(b, tl.int64) * heads + h
        q = load_tile(query, None, b, h, row0, Lq, OPTIONS.D, BLOCK_M, OPTIONS.block_d, True)
        k = load_tile(key, None, b, h // sizes.group, column0, band.n, OPTIONS.D, BLOCK_N, OPTIONS.block_d, True)
        shift = tl.load(log2_lse + head * Lq + rows, mask=rows < Lq, other=float("inf"))
        s = rows_product(q, k, OPTIONS.block_d, OPTIONS) * scale
        s = masked_scores(s, b, h, rows[:, None], columns[None, :], band, mask, bias, Lq, True, OPTIONS)
        p = probabilities(s, shift, load_rescale(rescale, head, row0, Lq, BLOCK_M), 1, True)
        if dropout is not None:
            keep = dropout_keep(dropout, head, row0, column0, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p * dropout.keep_scale, 0.0)
        total += p
    if AVERAGE:
        total = total / heads
    offset = tl.cast(slab, tl.int64) * Lq * Lk + rows[:, None].to(tl.int64) * Lk + columns[None, :]
    tl.store(weights + offset, total, mask=(rows < Lq)[:, None] & (columns < Lk)[None, :])
