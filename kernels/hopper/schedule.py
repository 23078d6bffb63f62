"""Which tiles a program works on, and which keys a tile of queries can see.

Producer and consumers of a kernel never talk about indices: each calls the functions below with the
same arguments and walks the same sequence.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tiles_of_program(program, programs, total):
    """How many of ``total`` work tiles a program gets when they are dealt in snake order."""
    rounds = total // programs
    rest = total % programs
    place = program
    if rounds % 2 == 1:
        place = programs - 1 - program
    if place < rest:
        rounds += 1
    return rounds


@gluon.jit
def tile_of_round(round_, program, programs):
    """The work tile that a program gets in a round; odd rounds are dealt backwards, which evens out
    tiles sorted by length."""
    place = program
    if round_ % 2 == 1:
        place = programs - 1 - program
    return round_ * programs + place


@gluon.jit
def locate_tile(tile, blocks, heads, section, HEAVY_LAST: gl.constexpr, HEADS_INNER: gl.constexpr):
    """Work tile -> (block, head), ``head`` counting batch * heads.

    HEADS_INNER deals the same block of ``section`` heads one after the other, so that tiles come sorted by
    length (heaviest first with HEAVY_LAST, when the last block is the longest) while K and V of the heads in
    flight stay in L2; otherwise all blocks of a head come before the next head.
    """
    if HEADS_INNER:
        group = tile // (blocks * section)
        inside = tile % (blocks * section)
        width = gl.minimum(section, heads - group * section)
        block = inside // width
        head = group * section + inside % width
    else:
        block = tile % blocks
        head = tile // blocks
    if HEAVY_LAST:
        block = blocks - 1 - block
    return block, head


@gluon.jit
def keys_of_queries(
    first, band, length, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr
):
    """The key tiles that queries [first, first + BLOCK_M) look at, in the order of the loop.

    ``band`` is (Lq, offset, left, right): query i stands at position p = i + offset and sees the keys
    [p - left, p + right] below ``length``.  Returns (count, edge, low, low_edge, high): ``count`` >= 1
    tiles, the first 1 + edge + low_edge of which hold keys that some query may not see; see
    :func:`key_tile` for the order.
    """
    Lq, offset, left, right = band
    last = gl.minimum(first + BLOCK_M, Lq) - 1
    end_any = length
    end_all = length
    if HAS_RIGHT:
        end_any = gl.minimum(length, last + offset + right + 1)
        end_all = gl.minimum(length, first + offset + right + 1)
    high = gl.cdiv(gl.maximum(end_any, 0), BLOCK_N)
    full_high = gl.maximum(end_all, 0) // BLOCK_N
    low = length * 0
    full_low = length * 0
    if HAS_LEFT:
        low = gl.maximum(first + offset - left, 0) // BLOCK_N
        full_low = gl.cdiv(gl.maximum(last + offset - left, 0), BLOCK_N)
    # queries that see nothing still take one (wholly masked) tile: the pipeline has no empty case
    high = gl.maximum(high, low + 1)
    count = high - low
    edge = gl.minimum(gl.maximum(high - 1 - full_high, 0), count - 1)
    full = gl.maximum(high - 1 - edge - gl.maximum(full_low, low), 0)
    return count, edge, low, count - 1 - edge - full, high


@gluon.jit
def key_tile(i, edge, low, low_edge, high):
    """The i-th key tile in the loop's order: from the right edge of the band leftwards, then the tiles
    cut by its left edge, then those in between that need no mask."""
    from_high = high - 1 - i
    skipped = gl.where(i > edge + low_edge, from_high + low_edge, low + i - edge - 1)
    return gl.where(i <= edge, from_high, skipped)


@gluon.jit
def queries_of_keys(
    first, band, length, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr
):
    """(first tile, count) of the tiles of BLOCK_M queries that see any of the keys [first, first + BLOCK_N).

    ``band`` as in :func:`keys_of_queries`.
    """
    Lq, offset, left, right = band
    start = Lq * 0
    end = Lq
    if HAS_RIGHT:
        start = gl.maximum(first - right - offset, 0)
    if HAS_LEFT:
        end = gl.minimum(end, gl.minimum(first + BLOCK_N, length) + left - offset)
    low = start // BLOCK_M
    count = gl.maximum(gl.cdiv(gl.maximum(end, 0), BLOCK_M) - low, 0)
    return low, gl.where(first < length, count, 0)


@gluon.jit
def tile_of_turn(turn, count, shift, FROM_LAST: gl.constexpr):
    """Which of ``count`` tiles a program takes in a turn: from the last to the first, or upwards from tile ``shift``,
    round to the tile before it."""
    if FROM_LAST:
        return count - 1 - turn
    else:
        return gl.where(turn + shift >= count, turn + shift - count, turn + shift)
