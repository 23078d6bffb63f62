"""Forward: one pass over the keys with the online softmax in base 2 (Dao 2023, arXiv:2307.08691)."""

import triton
import triton.language as tl

from .masks import LN_2, dropout_keep, key_tiles, masked_scores, sequence, without_unseen
from .tiles import deal, load_rows, store_rows


@triton.jit
def softmax_step(s, m, scale, SCALED: tl.constexpr, SAFE: tl.constexpr):
    """(p, rescaling of what was summed so far, new maximum) for the scores of one more tile.

    SCALED: s is in log2 units already, else it is multiplied by ``scale`` > 0 on the way.  SAFE: no row of the
    tile can be wholly masked, so that the maximum is finite.
    """
    if SCALED:
        m_new = tl.maximum(m, tl.max(s, 1))
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
    m_used = m_new
    if not SAFE:
        m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
    if SCALED:
        p = tl.math.exp2(s - m_used[:, None])
    else:
        p = tl.math.exp2(s * scale - m_used[:, None])
    return p, tl.math.exp2(m - m_used), m_new


@triton.jit
def attend_tiles(
    acc,
    total,
    m,
    q,
    key,
    value,
    first,
    last,
    row0,
    b,
    key_head,
    head,
    n,
    low,
    end,
    shift,
    left,
    right,
    Lq,
    scale,
    stride_kn,
    stride_vn,
    mask,
    stride_mask_m,
    stride_mask_n,
    bias,
    stride_bias_m,
    stride_bias_n,
    rng_state,
    threshold,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BAND: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add the keys from ``first`` up to ``last`` to the running softmax (acc [BM, BDV], total [BM], m [BM])."""
    # only raw scores can be scaled inside the exponent's fused multiply-add
    SCALED: tl.constexpr = BAND or (mask is not None) or (bias is not None) or (not POSITIVE_SCALE)
    SAFE: tl.constexpr = not (BAND or (mask is not None) or (bias is not None))
    rows = row0 + tl.arange(0, BLOCK_M)
    for column0 in tl.range(first, last, BLOCK_N):
        column0 = tl.multiple_of(column0, BLOCK_N)
        columns = column0 + tl.arange(0, BLOCK_N)
        if TMA:
            k = key.load([b, key_head, column0, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            k = load_rows(key, column0, stride_kn, n, D, BLOCK_N, BLOCK_D, BAND)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if SCALED:
            s = s * scale
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
            BAND,
            HAS_LEFT,
            HAS_RIGHT,
        )
        p, alpha, m = softmax_step(s, m, scale, SCALED, SAFE)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if rng_state is not None:
            p = tl.where(dropout_keep(rng_state, threshold, head, row0, column0, BLOCK_M, BLOCK_N), p, 0.0)
        if TMA:
            v = value.load([b, key_head, column0, 0]).reshape(BLOCK_N, BLOCK_DV)
        else:
            v = load_rows(value, column0, stride_vn, end, DV, BLOCK_N, BLOCK_DV, BAND)
        if mask is not None or bias is not None:
            # a key that no query of the tile may see must not leak a NaN through 0 * NaN
            seen = tl.max(s, 0) > float("-inf")
            v = tl.where(seen[:, None], v, tl.zeros_like(v))
        elif BAND and (TMA or HAS_LEFT):
            v = without_unseen(v, column0, low, end, BLOCK_N)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, m


@triton.jit
def attention_forward(
    query,
    key,
    value,
    out,
    lse,
    key_lengths,
    mask,
    bias,
    rng_state,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
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
    together,
    left,
    right,
    scale,
    threshold,
    keep_scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    LOWER_RIGHT: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """One program: BLOCK_M queries of one head. ``scale`` is in log2 units (times log2 e).

    TMA: ``key`` and ``value`` are descriptors of [B, Hkv, Lk, D] in boxes of [1, 1, BLOCK_N, BLOCK_D].
    """
    blocks = tl.cdiv(Lq, BLOCK_M)
    head, block = deal(blocks, together)  # head = b * Hq + h
    if HAS_RIGHT:
        block = blocks - 1 - block  # a causal row block works the more the later it is: heaviest first
    key_head = head % heads // group
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    query += b * stride_qb + h * stride_qh
    if not TMA:
        key += b * stride_kb + key_head.to(tl.int64) * stride_kh
        value += b * stride_vb + key_head.to(tl.int64) * stride_vh
    if mask is not None:
        mask += b * stride_mask_b + h * stride_mask_h
    if bias is not None:
        bias += b * stride_bias_b + h * stride_bias_h
    n, shift = sequence(key_lengths, b, Lq, Lk, LOWER_RIGHT)
    row0 = block * BLOCK_M
    row1 = tl.minimum(row0 + BLOCK_M, Lq) - 1
    low, begin, full_begin, full_end, end = key_tiles(row0, row1, n, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)

    q = load_rows(query, row0, stride_qm, Lq, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in tl.static_range(3):
        # the border on the left, the tiles that every query sees whole, the border on the right
        if part == 0:
            first, last = begin, full_begin
        elif part == 1:
            first, last = full_begin, full_end
        else:
            first, last = full_end, end
        if part > 0 or HAS_LEFT:
            acc, total, m = attend_tiles(
                acc,
                total,
                m,
                q,
                key,
                value,
                first,
                last,
                row0,
                head // heads,
                key_head,
                head,
                n,
                low,
                end,
                shift,
                left,
                right,
                Lq,
                scale,
                stride_kn,
                stride_vn,
                mask,
                stride_mask_m,
                stride_mask_n,
                bias,
                stride_bias_m,
                stride_bias_n,
                rng_state,
                threshold,
                D,
                DV,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
                part != 1,
                HAS_LEFT,
                HAS_RIGHT,
                POSITIVE_SCALE,
                PRECISION,
                TMA,
            )
    rows = row0 + tl.arange(0, BLOCK_M)
    empty = total == 0.0
    natural = tl.where(empty, float("-inf"), (m + tl.math.log2(tl.where(empty, 1.0, total))) * LN_2)
    tl.store(lse + head.to(tl.int64) * Lq + rows, natural, mask=rows < Lq)
    acc = acc * (keep_scale / tl.where(empty, 1.0, total))[:, None]
    out += b * stride_ob + h * stride_oh
    store_rows(out, acc, row0, stride_om, Lq, DV, BLOCK_M, BLOCK_DV)
