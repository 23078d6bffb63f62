"""Backward: dQ = scale dS K, each program its block of queries, walking over the keys."""

import triton
import triton.language as tl

from .backward_tiles import grad_score_tile
from .masks import LOG2_E, band_of, bounds, key_tiles
from .statistics import load_rescale, load_statistics
from .tiles import deal, load_tile, store_tile


@triton.jit
def walk_keys(
    q,
    do,
    lse,
    rescale,
    delta,
    key,
    value,
    key_boxes,
    value_boxes,
    row0,
    b,
    h,
    tiles,
    band,
    mask,
    bias,
    dropout,
    sizes,
    scale,
    GUARDED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """dS K [BLOCK_M, BLOCK_D] over all keys that a block of queries sees."""
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_D: tl.constexpr = OPTIONS.block_d
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(3):
        if part > 0 or OPTIONS.has_left:
            first, last = bounds(tiles, part)
            for column0 in tl.range(first, last, OPTIONS.block_n):
                ds, k = grad_score_tile(
                    q,
                    do,
                    lse,
                    rescale,
                    delta,
                    key,
                    value,
                    key_boxes,
                    value_boxes,
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
                    part != 1,
                    GUARDED,
                    OPTIONS,
                )
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=OPTIONS.precision)
    return dq


@triton.jit
def gradients_of_queries(
    query,
    key,
    value,
    key_boxes,
    value_boxes,
    grad_out,
    log2_lse,
    rescale,
    delta,
    grad_query,
    key_lengths,
    mask,
    bias,
    dropout,
    nonfinite,
    sizes,
    left,
    right,
    scale,
    together,
    OPTIONS: tl.constexpr,
):
    """One program: dQ of BLOCK_M queries of one head. ``scale`` in log2 units.

    ``nonfinite`` int32 [B * Hkv], given with a mask or bias: heads whose keys hold an infinity or a NaN.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_D: tl.constexpr = OPTIONS.block_d
    Lq = sizes.Lq
    blocks = tl.cdiv(Lq, BLOCK_M)
    head, block = deal(blocks, together)
    if OPTIONS.has_right:
        block = blocks - 1 - block
    b = head // sizes.heads
    h = head % sizes.heads
    band = band_of(key_lengths, b, left, right, sizes, OPTIONS)
    row0 = block * BLOCK_M
    tiles = key_tiles(row0, tl.minimum(row0 + BLOCK_M, Lq) - 1, band, OPTIONS)
    q = load_tile(query, None, b, h, row0, Lq, OPTIONS.D, BLOCK_M, BLOCK_D, True)
    do = load_tile(grad_out, None, b, h, row0, Lq, OPTIONS.DV, BLOCK_M, OPTIONS.block_dv, True)
    lse, d = load_statistics(log2_lse, delta, head, row0, Lq, BLOCK_M, True)
    factors = None
    if rescale is not None:
        factors = load_rescale(rescale, head, row0, Lq, BLOCK_M)
    HAS_MARKS: tl.constexpr = nonfinite is not None
    if HAS_MARKS and tl.load(nonfinite + head // sizes.group) != 0:
        dq = walk_keys(
            q,
            do,
            lse,
            factors,
            d,
            key,
            value,
            key_boxes,
            value_boxes,
            row0,
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
            OPTIONS,
        )
    else:
        dq = walk_keys(
            q,
            do,
            lse,
            factors,
            d,
            key,
            value,
            key_boxes,
            value_boxes,
            row0,
            b,
            h,
            tiles,
            band,
            mask,
            bias,
            dropout,
            sizes,
            scale,
            False,
            OPTIONS,
        )
    store_tile(grad_query, dq * (scale / LOG2_E), b, h, row0, Lq, OPTIONS.D, BLOCK_M, BLOCK_D)
