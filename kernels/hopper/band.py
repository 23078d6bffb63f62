"""Keys, positions and masks: what the forward and the backward kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
    s = gl.convert_layout(s.reshape([64, columns // 8, 8]), split)
    if HAS_HIGH:
        s = gl.where(chunk < gl.convert_layout(row_high, row)[:, None, None] - lane, s, -float("inf"))
    if HAS_LOW:
        s = gl.where(chunk >= gl.convert_layout(row_low, row)[:, None, None] - lane, s, -float("inf"))
    return gl.convert_layout(s.reshape([64, columns]), s_layout)
