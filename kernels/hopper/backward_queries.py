"""Gradients of queries on Hopper: the forward's sweep over the keys, with the softmax recomputed from lse.

A program owns 128 queries, 64 per consumer warpgroup, with dQ in registers; one producer warp streams K and V::

    S = Q K'     dP = dO V'     P = exp2(scale S - lse)     dS = P (dP - delta)     dQ += dS K

A second sweep costs two products of seven more than adding dQ's parts across programs, and needs no atomics and
no order between programs: the result is deterministic.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .band import mask_scores, query_item, zero_tail
from .primitives import hold_order, new_barriers, tma_load, tma_store
from .schedule import key_tile, tiles_of_program


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr,
    descriptors,
    q_bufs,
    ring,
    lse_ptr,
    delta_ptr,
    lengths,
    scale,
    scale_log2,
    sizes,
    padded,
    OPTIONS: gl.constexpr,
):
    """A warpgroup: 64 queries of every work tile."""
    q_desc, do_desc, k_desc, v_desc, dq_desc = descriptors
    q_tiles, do_tiles, dq_tiles, q_full, q_empty = q_bufs
    k_tiles, v_tiles, k_full, v_full, empty = ring
    Lq, Lk, left, right, Hq, group, blocks, heads, section = sizes
    N: gl.constexpr = OPTIONS.block_n
    D: gl.constexpr = OPTIONS.head_dim
    STAGES: gl.constexpr = OPTIONS.stages
    dtype: gl.constexpr = q_tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    q_tile = q_tiles.index(CONSUMER).reshape((64, D))
    do_tile = do_tiles.index(CONSUMER).reshape((64, D))
    s_zero = gl.zeros([64, N], gl.float32, s_layout)
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, keys = query_item(round_, lengths, sizes, 128, OPTIONS)
        count, edge, low, low_edge, high = keys
        row = first + 64 * CONSUMER + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        row_low = row + (offset - left)
        row_high = gl.zeros([64], gl.int32, gl.SliceLayout(1, s_layout)) + length
        if OPTIONS.has_right:
            row_high = gl.minimum(row_high, row + (offset + right + 1))
        statistics = (batch * Hq + head) * padded + row
        lse = gl.load(lse_ptr + statistics)
        delta = gl.load(delta_ptr + statistics)
        mbarrier.wait(q_full.index(CONSUMER), round_ & 1)
        dq = gl.zeros([64, D], gl.float32, d_layout)
        for i in range(0, count):
            load = loads + i
            stage = load % STAGES
            parity = (load // STAGES) & 1
            start = key_tile(i, edge, low, low_edge, high) * N
            k_tile = k_tiles.index(stage).reshape((N, D))
            mbarrier.wait(k_full.index(stage), parity)
            if OPTIONS.key_lengths:  # noqa: SIM102 - a compile-time and a run-time condition
                if (i == 0) & (length < gl.minimum(high * N, Lk)):
                    zero_tail(k_tile, length - start, CONSUMER, 2)
            s_token = warpgroup_mma(q_tile, k_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), parity)
            v_tile = v_tiles.index(stage).reshape((N, D))
            dp_token = warpgroup_mma(do_tile, v_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            cut = i <= edge + low_edge
            if cut:
                s = mask_scores(s, row_low - start, row_high - start, OPTIONS.has_left, True, s_layout)
            p = gl.exp2(s * scale_log2 - lse[:, None])
            hold_order(v_full.index(stage), parity)
            dp = warpgroup_mma_wait(0, deps=[dp_token])
            ds = p * (dp - delta[:, None])
            if OPTIONS.key_lengths:
                ds = gl.where(p == 0.0, 0.0, ds)  # dP of a padded value may be NaN
            dq_token = warpgroup_mma(gl.convert_layout(ds.to(dtype), a_layout), k_tile, dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=[dq_token])
            mbarrier.arrive(empty.index(stage), count=1)
        loads += count
        if OPTIONS.own_out:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        tma.store_wait(0)
        dq_tile = dq_tiles.index(CONSUMER)
        dq_tile.reshape((64, D)).store((dq * scale).to(dtype))
        fence_async_shared()
        tma_store(dq_desc, [batch, head, first + 64 * CONSUMER, 0], dq_tile)
        if not OPTIONS.own_out:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
    tma.store_wait(0)


@gluon.jit
def consumer_1(
    descriptors, q_bufs, ring, lse_ptr, delta_ptr, lengths, scale, scale_log2, sizes, padded, OPTIONS: gl.constexpr
):
    consumer(1, descriptors, q_bufs, ring, lse_ptr, delta_ptr, lengths, scale, scale_log2, sizes, padded, OPTIONS)


@gluon.jit
def producer(
    descriptors, q_bufs, ring, lse_ptr, delta_ptr, lengths, scale, scale_log2, sizes, padded, OPTIONS: gl.constexpr
):
    """One warp: Q and dO of every work tile, then its K and V through the ring."""
    q_desc, do_desc, k_desc, v_desc, dq_desc = descriptors
    q_tiles, do_tiles, dq_tiles, q_full, q_empty = q_bufs
    k_tiles, v_tiles, k_full, v_full, empty = ring
    Lq, Lk, left, right, Hq, group, blocks, heads, section = sizes
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, keys = query_item(round_, lengths, sizes, 128, OPTIONS)
        count, edge, low, low_edge, high = keys
        for c in gl.static_range(2):
            mbarrier.wait(q_empty.index(c), (round_ & 1) ^ 1)
            mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
            tma_load(q_desc, [batch, head, first + 64 * c, 0], q_full.index(c), q_tiles.index(c))
            tma_load(do_desc, [batch, head, first + 64 * c, 0], q_full.index(c), do_tiles.index(c))
        for i in range(0, count):
            start = key_tile(i, edge, low, low_edge, high) * OPTIONS.block_n
            stage = loads % OPTIONS.stages
            mbarrier.wait(empty.index(stage), ((loads // OPTIONS.stages) & 1) ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [batch, head // group, start, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [batch, head // group, start, 0], v_full.index(stage), v_tiles.index(stage))
            loads += 1


@gluon.jit(do_not_specialize=["Lq", "Lk", "left", "right", "Hq", "group", "blocks", "heads", "section", "padded"])
def gradients_of_queries(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    dq_desc,
    lse_ptr,
    delta_ptr,
    lengths,
    scale,
    scale_log2,
    Lq,
    Lk,
    left,
    right,
    Hq,
    group,
    blocks,
    heads,
    section,
    padded,
    OPTIONS: gl.constexpr,
):
    """Grid: any number of programs; they share the ``blocks * heads`` work tiles of 128 queries.

    q_desc, do_desc, dq_desc: [B, Hq, Lq, D] in boxes of 64 rows; k_desc, v_desc: [B, Hkv, Lk, D] in boxes of block_n
    rows; lse_ptr, delta_ptr: fp32 [B * Hq, padded], as in :func:`.backward_keys.gradients_of_keys`; the rest as in
    the forward.  OPTIONS is a :class:`.plan.QueriesOptions`.
    """
    dtype: gl.constexpr = q_desc.dtype
    N: gl.constexpr = OPTIONS.block_n
    D: gl.constexpr = OPTIONS.head_dim
    STAGES: gl.constexpr = OPTIONS.stages
    q_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], q_desc.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], do_desc.layout)
    dq_tiles = q_tiles
    if OPTIONS.own_out:
        dq_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], dq_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, D], v_desc.layout)
    q_full = new_barriers(2, 1)
    q_empty = new_barriers(2, 1)
    k_full = new_barriers(STAGES, 1)
    v_full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    fence_async_shared()
    descriptors = (q_desc, do_desc, k_desc, v_desc, dq_desc)
    q_bufs = (q_tiles, do_tiles, dq_tiles, q_full, q_empty)
    ring = (k_tiles, v_tiles, k_full, v_full, empty)
    sizes = (Lq, Lk, left, right, Hq, group, blocks, heads, section)
    gl.warp_specialize(
        [
            (
                consumer,
                (0, descriptors, q_bufs, ring, lse_ptr, delta_ptr, lengths, scale, scale_log2, sizes, padded, OPTIONS),
            ),
            (
                consumer_1,
                (descriptors, q_bufs, ring, lse_ptr, delta_ptr, lengths, scale, scale_log2, sizes, padded, OPTIONS),
            ),
            (
                producer,
                (descriptors, q_bufs, ring, lse_ptr, delta_ptr, lengths, scale, scale_log2, sizes, padded, OPTIONS),
            ),
        ],
        [4, 1],
        [240, 24],
    )
