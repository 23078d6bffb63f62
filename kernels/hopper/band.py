"""Keys, positions and masks: what the forward and the backward kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .primitives import named_barrier
from .schedule import keys_of_queries, locate_tile, tile_of_round


@gluon.jit
def sequence_length(lengths, batch, Lk, OPTIONS: gl.constexpr):
    """Keys of this batch entry."""
    if OPTIONS.key_lengths:
        return gl.load(lengths + batch).to(gl.int32)
    else:
        return Lk


@gluon.jit
def position_offset(Lq, length, OPTIONS: gl.constexpr):
    """Position of query 0."""
    if OPTIONS.lower_right:
        return length - Lq
    else:
        return length * 0


@gluon.constexpr_function
def split_layout(columns):
    """wgmma's accumulator layout of [64, columns], seen as [64, columns / 8, 8]."""
    registers = [[0, 0, 1], [8, 0, 0]]
    chunk = 1
    while chunk < columns // 8:
        registers.append([0, chunk, 0])
        chunk *= 2
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, columns // 8, 8])


@gluon.constexpr_function
def quad_layout():
    """A [64, 4] of which each of the four threads that share a row in wgmma's accumulator layout holds one column."""
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0]], lanes, [[16, 0], [32, 0]], [], [64, 4])


@gluon.jit
def by_chunks(s):
    """s [64, columns] in wgmma's accumulator layout as [64, columns / 8, 8]; moves nothing."""
    columns: gl.constexpr = s.shape[1]
    return gl.convert_layout(s.reshape([64, columns // 8, 8]), split_layout(columns))


@gluon.jit
def mask_scores(s, row_low, row_high, HAS_LOW: gl.constexpr, HAS_HIGH: gl.constexpr, s_layout: gl.constexpr):
    """s [64, columns] with -inf outside the columns [row_low, row_high) of each row.

    Columns are split as 8 * chunk + lane: in wgmma's layout a thread owns two fixed lanes of every chunk,
    so ``8 * chunk < row_high - lane`` compares an immediate with one of four registers.  Comparing whole
    column numbers makes the compiler keep all of them in registers through the loop.
    """
    columns: gl.constexpr = s.shape[1]
    split: gl.constexpr = split_layout(columns)
    row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, split))
    lane = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, split)))[None, None, :]
    chunk = 8 * gl.arange(0, columns // 8, gl.SliceLayout(0, gl.SliceLayout(2, split)))[None, :, None]
    s = by_chunks(s)
    if HAS_HIGH:
        s = gl.where(chunk < gl.convert_layout(row_high, row)[:, None, None] - lane, s, -float("inf"))
    if HAS_LOW:
        s = gl.where(chunk >= gl.convert_layout(row_low, row)[:, None, None] - lane, s, -float("inf"))
    return gl.convert_layout(s.reshape([64, columns]), s_layout)


@gluon.jit
def mask_keys(
    s, start, first, offset, key, left, right, KEYS: gl.constexpr, OPTIONS: gl.constexpr, layout: gl.constexpr
):
    """s [64 keys, block_m queries from ``start``] with -inf where the query may not see the key.

    ``key``: each row's; the tile is looked at where the band cuts the queries off from some of the KEYS keys from
    ``first``.
    """
    M: gl.constexpr = OPTIONS.block_m
    if OPTIONS.has_left or OPTIONS.has_right:
        cut = start + offset + right < first + KEYS - 1
        if OPTIONS.has_left:
            if OPTIONS.has_right:
                cut = cut | (start + M - 1 + offset - left > first)
            else:
                cut = start + M - 1 + offset - left > first
        if cut:
            from_query = key - (offset + right)
            to_query = key - (offset - left - 1)
            s = mask_scores(s, from_query - start, to_query - start, OPTIONS.has_right, OPTIONS.has_left, layout)
    return s


@gluon.jit
def zero_tail(tile, rows, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Zero the rows of a K or V tile at or past ``rows``; every consumer calls it before it multiplies by the tile.

    A product over keys adds 0 * NaN = NaN for a padded key of probability 0: padding must not reach wgmma.
    """
    if CONSUMER == 0:
        length: gl.constexpr = tile.shape[0]
        D: gl.constexpr = tile.shape[1]
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        row = gl.arange(0, length, gl.SliceLayout(1, layout))
        tile.store(gl.where((row < rows)[:, None], tile.load(layout), 0.0))
        fence_async_shared()
    named_barrier("sync", "11", "256" if CONSUMERS == 2 else "384")


@gluon.jit
def query_item(round_, lengths, sizes, BLOCK_M: gl.constexpr, OPTIONS: gl.constexpr):
    """The tile of BLOCK_M queries of this program's round: (first query, batch, head, key length, position offset), and
    its key tiles by :func:`.schedule.keys_of_queries`."""
    Lq, Lk, left, right, Hq, group, blocks, heads, section = sizes
    tile = tile_of_round(round_, gl.program_id(0), gl.num_programs(0))
    block, batch_head = locate_tile(tile, blocks, heads, section, OPTIONS.has_right, OPTIONS.heads_inner)
    first = block * BLOCK_M
    batch = batch_head // Hq
    length = sequence_length(lengths, batch, Lk, OPTIONS)
    offset = position_offset(Lq, length, OPTIONS)
    band = (Lq, offset, left, right)
    keys = keys_of_queries(first, band, length, BLOCK_M, OPTIONS.block_n, OPTIONS.has_left, OPTIONS.has_right)
    return first, batch, batch_head % Hq, length, offset, keys
