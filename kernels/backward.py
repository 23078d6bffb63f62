"""Backward: dK and dV over key blocks, dQ over query blocks, no atomics (Dao 2023, arXiv:2307.08691, algorithm 2).

P is recomputed from the saved lse.  With delta = rowsum(dO * O) - d lse, dS = P * (dP - delta).
"""

import triton
import triton.language as tl

from .masks import LOG2_E, dropout_keep, key_tiles, masked_scores, query_tiles, sequence, without_unseen
from .tiles import deal, load_rows, store_rows


@triton.jit
def row_statistics(
    out,
    lse,
    grad_out,
    grad_lse,
    log2_lse,
    delta,
    stride_ob,
    stride_oh,
    stride_om,
    stride_dob,
    stride_doh,
    stride_dom,
    Lq,
    heads,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta [B, Hq, Lq] = rowsum(dO * O) - d lse, and the lse in log2 units, +inf (all P are 0) without keys."""
    blocks = tl.cdiv(Lq, BLOCK_M)
    row0 = tl.program_id(0) % blocks * BLOCK_M
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // heads, head % heads
    o = load_rows(out + b * stride_ob + h * stride_oh, row0, stride_om, Lq, DV, BLOCK_M, BLOCK_DV, True)
    do = load_rows(grad_out + b * stride_dob + h * stride_doh, row0, stride_dom, Lq, DV, BLOCK_M, BLOCK_DV, True)
    rows = row0 + tl.arange(0, BLOCK_M)
    inside = rows < Lq
    result = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        result -= tl.load(grad_lse + head * Lq + rows, mask=inside, other=0.0)
    tl.store(delta + head * Lq + rows, result, mask=inside)
    natural = tl.load(lse + head * Lq + rows, mask=inside, other=0.0)
    log2 = tl.where(natural == float("-inf"), float("inf"), natural * LOG2_E)
    tl.store(log2_lse + head * Lq + rows, log2, mask=inside)


@triton.jit
def load_statistics(log2_lse, delta, base, row0, Lq, BLOCK_M: tl.constexpr, RAGGED: tl.constexpr):
    """(lse in log2 units, delta) of BLOCK_M rows; +inf and 0 past the last."""
    rows = row0 + tl.arange(0, BLOCK_M)
    if RAGGED:
        lse = tl.load(log2_lse + base + rows, mask=rows < Lq, other=float("inf"))
        return lse, tl.load(delta + base + rows, mask=rows < Lq, other=0.0)
    return tl.load(log2_lse + base + rows), tl.load(delta + base + rows)


@triton.jit
def probabilities(
    s,
    log2_lse,
    rows,
    columns,
    n,
    shift,
    left,
    right,
    Lq,
    scale,
    mask,
    stride_mask_m,
    stride_mask_n,
    bias,
    stride_bias_m,
    stride_bias_n,
    BAND: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """P = exp(S - lse) of a tile in either orientation; ``log2_lse``, rows and columns broadcast to it."""
    s = masked_scores(
        s * scale,
        rows,
        columns,
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
    p = tl.math.exp2(s - log2_lse)
    if BAND or mask is not None or bias is not None:
        p = tl.where(s == float("-inf"), 0.0, p)  # also where the lse is a NaN's
    return p


@triton.jit
def grad_scores(p, dp, delta, keep, keep_scale, DROPOUT: tl.constexpr, MASKED: tl.constexpr):
    """dS = P * (dropped dP - delta); where a mask made P 0, dS is 0 even if dP is NaN."""
    if DROPOUT:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(p == 0.0, 0.0, ds)
    return ds


@triton.jit
def key_value_tiles(
    dk,
    dv,
    k,
    v,
    query,
    grad_out,
    log2_lse,
    delta,
    first,
    last,
    key0,
    b,
    h,
    head,
    n,
    shift,
    left,
    right,
    Lq,
    scale,
    keep_scale,
    stride_qm,
    stride_dom,
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
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add the queries from ``first`` up to ``last`` of one head to dK and dV; all tiles are [BLOCK_N, BLOCK_M]."""
    columns = key0 + tl.arange(0, BLOCK_N)
    base = tl.cast(head, tl.int64) * Lq
    for row0 in tl.range(first, last, BLOCK_M):
        row0 = tl.multiple_of(row0, BLOCK_M)
        rows = row0 + tl.arange(0, BLOCK_M)
        if TMA:
            q = query.load([b, h, row0, 0]).reshape(BLOCK_M, BLOCK_D)
        else:
            q = load_rows(query, row0, stride_qm, Lq, D, BLOCK_M, BLOCK_D, BAND)
        lse, d = load_statistics(log2_lse, delta, base, row0, Lq, BLOCK_M, BAND)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        p = probabilities(
            s,
            lse[None, :],
            rows[None, :],
            columns[:, None],
            n,
            shift,
            left,
            right,
            Lq,
            scale,
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
        if TMA:
            do = grad_out.load([b, h, row0, 0]).reshape(BLOCK_M, BLOCK_DV)
        else:
            do = load_rows(grad_out, row0, stride_dom, Lq, DV, BLOCK_M, BLOCK_DV, BAND)
        keep = True
        kept = p
        if rng_state is not None:
            keep = dropout_keep(rng_state, threshold, head, row0, key0, BLOCK_M, BLOCK_N).T
            kept = tl.where(keep, p * keep_scale, 0.0)
        dv = tl.dot(kept.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        masked: tl.constexpr = BAND or (mask is not None) or (bias is not None)
        ds = grad_scores(p, dp, d[None, :], keep, keep_scale, rng_state is not None, masked)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def grad_key_value(
    query,
    key,
    value,
    grad_out,
    log2_lse,
    delta,
    grad_key,
    grad_value,
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
    stride_dob,
    stride_doh,
    stride_dom,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
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
    """One program: BLOCK_N keys of one key head, over all query heads of its group. ``scale`` in log2 units."""
    slab, block = deal(tl.cdiv(Lk, BLOCK_N), together)
    key0 = block * BLOCK_N  # early keys have the most causal queries: heaviest first
    key_heads = heads // group
    b = (slab // key_heads).to(tl.int64)
    key_head = (slab % key_heads).to(tl.int64)
    n, shift = sequence(key_lengths, b, Lq, Lk, LOWER_RIGHT)
    k = load_rows(key + b * stride_kb + key_head * stride_kh, key0, stride_kn, n, D, BLOCK_N, BLOCK_D, True)
    v = load_rows(value + b * stride_vb + key_head * stride_vh, key0, stride_vn, n, DV, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    key1 = key0 + BLOCK_N - 1
    begin, full_begin, full_end, end = query_tiles(key0, key1, n, shift, left, right, Lq, HAS_LEFT, HAS_RIGHT, BLOCK_M)
    for member in tl.range(0, group):
        h = key_head * group + member
        if TMA:
            q_head = query
            do_head = grad_out
        else:
            q_head = query + b * stride_qb + h * stride_qh
            do_head = grad_out + b * stride_dob + h * stride_doh
        mask_head = mask
        if mask is not None:
            mask_head = mask + b * stride_mask_b + h * stride_mask_h
        bias_head = bias
        if bias is not None:
            bias_head = bias + b * stride_bias_b + h * stride_bias_h
        for part in tl.static_range(3):
            if part == 0:
                first, last = begin, full_begin
            elif part == 1:
                first, last = full_begin, full_end
            else:
                first, last = full_end, end
            if part > 0 or HAS_RIGHT:
                dk, dv = key_value_tiles(
                    dk,
                    dv,
                    k,
                    v,
                    q_head,
                    do_head,
                    log2_lse,
                    delta,
                    first,
                    last,
                    key0,
                    b.to(tl.int32),
                    h.to(tl.int32),
                    b * heads + h,
                    n,
                    shift,
                    left,
                    right,
                    Lq,
                    scale,
                    keep_scale,
                    stride_qm,
                    stride_dom,
                    mask_head,
                    stride_mask_m,
                    stride_mask_n,
                    bias_head,
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
                    PRECISION,
                    TMA,
                )
    if grad_key is not None:
        grad_key += b * stride_dkb + key_head * stride_dkh
        store_rows(grad_key, dk * (scale / LOG2_E), key0, stride_dkn, Lk, D, BLOCK_N, BLOCK_D)
    if grad_value is not None:
        grad_value += b * stride_dvb + key_head * stride_dvh
        store_rows(grad_value, dv, key0, stride_dvn, Lk, DV, BLOCK_N, BLOCK_DV)


@triton.jit
def grad_score_tile(
    q,
    do,
    lse,
    d,
    key,
    value,
    row0,
    column0,
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
    keep_scale,
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
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """(dS [BLOCK_M, BLOCK_N], K of the tile with the rows that nobody sees zeroed)."""
    column0 = tl.multiple_of(column0, BLOCK_N)
    rows = (row0 + tl.arange(0, BLOCK_M))[:, None]
    columns = (column0 + tl.arange(0, BLOCK_N))[None, :]
    if TMA:
        k = key.load([b, key_head, column0, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        k = load_rows(key, column0, stride_kn, end, D, BLOCK_N, BLOCK_D, BAND)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    p = probabilities(
        s,
        lse[:, None],
        rows,
        columns,
        n,
        shift,
        left,
        right,
        Lq,
        scale,
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
    if TMA:
        v = value.load([b, key_head, column0, 0]).reshape(BLOCK_N, BLOCK_DV)
    else:
        v = load_rows(value, column0, stride_vn, n, DV, BLOCK_N, BLOCK_DV, BAND)
    dp = tl.dot(do, v.T, input_precision=PRECISION)
    keep = True
    if rng_state is not None:
        keep = dropout_keep(rng_state, threshold, head, row0, column0, BLOCK_M, BLOCK_N)
    masked: tl.constexpr = BAND or (mask is not None) or (bias is not None)
    ds = grad_scores(p, dp, d[:, None], keep, keep_scale, rng_state is not None, masked)
    if mask is not None or bias is not None:
        seen = tl.max(p, 0) > 0.0
        k = tl.where(seen[:, None], k, tl.zeros_like(k))
    elif BAND and (TMA or HAS_LEFT):
        k = without_unseen(k, column0, low, end, BLOCK_N)
    return ds, k


@triton.jit
def grad_query_kernel(
    query,
    key,
    value,
    grad_out,
    log2_lse,
    delta,
    grad_query,
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
    stride_dob,
    stride_doh,
    stride_dom,
    stride_dqb,
    stride_dqh,
    stride_dqm,
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
    """One program: dQ of BLOCK_M queries of one head. ``scale`` in log2 units."""
    blocks = tl.cdiv(Lq, BLOCK_M)
    head, block = deal(blocks, together)
    if HAS_RIGHT:
        block = blocks - 1 - block
    key_head = head % heads // group
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
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
    q = load_rows(query + b * stride_qb + h * stride_qh, row0, stride_qm, Lq, D, BLOCK_M, BLOCK_D, True)
    do = load_rows(grad_out + b * stride_dob + h * stride_doh, row0, stride_dom, Lq, DV, BLOCK_M, BLOCK_DV, True)
    lse, d = load_statistics(log2_lse, delta, head.to(tl.int64) * Lq, row0, Lq, BLOCK_M, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            first, last = begin, full_begin
        elif part == 1:
            first, last = full_begin, full_end
        else:
            first, last = full_end, end
        if part > 0 or HAS_LEFT:
            for column0 in tl.range(first, last, BLOCK_N):
                ds, k = grad_score_tile(
                    q,
                    do,
                    lse,
                    d,
                    key,
                    value,
                    row0,
                    column0,
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
                    keep_scale,
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
                    PRECISION,
                    TMA,
                )
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    grad_query += b * stride_dqb + h * stride_dqh
    store_rows(grad_query, dq * (scale / LOG2_E), row0, stride_dqm, Lq, D, BLOCK_M, BLOCK_D)


@triton.jit
def grad_bias_kernel(
    query,
    key,
    value,
    grad_out,
    log2_lse,
    delta,
    grad_bias,
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
    stride_dob,
    stride_doh,
    stride_dom,
    stride_mask_b,
    stride_mask_h,
    stride_mask_m,
    stride_mask_n,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    batch,
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
    SUM_B: tl.constexpr,
    SUM_H: tl.constexpr,
    SUM_M: tl.constexpr,
    SUM_N: tl.constexpr,
):
    """One program: one tile of the bias's gradient, the sum of dS over the dimensions that the bias broadcasts.

    ``grad_bias`` is contiguous [b, h, m, n] with size 1 where SUM_* is set. The program walks its batch entries,
    heads and tiles in a fixed order, so the sum is deterministic.
    """
    blocks_m = 1 if SUM_M else tl.cdiv(Lq, BLOCK_M)
    blocks_n = 1 if SUM_N else tl.cdiv(Lk, BLOCK_N)
    pid = tl.program_id(0)
    tile_n = pid % blocks_n
    tile_m = pid // blocks_n % blocks_m
    slab = pid // blocks_n // blocks_m
    kept_heads = 1 if SUM_H else heads
    b0 = 0 if SUM_B else slab // kept_heads
    h0 = 0 if SUM_H else slab % kept_heads
    b1 = batch if SUM_B else b0 + 1
    h1 = heads if SUM_H else h0 + 1
    m0 = 0 if SUM_M else tile_m * BLOCK_M
    m1 = Lq if SUM_M else tl.minimum(m0 + BLOCK_M, Lq)
    n0 = 0 if SUM_N else tile_n * BLOCK_N
    n1 = Lk if SUM_N else tl.minimum(n0 + BLOCK_N, Lk)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b_ in tl.range(b0, b1):
        b = tl.cast(b_, tl.int64)
        n, shift = sequence(key_lengths, b, Lq, Lk, LOWER_RIGHT)
        for h_ in tl.range(h0, h1):
            h = tl.cast(h_, tl.int64)
            head = b * heads + h
            mask_head = mask
            if mask is not None:
                mask_head = mask + b * stride_mask_b + h * stride_mask_h
            bias_head = bias + b * stride_bias_b + h * stride_bias_h
            for row0 in tl.range(m0, m1, BLOCK_M):
                row1 = tl.minimum(row0 + BLOCK_M, Lq) - 1
                low, begin, _, _, end = key_tiles(row0, row1, n, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
                q = load_rows(query + b * stride_qb + h * stride_qh, row0, stride_qm, Lq, D, BLOCK_M, BLOCK_D, True)
                do = load_rows(
                    grad_out + b * stride_dob + h * stride_doh, row0, stride_dom, Lq, DV, BLOCK_M, BLOCK_DV, True
                )
                lse, d = load_statistics(log2_lse, delta, head * Lq, row0, Lq, BLOCK_M, True)
                for column0 in tl.range(tl.maximum(n0, begin), tl.minimum(n1, end), BLOCK_N):
                    ds, _ = grad_score_tile(
                        q,
                        do,
                        lse,
                        d,
                        key + b * stride_kb + (h // group) * stride_kh,
                        value + b * stride_vb + (h // group) * stride_vh,
                        row0,
                        column0,
                        0,
                        0,
                        head,
                        n,
                        low,
                        end,
                        shift,
                        left,
                        right,
                        Lq,
                        scale,
                        keep_scale,
                        stride_kn,
                        stride_vn,
                        mask_head,
                        stride_mask_m,
                        stride_mask_n,
                        bias_head,
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
                        True,
                        HAS_LEFT,
                        HAS_RIGHT,
                        PRECISION,
                        False,
                    )
                    total += ds
    rows = m0 + tl.arange(0, BLOCK_M)
    columns = n0 + tl.arange(0, BLOCK_N)
    size_m = 1 if SUM_M else Lq
    size_n = 1 if SUM_N else Lk
    grad_bias += slab.to(tl.int64) * size_m * size_n
    if SUM_M and SUM_N:
        tl.store(grad_bias, tl.sum(tl.sum(total, 1), 0))
    elif SUM_M:
        tl.store(grad_bias + columns, tl.sum(total, 0), mask=columns < Lk)
    elif SUM_N:
        tl.store(grad_bias + rows, tl.sum(total, 1), mask=rows < Lq)
    else:
        offset = rows[:, None].to(tl.int64) * Lk + columns[None, :]
        tl.store(grad_bias + offset, total, mask=(rows < Lq)[:, None] & (columns < Lk)[None, :])
