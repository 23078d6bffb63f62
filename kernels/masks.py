"""What a query may attend to, for every kernel: which tiles to visit, and which elements of a border tile.

The band (causality, window, key lengths) leaves query ``i`` the keys ``[i + shift - left, i + shift + right]``
below the sequence's own number of keys ``n``.  The boolean mask and the bias act on top of it.
"""

import triton
import triton.language as tl

from .operands import Band, Tiles

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def band_of(key_lengths, b, left, right, sizes, OPTIONS: tl.constexpr):
    """The band of one sequence."""
    n = sizes.Lk
    if key_lengths is not None:
        n = tl.load(key_lengths + b).to(tl.int32)
    shift = 0
    if OPTIONS.lower_right:
        shift = n - sizes.Lq
    return Band(left, right, n, shift)


@triton.jit
def key_tiles(row0, row1, band, OPTIONS: tl.constexpr):
    """The tiles of keys for the queries row0..row1 (inclusive)."""
    BLOCK: tl.constexpr = OPTIONS.block_n
    low = 0
    full_begin = 0
    end = band.n
    full_end = band.n
    if OPTIONS.has_left:
        low = tl.maximum(0, row0 + band.shift - band.left)
        full_begin = tl.maximum(0, row1 + band.shift - band.left)
    if OPTIONS.has_right:
        end = tl.minimum(band.n, row1 + band.shift + band.right + 1)
        full_end = tl.minimum(band.n, row0 + band.shift + band.right + 1)
    end = tl.maximum(end, 0)
    full_end = tl.maximum(full_end, 0)
    return whole_tiles(low, full_begin, full_end, end, BLOCK)


@triton.jit
def query_tiles(key0, key1, band, Lq, OPTIONS: tl.constexpr):
    """The tiles of queries for the keys key0..key1 (inclusive)."""
    BLOCK: tl.constexpr = OPTIONS.block_m
    low = 0
    full_begin = 0
    end = Lq
    full_end = Lq
    if OPTIONS.has_right:
        low = tl.maximum(0, key0 - band.right - band.shift)
        full_begin = tl.maximum(0, key1 - band.right - band.shift)
    if OPTIONS.has_left:
        end = tl.minimum(Lq, key1 + band.left - band.shift + 1)
        full_end = tl.minimum(Lq, key0 + band.left - band.shift + 1)
    end = tl.where(key0 < band.n, tl.maximum(end, 0), 0)  # a tile of padding has no query
    full_end = tl.where(key1 < band.n, tl.maximum(full_end, 0), 0)
    return whole_tiles(low, full_begin, full_end, end, BLOCK)


@triton.jit
def whole_tiles(low, full_begin, full_end, end, BLOCK: tl.constexpr):
    """:class:`Tiles` from the bounds of what is seen at all and of what is seen by everyone."""
    begin = low // BLOCK * BLOCK
    full_begin = tl.cdiv(full_begin, BLOCK) * BLOCK
    full_end = full_end // BLOCK * BLOCK
    full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK) * BLOCK)
    full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum(full_end, full_begin)
    return Tiles(low, begin, full_begin, full_end, end)


@triton.jit
def bounds(tiles, part: tl.constexpr):
    """(first, last) of the border on the left (part 0), the full tiles (1), the border on the right (2)."""
    if part == 0:
        return tiles.begin, tiles.full_begin
    if part == 1:
        return tiles.full_begin, tiles.full_end
    return tiles.full_end, tiles.end


@triton.jit
def without_unseen(x, column0, tiles, BLOCK_N: tl.constexpr):
    """The rows of a tile of K or V [BLOCK_N, D] that no query of the tile sees, zeroed: 0 * NaN would be NaN."""
    columns = column0 + tl.arange(0, BLOCK_N)
    return tl.where(((columns >= tiles.low) & (columns < tiles.end))[:, None], x, tl.zeros_like(x))


@triton.jit
def load_scores(x, b, h, rows, columns, inside, BAND: tl.constexpr):
    """Elements of a mask or bias; BAND: only those ``inside``, else all columns exist."""
    base = x.data + tl.cast(b, tl.int64) * x.stride_b + tl.cast(h, tl.int64) * x.stride_h
    pointers = base + (rows.to(tl.int64) * x.stride_m + columns.to(tl.int64) * x.stride_n)
    if BAND:
        return tl.load(pointers, mask=inside, other=0)
    return tl.load(pointers)


@triton.jit
def masked_scores(s, b, h, rows, columns, band, mask, bias, Lq, BAND: tl.constexpr, OPTIONS: tl.constexpr):
    """Scores in log2 units with the bias added and -inf where the query may not attend.

    ``h``, ``rows`` and ``columns`` broadcast to the shape of ``s``, in either order.  BAND: the tile may cross
    the band's edge; else all its columns exist.
    """
    inside = columns < band.n
    last_rows = tl.minimum(rows, Lq - 1)  # rows past the last query read the last one's mask and bias
    if bias is not None:
        added = load_scores(bias, b, h, last_rows, columns, inside, BAND).to(tl.float32)
        # finfo.min stays finite in log2 units: such a bias forbids nothing
        s = tl.where(added == float("-inf"), float("-inf"), s + tl.maximum(added * LOG2_E, LOWEST))
    if mask is not None:
        allowed = load_scores(mask, b, h, last_rows, columns, inside, BAND)
        s = tl.where(allowed != 0, s, float("-inf"))
    if BAND:
        ok = inside & (rows < Lq)
        if OPTIONS.has_left:
            ok = ok & (columns >= rows + (band.shift - band.left))
        if OPTIONS.has_right:
            ok = ok & (columns <= rows + (band.shift + band.right))
        s = tl.where(ok, s, float("-inf"))
    return s


@triton.jit
def natural_lse(m, total):
    """The lse of rows with the largest score ``m`` (log2 units) and the sum beside it: -inf of no keys at all."""
    empty = total == 0.0
    lse = tl.where(empty, float("-inf"), (m + tl.math.log2(tl.where(empty, 1.0, total))) * LN_2)
    return tl.where(m == LOWEST, LOWEST, lse)  # of a bias that has no place in log2 units


@triton.jit
def dropout_keep(dropout, head, row0, column0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bool [BLOCK_M, BLOCK_N]: the weights that dropout keeps (Philox4x32-10, Salmon et al. 2011).

    Key (seed low, seed high), counter (j // 4, i, b * Hq + h, offset low); key j takes word j % 4.  Words are
    compared with the threshold as signed numbers with their top bit flipped.
    """
    seed = tl.load(dropout.rng_state)
    offset = tl.load(dropout.rng_state + 1).to(tl.int32)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    quad = zero + (column0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    row = zero + (row0 + tl.arange(0, BLOCK_M))[:, None]
    w0, w1, w2, w3 = tl.philox(seed, quad, row, zero + tl.cast(head, tl.int32), zero + offset, 10)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    return (words.to(tl.int32, bitcast=True) ^ -2147483648) >= dropout.threshold
