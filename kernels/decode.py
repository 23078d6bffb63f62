"""Few queries, many keys: the keys are split over programs and the parts combined in order (Flash-Decoding).

All query heads of a group and their queries share the rows of one tile, so K and V are read once.
"""

import triton
import triton.language as tl

from .forward import softmax_step
from .masks import band_of, key_tiles, masked_scores, natural_lse, without_unseen
from .operands import head_of
from .tiles import load_tile, rows_product


@triton.jit
def decode_part(
    query,
    key,
    value,
    part_out,
    part_sum,
    part_max,
    key_lengths,
    mask,
    bias,
    sizes,
    left,
    right,
    scale,
    splits,
    keys_per_split,
    OPTIONS: tl.constexpr,
):
    """One program: up to BLOCK_M (head of the group, query) rows over one split of the keys.

    ``part_out`` fp32 [splits, B * Hq * Lq, Dv] unnormalised, ``part_sum`` and ``part_max`` (log2) beside it.
    ``keys_per_split`` is a multiple of BLOCK_N.
    """
    BLOCK_M: tl.constexpr = OPTIONS.block_m
    BLOCK_N: tl.constexpr = OPTIONS.block_n
    BLOCK_D: tl.constexpr = OPTIONS.block_d
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    Lq = sizes.Lq
    group = sizes.group
    pid = tl.program_id(0)
    split = pid % splits
    blocks = tl.cdiv(group * Lq, BLOCK_M)
    block = pid // splits % blocks
    key_heads = sizes.heads // group
    b = pid // splits // blocks // key_heads
    key_head = pid // splits // blocks % key_heads
    band = band_of(key_lengths, b, left, right, sizes, OPTIONS)
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = packed < group * Lq
    packed = tl.minimum(packed, group * Lq - 1)  # the rows past the last repeat it
    rows = packed % Lq
    h = key_head * group + packed // Lq
    d = tl.arange(0, BLOCK_D)
    q_rows = head_of(query, b, h) + rows.to(tl.int64) * query.stride_l
    q = tl.load(q_rows[:, None] + d[None, :], mask=inside[:, None] & (d < OPTIONS.D)[None, :], other=0.0)
    tiles = key_tiles(0, Lq - 1, band, OPTIONS)
    first = tl.maximum(tiles.begin, split * keys_per_split)
    last = tl.minimum(tiles.end, (split + 1) * keys_per_split)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for column0 in tl.range(first, last, BLOCK_N):
        column0 = tl.multiple_of(column0, BLOCK_N)
        columns = column0 + tl.arange(0, BLOCK_N)
        k = load_tile(key, None, b, key_head, column0, band.n, OPTIONS.D, BLOCK_N, BLOCK_D, True)
        s = rows_product(q, k, BLOCK_D, OPTIONS) * scale
        s = masked_scores(s, b, h[:, None], rows[:, None], columns[None, :], band, mask, bias, Lq, True, OPTIONS)
        p, alpha, m = softmax_step(s, m, scale, True, False)
        total = total * alpha + tl.sum(p, 1)
        v = load_tile(value, None, b, key_head, column0, tiles.end, OPTIONS.DV, BLOCK_N, BLOCK_DV, True)
        if mask is not None or bias is not None:
            seen = tl.max(s, 0) > float("-inf")
            v = tl.where(seen[:, None], v, tl.zeros_like(v))
        elif OPTIONS.has_left:
            v = without_unseen(v, column0, tiles, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=OPTIONS.precision)
    all_rows = tl.num_programs(0).to(tl.int64) // splits // blocks * group * Lq  # B * Hq * Lq
    at = split * all_rows + (tl.cast(b, tl.int64) * sizes.heads + h) * Lq + rows
    tl.store(part_sum + at, total, mask=inside)
    tl.store(part_max + at, m, mask=inside)
    dv = tl.arange(0, BLOCK_DV)
    tl.store(part_out + at[:, None] * OPTIONS.DV + dv[None, :], acc, mask=inside[:, None] & (dv < OPTIONS.DV)[None, :])


@triton.jit
def combine_parts(
    part_out,
    part_sum,
    part_max,
    out,
    lse,
    sizes,
    splits,
    OPTIONS: tl.constexpr,
):
    """One program: one row of the output, from its parts in the order of the splits."""
    DV: tl.constexpr = OPTIONS.DV
    BLOCK_DV: tl.constexpr = OPTIONS.block_dv
    row = tl.program_id(0).to(tl.int64)
    all_rows = tl.num_programs(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    total = 0.0
    m = float("-inf")
    for split in tl.range(0, splits):
        at = split * all_rows + row
        m_part = tl.load(part_max + at)
        m_new = tl.maximum(m, m_part)
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
        before, after = tl.math.exp2(m - m_used), tl.math.exp2(m_part - m_used)
        part = tl.load(part_out + at * DV + dv, mask=dv < DV, other=0.0)
        acc = acc * before + part * after
        total = total * before + tl.load(part_sum + at) * after
        m = m_new
    whole = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + row, natural_lse(m, total))
    i = row % sizes.Lq
    h = row // sizes.Lq % sizes.heads
    b = row // sizes.Lq // sizes.heads
    target = head_of(out, b, h) + i * out.stride_l + dv
    tl.store(target, (acc / whole).to(out.data.dtype.element_ty), mask=dv < DV)
