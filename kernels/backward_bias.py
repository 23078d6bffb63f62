"""Backward: the bias's gradient, dS summed over the dimensions that the bias broadcasts, in a fixed order."""

import triton
import triton.language as tl

from .backward_tiles import grad_score_tile
from .masks import band_of, key_tiles
from .statistics import load_rescale, load_statistics
from .tiles import load_tile


@triton.jit
def gradient_of_bias(
    query,
    key,
    value,
    grad_out,
    log2_lse,
    rescale,
    delta,
    grad_bias,
    key_lengths,
    mask,
    bias,
    dropout,
    batch,
    sizes,
    left,
    right,
    scale,
    OPTIONS: tl.constexpr,
    SUM_B: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_M: tl.constexpr,
    SUM_N: tl.constexpr,
):
    """One program: one tile of the gradient; it walks over its batch entries, heads and tiles one after another.

    ``grad_bias`` is contiguous [b, h, m, n] with size 1 where SUM_* is set.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    Lq = sizes.Lq
    Lk = sizes.Lk
    heads = sizes.heads
    blocks_m = 1 if SUM_M else tl.cdiv(Lq, BLOCK_M)
    blocks_n = 1 if SUM_N else tl.cdiv(Lk, BLOCK_N)
    pid = tl.program_id(0)
    tile_n = pid % blocks_n
    tile_m = pid // blocks_n % blocks_m
    slab = pid // blocks_n // blocks_m
    kept_heads = 1 if SUM_H else heads
    b0 = 0 if SUM_B else slab // kept_heads
    h0 = 0 if SUM_H else slab % kept_heads
    b1 = batch if SUM_B else b0 + 1
    h1 = heads if SUM_H else h0 + 1
    m0 = 0 if SUM_M else tile_m * BLOCK_M
    m1 = Lq if SUM_M else tl.minimum(m0 + BLOCK_M, Lq)
    n0 = 0 if SUM_N else tile_n * BLOCK_N
    n1 = Lk if SUM_N else tl.minimum(n0 + BLOCK_N, Lk)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(b0, b1):
        band = band_of(key_lengths, b, left, right, sizes, OPTIONS)
        for h in tl.range(h0, h1):
            for row0 in tl.range(m0, m1, BLOCK_M):
                tiles = key_tiles(row0, tl.minimum(row0 + BLOCK_M, Lq) - 1, band, OPTIONS)
                q = load_tile(query, None, b, h, row0, Lq, OPTIONS.D, BLOCK_M, OPTIONS.block_d, True)
                do = load_tile(grad_out, None, b, h, row0, Lq, OPTIONS.DV, BLOCK_M, OPTIONS.block_dv, True)
                lse, d = load_statistics(log2_lse, delta, b * heads + h, row0, Lq, BLOCK_M, True)
                factors = load_rescale(rescale, b * heads + h, row0, Lq, BLOCK_M)
                for column0 in tl.range(tl.maximum(n0, tiles.begin), tl.minimum(n1, tiles.end), BLOCK_N):
                    ds, _ = grad_score_tile(
                        q,
                        do,
                        lse,
                        factors,
                        d,
                        key,
                        value,
                        None,
                        None,
                        row0,
                        column0,
                        b,
                        h,
                        tiles,
                        band,
                        mask,
                        bias,
                        dropout,
                        sizes,
                        scale,
                        True,
                        False,
                        OPTIONS,
                    )
                    total += ds
    rows = m0 + tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)
    size_m = 1 if SUM_M else Lq
    size_n = 1 if SUM_N else Lk
    grad_bias += tl.cast(slab, tl.int64) * size_m * size_n
    if SUM_M and SUM_N:
        tl.store(grad_bias, tl.sum(tl.sum(total, 1), 0))
    elif SUM_M:
        tl.store(grad_bias + columns, tl.sum(total, 0), mask=columns < Lk)
    elif SUM_N:
        tl.store(grad_bias + rows, tl.sum(total, 1), mask=rows < Lq)
    else:
        offset = rows[:, None].to(tl.int64) * Lk + columns[None, :]
        tl.store(grad_bias + offset, total, mask=(rows < Lq)[:, None] & (columns < Lk)[None, :])
