"""Gradients of keys and values on Hopper in tiles of 256 columns, where dK and dV do not fit in a thread's registers.

As in backward_keys.py everything is transposed and a producer warp streams the queries that see a block of keys, here
of 64: one consumer warpgroup accumulates dV, the other dK, and both compute the scores::

    first     S' = K Q'                  P' = exp2(scale S' - lse)    dV += P' dO
    second    S' = K Q'    dP' = V dO'   dS' = P' (dP' - delta)       dK += dS' Q

Five products per tile instead of four, and nothing to exchange between the warpgroups.
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

from .backward_keys import stream_queries, work_item
from .band import mask_keys
from .primitives import hold_order, new_barriers, tma_load, tma_store
from .schedule import tiles_of_program


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr, descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr
):
    """The warpgroup of dV (CONSUMER 0) or of dK (1): the 64 keys of every work tile."""
    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dk_desc, dv_desc = descriptors
    k_tiles, v_tiles, dv_tiles, kv_full, kv_empty = kv_bufs
    q_tiles, do_tiles, lse_tiles, delta_tiles, q_full, do_full, empty = ring
    Lq, Lk, left, right, Hkv, group, blocks, heads, section = sizes
    M: gl.constexpr = OPTIONS.block_m
    D: gl.constexpr = OPTIONS.head_dim
    STAGES: gl.constexpr = OPTIONS.stages
    dtype: gl.constexpr = k_tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    k_tile = k_tiles.reshape((64, D))
    v_tile = v_tiles.reshape((64, D))
    s_zero = gl.zeros([64, M], gl.float32, s_layout)
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, low, count = work_item(round_, lengths, sizes, 64, OPTIONS)
        key = first + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        mbarrier.wait(kv_full, round_ & 1)
        gradient = gl.zeros([64, D], gl.float32, d_layout)
        m = 0
        for i in range(0, count * group):
            load = loads + i
            stage = load % STAGES
            parity = (load // STAGES) & 1
            start = (low + m) * M
            m = gl.where(m + 1 == count, 0, m + 1)
            q_tile = q_tiles.index(stage).reshape((M, D))
            do_tile = do_tiles.index(stage).reshape((M, D))
            mbarrier.wait(q_full.index(stage), parity)
            s_token = warpgroup_mma(k_tile, q_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(stage), parity)
            if CONSUMER == 0:
                s = warpgroup_mma_wait(0, deps=[s_token])
                s = mask_keys(s, start, first, offset, key, left, right, 64, OPTIONS, s_layout)
                p = gl.exp2(s * scale_log2 - lse_tiles.index(stage).load(s_layout))
                token = warpgroup_mma(gl.convert_layout(p.to(dtype), a_layout), do_tile, gradient, is_async=True)
            else:
                dp_token = warpgroup_mma(v_tile, do_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s_token])
                s = mask_keys(s, start, first, offset, key, left, right, 64, OPTIONS, s_layout)
                p = gl.exp2(s * scale_log2 - lse_tiles.index(stage).load(s_layout))
                hold_order(do_full.index(stage), parity)
                dp = warpgroup_mma_wait(0, deps=[dp_token])
                ds = p * (dp - delta_tiles.index(stage).load(s_layout))
                token = warpgroup_mma(gl.convert_layout(ds.to(dtype), a_layout), q_tile, gradient, is_async=True)
            gradient = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(empty.index(stage), count=1)
        loads += count * group
        real = gl.convert_layout(key, gl.SliceLayout(1, d_layout)) < length
        if CONSUMER == 0:
            mbarrier.arrive(kv_empty, count=1)
            tma.store_wait(0)
            dv_tiles.reshape((64, D)).store(gl.where(real[:, None], gradient, 0.0).to(dtype))
            fence_async_shared()
            tma_store(dv_desc, [batch, head, first, 0], dv_tiles)
        else:  # V, which only this warpgroup reads, makes room for dK
            v_tile.store(gl.where(real[:, None], gradient * scale, 0.0).to(dtype))
            fence_async_shared()
            tma_store(dk_desc, [batch, head, first, 0], v_tiles)
            tma.store_wait(0)
            mbarrier.arrive(kv_empty, count=1)
    tma.store_wait(0)


@gluon.jit
def consumer_1(descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr):
    consumer(1, descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS)


@gluon.jit
def producer(descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr):
    """One warp: K and V of every work tile, then the queries that see them through the ring."""
    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dk_desc, dv_desc = descriptors
    k_tiles, v_tiles, dv_tiles, kv_full, kv_empty = kv_bufs
    Lq, Lk, left, right, Hkv, group, blocks, heads, section = sizes
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, low, count = work_item(round_, lengths, sizes, 64, OPTIONS)
        mbarrier.wait(kv_empty, (round_ & 1) ^ 1)
        mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma_load(k_desc, [batch, head, first, 0], kv_full, k_tiles)
        tma_load(v_desc, [batch, head, first, 0], kv_full, v_tiles)
        stream = (q_desc, do_desc, lse_desc, delta_desc)
        loads = stream_queries(loads, batch, head, low, count, 0, stream, ring, (Hkv, group), False, OPTIONS)


@gluon.jit(do_not_specialize=["Lq", "Lk", "left", "right", "Hkv", "group", "blocks", "heads", "section"])
def gradients_of_wide_keys(
    q_desc,
    do_desc,
    lse_desc,
    delta_desc,
    k_desc,
    v_desc,
    dk_desc,
    dv_desc,
    lengths,
    scale,
    scale_log2,
    Lq,
    Lk,
    left,
    right,
    Hkv,
    group,
    blocks,
    heads,
    section,
    OPTIONS: gl.constexpr,
):
    """Grid: any number of programs; they share the ``blocks * heads`` work tiles of 64 keys.

    Arguments as in :func:`.backward_keys.gradients_of_keys`.
    """
    dtype: gl.constexpr = q_desc.dtype
    M: gl.constexpr = OPTIONS.block_m
    D: gl.constexpr = OPTIONS.head_dim
    STAGES: gl.constexpr = OPTIONS.stages
    k_tiles = gl.allocate_shared_memory(dtype, [1, 1, 64, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [1, 1, 64, D], v_desc.layout)
    dv_tiles = gl.allocate_shared_memory(dtype, [1, 1, 64, D], dv_desc.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, D], q_desc.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, D], do_desc.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], lse_desc.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], delta_desc.layout)
    kv_full = new_barriers(1, 1).index(0)
    kv_empty = new_barriers(1, 2).index(0)
    q_full = new_barriers(STAGES, 1)
    do_full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    fence_async_shared()
    descriptors = (q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dk_desc, dv_desc)
    kv_bufs = (k_tiles, v_tiles, dv_tiles, kv_full, kv_empty)
    ring = (q_tiles, do_tiles, lse_tiles, delta_tiles, q_full, do_full, empty)
    sizes = (Lq, Lk, left, right, Hkv, group, blocks, heads, section)
    gl.warp_specialize(
        [
            (consumer, (0, descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS)),
            (consumer_1, (descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS)),
            (producer, (descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS)),
        ],
        [4, 1],
        [240, 24],
    )
