"""What the backward pass needs of each row beside the tensors: the lse in log2 units, and delta."""

import triton
import triton.language as tl

from .masks import LOG2_E
from .tiles import load_tile


@triton.jit
def in_log2_units(lse):
    """A natural lse in log2 units, +inf (all P are 0) without keys."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def row_statistics(
    out,
    lse,
    grad_out,
    grad_lse,
    log2_lse,
    delta,
    Lq,
    heads,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta [B, Hq, Lq] = rowsum(dO * O) - d lse, and the lse :func:`in_log2_units`."""
    blocks = tl.cdiv(Lq, BLOCK_M)
    row0 = tl.program_id(0) % blocks * BLOCK_M
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    o = load_tile(out, None, b, h, row0, Lq, DV, BLOCK_M, BLOCK_DV, True)
    do = load_tile(grad_out, None, b, h, row0, Lq, DV, BLOCK_M, BLOCK_DV, True)
    rows = row0 + tl.arange(0, BLOCK_M)
    inside = rows < Lq
    result = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        result -= tl.load(grad_lse + head * Lq + rows, mask=inside, other=0.0)
    tl.store(delta + head * Lq + rows, result, mask=inside)
    natural = tl.load(lse + head * Lq + rows, mask=inside, other=0.0)
    tl.store(log2_lse + head * Lq + rows, in_log2_units(natural), mask=inside)


@triton.jit
def load_statistics(log2_lse, delta, head, row0, Lq, BLOCK_M: tl.constexpr, RAGGED: tl.constexpr):
    """(lse in log2 units, delta) of BLOCK_M rows of a head; +inf and 0 past the last."""
    at = tl.cast(head, tl.int64) * Lq
    rows = row0 + tl.arange(0, BLOCK_M)
    if RAGGED:
        lse = tl.load(log2_lse + at + rows, mask=rows < Lq, other=float("inf"))
        return lse, tl.load(delta + at + rows, mask=rows < Lq, other=0.0)
    return tl.load(log2_lse + at + rows), tl.load(delta + at + rows)


@triton.jit
def load_rescale(rescale, head, row0, Lq, BLOCK_M: tl.constexpr):
    """The factors of BLOCK_M rows of a head (see large_scores.py); 0 past the last."""
    rows = row0 + tl.arange(0, BLOCK_M)
    return tl.load(rescale + tl.cast(head, tl.int64) * Lq + rows, mask=rows < Lq, other=0.0)
