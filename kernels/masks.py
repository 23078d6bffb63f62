"""What a query may attend to, for every kernel: which tiles to visit, and which elements of a border tile.

The band (causality, window, key lengths) leaves query ``i`` the keys ``[i + shift - left, i + shift + right]``
below the sequence's own number of keys ``n``.  The boolean mask and the bias act on top of it.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def sequence(key_lengths, batch, Lq, Lk, LOWER_RIGHT: tl.constexpr):
    """The number of keys n of this sequence, and the shift from a query's index to its position."""
    n = Lk
    if key_lengths is not None:
        n = tl.load(key_lengths + batch).to(tl.int32)
    shift = 0
    if LOWER_RIGHT:
        shift = n - Lq
    return n, shift


@triton.jit
def key_tiles(
    row0, row1, n, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Key tiles for the queries row0..row1 (inclusive): (low, begin, full_begin, full_end, end).

    Tiles from begin up to full_begin and from full_end up to end are borders; those between are seen whole by
    every one of the queries.  These are multiples of BLOCK_N, but for ``end``; no query sees a key below ``low``
    or from ``end`` on.
    """
    low = 0
    full_begin = 0
    end = n
    full_end = n
    if HAS_LEFT:
        low = tl.maximum(0, row0 + shift - left)
        full_begin = tl.maximum(0, row1 + shift - left)
    if HAS_RIGHT:
        end = tl.minimum(n, row1 + shift + right + 1)
        full_end = tl.minimum(n, row0 + shift + right + 1)
    end = tl.maximum(end, 0)
    begin = low // BLOCK_N * BLOCK_N
    full_begin = tl.cdiv(full_begin, BLOCK_N) * BLOCK_N
    full_end = tl.maximum(full_end, 0) // BLOCK_N * BLOCK_N
    full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_end, full_begin)
    return low, begin, full_begin, full_end, end


@triton.jit
def query_tiles(
    key0, key1, n, shift, left, right, Lq, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Query tiles for the keys key0..key1 (inclusive): (begin, full_begin, full_end, end) of :func:`key_tiles`."""
    begin = 0
    full_begin = 0
    end = Lq
    full_end = Lq
    if HAS_RIGHT:
        begin = tl.maximum(0, key0 - right - shift)
        full_begin = tl.maximum(0, key1 - right - shift)
    if HAS_LEFT:
        end = tl.minimum(Lq, key1 + left - shift + 1)
        full_end = tl.minimum(Lq, key0 + left - shift + 1)
    end = tl.where(key0 < n, tl.maximum(end, 0), 0)  # a tile of padding has no query
    full_end = tl.where(key1 < n, tl.maximum(full_end, 0), 0)
    begin = begin // BLOCK_M * BLOCK_M
    full_begin = tl.cdiv(full_begin, BLOCK_M) * BLOCK_M
    full_end = full_end // BLOCK_M * BLOCK_M
    full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_M) * BLOCK_M)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def without_unseen(x, column0, low, end, BLOCK_N: tl.constexpr):
    """The rows of a tile of K or V [BLOCK_N, D] that no query of the tile sees, zeroed: 0 * NaN would be NaN."""
    columns = column0 + tl.arange(0, BLOCK_N)
    return tl.where(((columns >= low) & (columns < end))[:, None], x, tl.zeros_like(x))


@triton.jit
def masked_scores(
    s,
    rows,
    columns,
    n,
    shift,
    left,
    right,
    Lq,
    mask,
    stride_mask_m,
    stride_mask_n,
    bias,
    stride_bias_m,
    stride_bias_n,
    BAND: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Scores in log2 units with the bias added and -inf where the query may not attend.

    ``rows`` and ``columns`` broadcast to the shape of ``s``, in either order; ``mask`` and ``bias`` point at the
    head's [Lq, Lk].  BAND: the tile may cross the band's edge; else all its columns exist.
    """
    inside = columns < n
    # rows past the last query read the last one's mask and bias
    last_rows = tl.minimum(rows, Lq - 1).to(tl.int64)
    if bias is not None:
        offset = last_rows * stride_bias_m + columns.to(tl.int64) * stride_bias_n
        if BAND:
            added = tl.load(bias + offset, mask=inside, other=0.0).to(tl.float32)
        else:
            added = tl.load(bias + offset).to(tl.float32)
        # finfo.min stays finite in log2 units: such a bias forbids nothing
        s = tl.where(added == float("-inf"), float("-inf"), s + tl.maximum(added * LOG2_E, LOWEST))
    if mask is not None:
        offset = last_rows * stride_mask_m + columns.to(tl.int64) * stride_mask_n
        if BAND:
            allowed = tl.load(mask + offset, mask=inside, other=0)
        else:
            allowed = tl.load(mask + offset)
        s = tl.where(allowed != 0, s, float("-inf"))
    if BAND:
        ok = inside & (rows < Lq)
        if HAS_LEFT:
            ok = ok & (columns >= rows + (shift - left))
        if HAS_RIGHT:
            ok = ok & (columns <= rows + (shift + right))
        s = tl.where(ok, s, float("-inf"))
    return s


@triton.jit
def dropout_keep(rng_state, threshold, head, row0, column0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N]: the weights that dropout keeps (Philox4x32-10, Salmon et al. 2011).

    Key (seed low, seed high), counter (j // 4, i, b * Hq + h, offset low); key j takes word j % 4.  ``threshold``
    is floor(p * 2^32) - 2^31: words are compared as signed numbers with their top bit flipped.
    """
    seed = tl.load(rng_state)
    offset = tl.load(rng_state + 1).to(tl.int32)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    quad = zero + (column0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    row = zero + (row0 + tl.arange(0, BLOCK_M))[:, None]
    w0, w1, w2, w3 = tl.philox(seed, quad, row, zero + tl.cast(head, tl.int32), zero + offset, 10)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    return (words.to(tl.int32, bitcast=True) ^ -2147483648) >= threshold
