"""Which heads of K or V hold an infinity or a NaN, so that kernels guard against 0 * NaN only where there is one."""

import triton
import triton.language as tl

from .tiles import load_tile


@triton.jit
def mark_nonfinite(x, marks, heads, L, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Set marks [B * H] int32, zero before, to 1 where Rows ``x`` [B, H, L, D] hold an infinity or a NaN."""
    blocks = tl.cdiv(L, BLOCK_L)
    row0 = tl.program_id(0) % blocks * BLOCK_L
    head = tl.program_id(0) // blocks
    tile = load_tile(x, None, head // heads, head % heads, row0, L, D, BLOCK_L, BLOCK_D, True).to(tl.float32)
    unbounded = tl.where(tl.abs(tile) < float("inf"), 0, 1)
    if tl.max(tl.max(unbounded, 1), 0) != 0:
        tl.atomic_max(marks + head, 1)
