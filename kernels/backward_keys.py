"""Backward: dK = scale dS^T Q and dV = P^T dO, each program its block of keys, walking over the queries.

All query heads of a group are summed by the program of their key head.
"""

import triton
import triton.language as tl

from .backward_tiles import grad_scores, probabilities
from .masks import LOG2_E, band_of, bounds, dropout_keep, masked_scores, query_tiles
from .statistics import load_rescale, load_statistics
from .tiles import deal, load_tile, rows_product, store_tile


@triton.jit
def add_queries(
    dk,
    dv,
    k,
    v,
    query,
    grad_out,
    query_boxes,
    grad_out_boxes,
    log2_lse,
    rescale,
    delta,
    first,
    last,
    key0,
    b,
    h,
    band,
    mask,
    bias,
    dropout,
    sizes,
    scale,
    BAND: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Add the queries from ``first`` up to ``last`` of one head to dK and dV; all tiles are [BLOCK_N, BLOCK_M]."""
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    MASKED: tl.constexpr = BAND or (mask is not None) or (bias is not None)
    Lq = sizes.Lq
    head = b * sizes.heads + h
    columns = (key0 + tl.arange(0, BLOCK_N))[:, None]
    for row0 in tl.range(first, last, BLOCK_M):
        row0 = tl.multiple_of(row0, BLOCK_M)
        rows = (row0 + tl.arange(0, BLOCK_M))[None, :]
        q = load_tile(query, query_boxes, b, h, row0, Lq, OPTIONS.D, BLOCK_M, OPTIONS.block_d, BAND)
        lse, d = load_statistics(log2_lse, delta, head, row0, Lq, BLOCK_M, BAND)
        s = rows_product(k, q, OPTIONS.block_d, OPTIONS) * scale
        s = masked_scores(s, b, h, rows, columns, band, mask, bias, Lq, BAND, OPTIONS)
        factors = None
        if rescale is not None:
            factors = load_rescale(rescale, head, row0, Lq, BLOCK_M)
        p = probabilities(s, lse, factors, 0, MASKED)
        do = load_tile(grad_out, grad_out_boxes, b, h, row0, Lq, OPTIONS.DV, BLOCK_M, OPTIONS.block_dv, BAND)
        keep = True
        kept = p
        if dropout is not None:
            keep = dropout_keep(dropout, head, row0, key0, BLOCK_M, BLOCK_N).T
            kept = tl.where(keep, p * dropout.keep_scale, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=OPTIONS.precision)
        dp = rows_product(v, do, OPTIONS.block_dv, OPTIONS)
        ds = grad_scores(p, dp, d[None, :], keep, dropout, MASKED)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=OPTIONS.precision)
    return dk, dv


@triton.jit
def gradients_of_keys(
    query,
    key,
    value,
    query_boxes,
    grad_out_boxes,
    grad_out,
    log2_lse,
    rescale,
    delta,
    grad_key,
    grad_value,
    key_lengths,
    mask,
    bias,
    dropout,
    sizes,
    left,
    right,
    scale,
    together,
    OPTIONS: tl.constexpr,
):
    """One program: BLOCK_N keys of one key head. ``scale`` in log2 units; grad_key or grad_value may be None."""
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    BLOCK_D: tl.constexpr = OPTIONS.block_d
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    Lk = sizes.Lk
    slab, block = deal(tl.cdiv(Lk, BLOCK_N), together)
    key0 = block * BLOCK_N  # early keys have the most causal queries: heaviest first
    key_heads = sizes.heads // sizes.group
    b = slab // key_heads
    key_head = slab % key_heads
    band = band_of(key_lengths, b, left, right, sizes, OPTIONS)
    k = load_tile(key, None, b, key_head, key0, band.n, OPTIONS.D, BLOCK_N, BLOCK_D, True)
    v = load_tile(value, None, b, key_head, key0, band.n, OPTIONS.DV, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    tiles = query_tiles(key0, key0 + BLOCK_N - 1, band, sizes.Lq, OPTIONS)
    for member in tl.range(0, sizes.group):
        for part in tl.static_range(3):
            if part > 0 or OPTIONS.has_right:
                first, last = bounds(tiles, part)
                dk, dv = add_queries(
                    dk,
                    dv,
                    k,
                    v,
                    query,
                    grad_out,
                    query_boxes,
                    grad_out_boxes,
                    log2_lse,
                    rescale,
                    delta,
                    first,
                    last,
                    key0,
                    b,
                    key_head * sizes.group + member,
                    band,
                    mask,
                    bias,
                    dropout,
                    sizes,
                    scale,
                    part != 1,
                    OPTIONS,
                )
    if grad_key is not None:
        store_tile(grad_key, dk * (scale / LOG2_E), b, key_head, key0, Lk, OPTIONS.D, BLOCK_N, BLOCK_D)
    if grad_value is not None:
        store_tile(grad_value, dv, b, key_head, key0, Lk, OPTIONS.DV, BLOCK_N, BLOCK_DV)
