"""One tile of the backward pass, for every kernel of it (Dao 2023, arXiv:2307.08691, algorithm 2).

P is recomputed from the saved lse.  With delta = rowsum(dO * O) - d lse, dS = P * (dP - delta).
"""

import triton
import triton.language as tl

from .masks import dropout_keep, masked_scores, without_unseen
from .tiles import load_tile, rows_product


@triton.jit
def probabilities(s, log2_lse, rescale, AXIS: tl.constexpr, MASKED: tl.constexpr):
    """P = exp(S - lse) of a tile of masked scores, whose keys lie along AXIS. MASKED: some may be -inf.

    ``rescale`` or None: with it, ``log2_lse`` may be the largest score instead (see large_scores.py).
    """
    x = s - tl.expand_dims(log2_lse, AXIS)
    if rescale is None:
        p = tl.math.exp2(x)
    else:
        # a large score may come out a unit larger here than where the largest was found
        p = tl.math.exp2(tl.minimum(x, 0.0, tl.PropagateNan.ALL)) * tl.expand_dims(rescale, AXIS)
    if MASKED:
        p = tl.where(s == float("-inf"), 0.0, p)  # also where the lse is a NaN's
    return p


@triton.jit
def grad_scores(p, dp, delta, keep, dropout, MASKED: tl.constexpr):
    """dS = P * (dropped dP - delta); where a mask made P 0, dS is 0 even if dP is NaN."""
    if dropout is not None:
        dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def grad_score_tile(
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
    BAND: tl.constexpr,
    GUARDED: tl.constexpr,
    OPTIONS: tl.constexpr,
):
    """(dS [BLOCK_M, BLOCK_N], K of the tile with the rows that nobody sees zeroed).

    ``q``, ``do``, ``lse``, ``rescale`` and ``delta`` are those of the rows from row0.  GUARDED: a key that mask or bias
    hide from the whole tile may be NaN.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    MASKED: tl.constexpr = BAND or (mask is not None) or (bias is not None)
    column0 = tl.multiple_of(column0, BLOCK_N)
    rows = (row0 + tl.arange(0, BLOCK_M))[:, None]
    columns = (column0 + tl.arange(0, BLOCK_N))[None, :]
    key_head = h // sizes.group
    k = load_tile(key, key_boxes, b, key_head, column0, tiles.end, OPTIONS.D, BLOCK_N, OPTIONS.block_d, BAND)
    s = rows_product(q, k, OPTIONS.block_d, OPTIONS) * scale
    s = masked_scores(s, b, h, rows, columns, band, mask, bias, sizes.Lq, BAND, OPTIONS)
    p = probabilities(s, lse, rescale, 1, MASKED)
    v = load_tile(value, value_boxes, b, key_head, column0, band.n, OPTIONS.DV, BLOCK_N, OPTIONS.block_dv, BAND)
    dp = rows_product(do, v, OPTIONS.block_dv, OPTIONS)
    keep = True
    if dropout is not None:
        keep = dropout_keep(dropout, b * sizes.heads + h, row0, column0, BLOCK_M, BLOCK_N)
    ds = grad_scores(p, dp, delta[:, None], keep, dropout, MASKED)
    if GUARDED:
        seen = tl.max(p, 0) > 0.0
        k = tl.where(seen[:, None], k, tl.zeros_like(k))
    elif BAND and (key_boxes is not None or OPTIONS.has_left):
        k = without_unseen(k, column0, tiles, BLOCK_N)
    return ds, k
