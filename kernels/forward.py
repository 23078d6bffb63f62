"""Forward: one pass over the keys with the online softmax in base 2 (Dao 2023, arXiv:2307.08691)."""

import triton
import triton.language as tl

from .masks import band_of, bounds, dropout_keep, key_tiles, masked_scores, natural_lse, without_unseen
from .tiles import deal, load_tile, rows_product, store_tile


@triton.jit
def softmax_step(s, m, scale, SCALED: tl.constexpr, SAFE: tl.constexpr):
    """(p, rescaling of what was summed so far, new maximum) for the scores of one more tile.

    SCALED: s is in log2 units already, else it is multiplied by ``scale`` > 0 on the way.  SAFE: no row of the
    tile can be wholly masked, so that the maximum is finite.
    """
    if SCALED:
        m_new = tl.maximum(m, tl.max(s, 1))
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
    m_used = m_new
    if not SAFE:
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
    if SCALED:
        p = tl.math.exp2(s - m_used[:, None])
    else:
        p = tl.math.exp2(s * scale - m_used[:, None])
    return p, tl.math.exp2(m - m_used), m_new


@triton.jit
def attend_tiles(
    acc,
    total,
    m,
    q,
    key,
    value,
    key_boxes,
    value_boxes,
    first,
    last,
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
    BAND: tl.constexpr,
    GUARDED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """Add the keys from ``first`` up to ``last`` to the running softmax (acc [BM, BDV], total [BM], m [BM]).

    GUARDED: a value that mask or bias hide from the whole tile may be NaN.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    # only raw scores can be scaled inside the exponent's fused multiply-add
    SCALED: tl.constexpr = BAND or (mask is not None) or (bias is not None) or (not OPTIONS.positive_scale)
    SAFE: tl.constexpr = not (BAND or (mask is not None) or (bias is not None))
    rows = row0 + tl.arange(0, BLOCK_M)
    key_head = h // sizes.group
    for column0 in tl.range(first, last, BLOCK_N):
        column0 = tl.multiple_of(column0, BLOCK_N)
        columns = column0 + tl.arange(0, BLOCK_N)
        k = load_tile(key, key_boxes, b, key_head, column0, band.n, OPTIONS.D, BLOCK_N, OPTIONS.block_d, BAND)
        s = rows_product(q, k, OPTIONS.block_d, OPTIONS)
        if SCALED:
            s = s * scale
        s = masked_scores(s, b, h, rows[:, None], columns[None, :], band, mask, bias, sizes.Lq, BAND, OPTIONS)
        p, alpha, m = softmax_step(s, m, scale, SCALED, SAFE)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if dropout is not None:
            p = tl.where(dropout_keep(dropout, b * sizes.heads + h, row0, column0, BLOCK_M, BLOCK_N), p, 0.0)
        v = load_tile(value, value_boxes, b, key_head, column0, tiles.end, OPTIONS.DV, BLOCK_N, OPTIONS.block_dv, BAND)
        if GUARDED:
            # a key that no query of the tile may see must not leak a NaN through 0 * NaN
            seen = tl.max(s, 0) > float("-inf")
            v = tl.where(seen[:, None], v, tl.zeros_like(v))
        elif BAND and (value_boxes is not None or OPTIONS.has_left):
            v = without_unseen(v, column0, tiles, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=OPTIONS.precision)
    return acc, total, m


@triton.jit
def attend(
    q,
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
    """The softmax over all keys that a block of queries sees: (acc [BM, BDV], total [BM], m [BM])."""
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in tl.static_range(3):
        if part > 0 or OPTIONS.has_left:
            first, last = bounds(tiles, part)
            acc, total, m = attend_tiles(
                acc,
                total,
                m,
                q,
                key,
                value,
                key_boxes,
                value_boxes,
                first,
                last,
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
                part != 1,
                GUARDED,
                OPTIONS,
            )
    return acc, total, m


@triton.jit
def attention_forward(
    query,
    key,
    value,
    key_boxes,
    value_boxes,
    out,
    lse,
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
    """One program: BLOCK_M queries of one head. ``scale`` is in log2 units (times log2 e).

    ``key_boxes`` and ``value_boxes``: TMA descriptors in boxes of block_n rows, or None.  ``nonfinite`` int32
    [B * Hkv], given with a mask or bias: heads whose values hold an infinity or a NaN.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    Lq = sizes.Lq
    blocks = tl.cdiv(Lq, BLOCK_M)
    head, block = deal(blocks, together)  # head = b * Hq + h
    if OPTIONS.has_right:
        block = blocks - 1 - block  # a causal row block works the more the later it is: heaviest first
    b = head // sizes.heads
    h = head % sizes.heads
    band = band_of(key_lengths, b, left, right, sizes, OPTIONS)
    row0 = block * BLOCK_M
    tiles = key_tiles(row0, tl.minimum(row0 + BLOCK_M, Lq) - 1, band, OPTIONS)
    q = load_tile(query, None, b, h, row0, Lq, OPTIONS.D, BLOCK_M, OPTIONS.block_d, True)
    HAS_MARKS: tl.constexpr = nonfinite is not None
    if HAS_MARKS and tl.load(nonfinite + head // sizes.group) != 0:
        acc, total, m = attend(
            q,
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
        acc, total, m = attend(
            q,
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
    rows = row0 + tl.arange(0, BLOCK_M)
    empty = total == 0.0
    tl.store(lse + head.to(tl.int64) * Lq + rows, natural_lse(m, total), mask=rows < Lq)
    keep_scale = 1.0
    if dropout is not None:
        keep_scale = dropout.keep_scale
    acc = acc * (keep_scale / tl.where(empty, 1.0, total))[:, None]
    store_tile(out, acc, b, h, row0, Lq, OPTIONS.DV, BLOCK_M, BLOCK_DV)
