"""Of rows with a large lse: the largest score and the sum of weights beside it, apart from each other.

P = exp(S - lse) inherits the rounding of lse, about |lse| 2^-24. Where |lse| is large that is more than naive
attention's error, whose weights add up to one by construction; beside a finite bias that stands for -inf nothing is
left of the sum of weights. Such rows take the largest score for their lse, and P is multiplied by 1 / sum.
"""

import triton
import triton.language as tl

from .forward import softmax_step
from .masks import band_of, key_tiles, masked_scores
from .statistics import in_log2_units
from .tiles import load_tile, rows_product


@triton.jit
def split_large_lse(
    query,
    key,
    lse,
    log2_lse,
    rescale,
    key_lengths,
    mask,
    bias,
    sizes,
    left,
    right,
    scale,
    LIMIT: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """One program: what BLOCK_M rows of one head are recomputed from, fp32 [B, Hq, Lq] each.

    P = exp2(S - log2_lse) * rescale. Where |lse| is up to LIMIT, that is the lse and 1; else the scores of the row are
    computed once more, for their maximum and the sum beside it.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    Lq = sizes.Lq
    blocks = tl.cdiv(Lq, BLOCK_M)
    row0 = tl.program_id(0) % blocks * BLOCK_M
    head = tl.program_id(0) // blocks
    rows = row0 + tl.arange(0, BLOCK_M)
    at = head.to(tl.int64) * Lq + rows
    natural = tl.load(lse + at, mask=rows < Lq, other=0.0)
    shift = in_log2_units(natural)
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    large = (tl.abs(natural) > LIMIT) & (tl.abs(natural) < float("inf"))
    if tl.max(large.to(tl.int32), 0) != 0:
        b = head // sizes.heads
        h = head % sizes.heads
        band = band_of(key_lengths, b, left, right, sizes, OPTIONS)
        tiles = key_tiles(row0, tl.minimum(row0 + BLOCK_M, Lq) - 1, band, OPTIONS)
        q = load_tile(query, None, b, h, row0, Lq, OPTIONS.D, BLOCK_M, OPTIONS.block_d, True)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for column0 in tl.range(tiles.begin, tiles.end, BLOCK_N):
            columns = column0 + tl.arange(0, BLOCK_N)
            k = load_tile(key, None, b, h // sizes.group, column0, band.n, OPTIONS.D, BLOCK_N, OPTIONS.block_d, True)
            s = rows_product(q, k, OPTIONS.block_d, OPTIONS) * scale
            s = masked_scores(s, b, h, rows[:, None], columns[None, :], band, mask, bias, Lq, True, OPTIONS)
            p, alpha, m = softmax_step(s, m, scale, True, False)
            total = total * alpha + tl.sum(p, 1)
        shift = tl.where(large, m, shift)
        factor = tl.where(large, 1.0 / total, factor)
    tl.store(log2_lse + at, shift, mask=rows < Lq)
    tl.store(rescale + at, factor, mask=rows < Lq)
