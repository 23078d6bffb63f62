"""The attention weights, recomputed from the saved lse; their mean over the heads without storing them all."""

import triton
import triton.language as tl

from .backward import probabilities
from .masks import LOG2_E, dropout_keep, sequence
from .tiles import load_rows


@triton.jit
def attention_weights(
    query,
    key,
    lse,
    weights,
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
    threshold,
    keep_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    LOWER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    AVERAGE: tl.constexpr,
):
    """One program: one tile of [B, Lq, Lk] (AVERAGE, the mean over the heads) or of [B, Hq, Lq, Lk]."""
    blocks_n = tl.cdiv(Lk, BLOCK_N)
    blocks_m = tl.cdiv(Lq, BLOCK_M)
    pid = tl.program_id(0)
    column0 = pid % blocks_n * BLOCK_N
    row0 = pid // blocks_n % blocks_m * BLOCK_M
    slab = pid // blocks_n // blocks_m
    if AVERAGE:
        b, first, last = slab, 0, heads
    else:
        b, first, last = slab // heads, slab % heads, slab % heads + 1
    n, shift = sequence(key_lengths, b, Lq, Lk, LOWER_RIGHT)
    rows = row0 + tl.arange(0, BLOCK_M)
    columns = column0 + tl.arange(0, BLOCK_N)
    b64 = b.to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for h in tl.range(first, last):
        h64 = tl.cast(h, tl.int64)
        head = b * heads + h
        q = load_rows(query + b64 * stride_qb + h64 * stride_qh, row0, stride_qm, Lq, D, BLOCK_M, BLOCK_D, True)
        k_head = key + b64 * stride_kb + (h64 // group) * stride_kh
        k = load_rows(k_head, column0, stride_kn, n, D, BLOCK_N, BLOCK_D, True)
        natural = tl.load(lse + (b64 * heads + h) * Lq + rows, mask=rows < Lq, other=float("-inf"))
        log2_lse = tl.where(natural == float("-inf"), float("inf"), natural * LOG2_E)
        mask_head = mask
        if mask is not None:
            mask_head = mask + b64 * stride_mask_b + h64 * stride_mask_h
        bias_head = bias
        if bias is not None:
            bias_head = bias + b64 * stride_bias_b + h64 * stride_bias_h
        p = probabilities(
            tl.dot(q, k.T, input_precision=PRECISION),
            log2_lse[:, None],
            rows[:, None],
            columns[None, :],
            n,
            shift,
            left,
            right,
            Lq,
            scale,
            mask_head,
            stride_mask_m,
            stride_mask_n,
            bias_head,
            stride_bias_m,
            stride_bias_n,
            True,
            HAS_LEFT,
            HAS_RIGHT,
        )
        if rng_state is not None:
            keep = dropout_keep(rng_state, threshold, head, row0, column0, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p * keep_scale, 0.0)
        total += p
    if AVERAGE:
        total = total / heads
    offset = slab.to(tl.int64) * Lq * Lk + rows[:, None].to(tl.int64) * Lk + columns[None, :]
    tl.store(weights + offset, total, mask=(rows < Lq)[:, None] & (columns < Lk)[None, :])
