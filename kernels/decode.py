"""Few queries, many keys: the keys are split over programs and the parts combined in order (Flash-Decoding).

All query heads of a group and their queries share the rows of one tile, so K and V are read once.
"""

import triton
import triton.language as tl

from .forward import softmax_step
from .masks import LN_2, key_tiles, masked_scores, sequence, without_unseen
from .tiles import load_rows


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
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    Lq,
    Lk,
    heads,
    group,
    left,
    right,
    scale,
    splits,
    keys_per_split,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    LOWER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: up to BLOCK_M (head of the group, query) rows over one split of the keys.

    ``part_out`` fp32 [splits, B * Hq * Lq, Dv] unnormalised, ``part_sum`` and ``part_max`` (log2) beside it.
    ``keys_per_split`` is a multiple of BLOCK_N.
    """
    pid = tl.program_id(0)
    split = pid % splits
    blocks = tl.cdiv(group * Lq, BLOCK_M)
    block = pid // splits % blocks
    key_heads = heads // group
    b = (pid // splits // blocks // key_heads).to(tl.int64)
    key_head = (pid // splits // blocks % key_heads).to(tl.int64)
    n, shift = sequence(key_lengths, b, Lq, Lk, LOWER_RIGHT)
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = packed < group * Lq
    packed = tl.minimum(packed, group * Lq - 1)  # the rows past the last repeat it
    rows = packed % Lq
    h = key_head * group + packed // Lq
    d = tl.arange(0, BLOCK_D)
    q_rows = query + b * stride_qb + h * stride_qh + rows.to(tl.int64) * stride_qm
    q = tl.load(q_rows[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    key += b * stride_kb + key_head * stride_kh
    value += b * stride_vb + key_head * stride_vh
    if mask is not None:
        mask += (b * stride_mask_b + h * stride_mask_h)[:, None]
    if bias is not None:
        bias += (b * stride_bias_b + h * stride_bias_h)[:, None]
    low, begin, _, _, end = key_tiles(0, Lq - 1, n, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    first = tl.maximum(begin, split * keys_per_split)
    last = tl.minimum(end, (split + 1) * keys_per_split)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for column0 in tl.range(first, last, BLOCK_N):
        column0 = tl.multiple_of(column0, BLOCK_N)
        columns = column0 + tl.arange(0, BLOCK_N)
        k = load_rows(key, column0, stride_kn, n, D, BLOCK_N, BLOCK_D, True)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale
        s = masked_scores(
            s,
            rows[:, None],
            columns[None, :],
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
            True,
            HAS_LEFT,
            HAS_RIGHT,
        )
        p, alpha, m = softmax_step(s, m, scale, True, False)
        total = total * alpha + tl.sum(p, 1)
        v = load_rows(value, column0, stride_vn, end, DV, BLOCK_N, BLOCK_DV, True)
        if mask is not None or bias is not None:
            seen = tl.max(s, 0) > float("-inf")
            v = tl.where(seen[:, None], v, tl.zeros_like(v))
        elif HAS_LEFT:
            v = without_unseen(v, column0, low, end, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    all_rows = tl.num_programs(0).to(tl.int64) // splits // blocks * group * Lq  # B * Hq * Lq
    at = split * all_rows + (b * heads + h) * Lq + rows
    tl.store(part_sum + at, total, mask=inside)
    tl.store(part_max + at, m, mask=inside)
    dv = tl.arange(0, BLOCK_DV)
    tl.store(part_out + at[:, None] * DV + dv[None, :], acc, mask=inside[:, None] & (dv < DV)[None, :])


@triton.jit
def combine_parts(
    part_out,
    part_sum,
    part_max,
    out,
    lse,
    stride_ob,
    stride_oh,
    stride_om,
    Lq,
    heads,
    splits,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program: one row of the output, from its parts in the order of the splits."""
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
    empty = total == 0.0
    whole = tl.where(empty, 1.0, total)
    tl.store(lse + row, tl.where(empty, float("-inf"), (m + tl.math.log2(whole)) * LN_2))
    i = row % Lq
    h = row // Lq % heads
    b = row // Lq // heads
    out += b * stride_ob + h * stride_oh + i * stride_om
    tl.store(out + dv, (acc / whole).to(out.dtype.element_ty), mask=dv < DV)
