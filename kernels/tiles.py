"""Loading and storing tiles of [L, D] matrices whose edges may be ragged, and which program takes which tile."""

import triton
import triton.language as tl

from .operands import head_of


@triton.jit
def load_rows(base, row0, stride, rows, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr):
    """[BLOCK, BLOCK_D] at row0 of a matrix with ``rows`` rows of D elements; zeros outside.

    RAGGED False promises that all BLOCK rows exist.
    """
    r = row0 + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    pointers = base + r[:, None].to(tl.int64) * stride + d[None, :]
    if RAGGED:
        return tl.load(pointers, mask=(r < rows)[:, None] & (d < D)[None, :], other=0.0)
    if BLOCK_D == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
def load_tile(x, boxes, b, h, row0, rows, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr):
    """:func:`load_rows` of one head of Rows ``x``, by TMA where ``boxes`` is its descriptor.

    A descriptor's boxes are [1, 1, BLOCK, BLOCK_D] of [B, H, L, D]: L bounds their rows, not ``rows``.
    """
    if boxes is not None:
        return boxes.load([b, h, row0, 0]).reshape(BLOCK, BLOCK_D)
    return load_rows(head_of(x, b, h), row0, x.stride_l, rows, D, BLOCK, BLOCK_D, RAGGED)


@triton.jit
def store_tile(x, tile, b, h, row0, rows, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [BLOCK, BLOCK_D] at row0 of one head of Rows ``x``, ``rows`` rows of D elements, in its dtype."""
    r = row0 + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    pointers = head_of(x, b, h) + r[:, None].to(tl.int64) * x.stride_l + d[None, :]
    tl.store(pointers, tile.to(x.data.dtype.element_ty), mask=(r < rows)[:, None] & (d < D)[None, :])


@triton.jit
def rows_product(x, y, BLOCK_D: tl.constexpr, OPTIONS: tl.constexpr):
    """x y^T [M, N] of tiles [M, BLOCK_D] and [N, BLOCK_D], as the sum of its parts over CHUNK columns each."""
    CHUNK: tl.constexpr = OPTIONS.chunk
    if BLOCK_D <= CHUNK:
        return tl.dot(x, y.T, input_precision=OPTIONS.precision)
    else:  # the compiler would look at what follows a return
        PARTS: tl.constexpr = BLOCK_D // CHUNK
        parts_x = x.reshape(x.shape[0], PARTS, CHUNK).permute(1, 0, 2)
        parts_y = y.reshape(y.shape[0], PARTS, CHUNK).permute(1, 2, 0)
        return tl.sum(tl.dot(parts_x, parts_y, input_precision=OPTIONS.precision), 0)


@triton.jit
def deal(blocks, together):
    """(head, block) of this program, of num_programs / blocks heads with ``blocks`` blocks each.

    ``together`` heads, which fit in the L2 cache, take turns: all their first blocks, then all their second ones.
    """
    pid = tl.program_id(0)
    first = pid // (blocks * together) * together
    width = tl.minimum(together, tl.num_programs(0) // blocks - first)
    turn = pid - first * blocks
    return first + turn % width, turn // width
