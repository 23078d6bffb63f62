"""Gradients of keys and values on Hopper: FlashAttention-2's key-parallel pass, warp-specialised.

A program owns 128 keys, 64 per consumer warpgroup, with dK and dV in registers; one producer warp streams the
queries and output gradients that see them, of every query head of the group.  Everything is transposed (keys are rows),
so that P' and dS' leave their softmax in the register layout that wgmma takes as its left operand::

    S' = K Q'     dP' = V dO'     P' = exp2(scale S' - lse)     dV += P' dO     dS' = P' (dP' - delta)     dK += dS' Q

The two warpgroups share the tensor cores: one's elementwise work runs under the other's products.
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

from .band import mask_keys, position_offset, sequence_length
from .primitives import hold_order, new_barriers, tma_load, tma_store
from .schedule import locate_tile, queries_of_keys, tile_of_round, tile_of_turn, tiles_of_program


@gluon.jit
def work_item(round_, lengths, sizes, KEYS: gl.constexpr, OPTIONS: gl.constexpr):
    """The block of KEYS keys of this program's round: (first key, batch, key head, key length, position offset, first
    query tile, query tiles per head)."""
    Lq, Lk, left, right, Hkv, group, blocks, heads, section = sizes
    tile = tile_of_round(round_, gl.program_id(0), gl.num_programs(0))
    block, batch_head = locate_tile(tile, blocks, heads, section, False, OPTIONS.heads_inner)
    first = block * KEYS
    batch = batch_head // Hkv
    length = sequence_length(lengths, batch, Lk, OPTIONS)
    offset = position_offset(Lq, length, OPTIONS)
    low, count = queries_of_keys(
        first, (Lq, offset, left, right), length, OPTIONS.block_m, KEYS, OPTIONS.has_left, OPTIONS.has_right
    )
    return first, batch, batch_head % Hkv, length, offset, low, count


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr, descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr
):
    """A warpgroup: 64 keys of every work tile."""
    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dk_desc, dv_desc = descriptors
    k_tiles, v_tiles, dk_tiles, dv_tiles, kv_full, kv_empty = kv_bufs
    q_tiles, do_tiles, lse_tiles, delta_tiles, q_full, do_full, empty = ring
    Lq, Lk, left, right, Hkv, group, blocks, heads, section = sizes
    M: gl.constexpr = OPTIONS.block_m
    D: gl.constexpr = OPTIONS.head_dim
    STAGES: gl.constexpr = OPTIONS.stages
    dtype: gl.constexpr = k_tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    k_tile = k_tiles.index(CONSUMER).reshape((64, D))
    v_tile = v_tiles.index(CONSUMER).reshape((64, D))
    s_zero = gl.zeros([64, M], gl.float32, s_layout)
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, low, count = work_item(round_, lengths, sizes, 128, OPTIONS)
        key = first + 64 * CONSUMER + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        mbarrier.wait(kv_full.index(CONSUMER), round_ & 1)
        dk = gl.zeros([64, D], gl.float32, d_layout)
        dv = gl.zeros([64, D], gl.float32, d_layout)
        m = 0
        for i in range(0, count * group):
            load = loads + i
            stage = load % STAGES
            parity = (load // STAGES) & 1
            q_tile = q_tiles.index(stage).reshape((M, D))
            do_tile = do_tiles.index(stage).reshape((M, D))
            mbarrier.wait(q_full.index(stage), parity)
            s_token = warpgroup_mma(k_tile, q_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(stage), parity)
            dp_token = warpgroup_mma(v_tile, do_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            start = (low + m) * M
            m = gl.where(m + 1 == count, 0, m + 1)
            s = mask_keys(s, start, first, offset, key, left, right, 128, OPTIONS, s_layout)
            p = gl.exp2(s * scale_log2 - lse_tiles.index(stage).load(s_layout))
            hold_order(do_full.index(stage), parity)
            dp = warpgroup_mma_wait(0, deps=[dp_token])
            dv_token = warpgroup_mma(gl.convert_layout(p.to(dtype), a_layout), do_tile, dv, is_async=True)
            ds = p * (dp - delta_tiles.index(stage).load(s_layout))
            dk_token = warpgroup_mma(gl.convert_layout(ds.to(dtype), a_layout), q_tile, dk, is_async=True)
            dk, dv = warpgroup_mma_wait(0, deps=[dk_token, dv_token])
            mbarrier.arrive(empty.index(stage), count=1)
        loads += count * group
        if OPTIONS.own_out:
            mbarrier.arrive(kv_empty.index(CONSUMER), count=1)
        real = gl.convert_layout(key, gl.SliceLayout(1, d_layout)) < length
        dk = gl.where(real[:, None], dk * scale, 0.0)
        dv = gl.where(real[:, None], dv, 0.0)
        tma.store_wait(0)
        dk_tile = dk_tiles.index(CONSUMER)
        dv_tile = dv_tiles.index(CONSUMER)
        dk_tile.reshape((64, D)).store(dk.to(dtype))
        dv_tile.reshape((64, D)).store(dv.to(dtype))
        fence_async_shared()
        tma_store(dk_desc, [batch, head, first + 64 * CONSUMER, 0], dk_tile)
        tma_store(dv_desc, [batch, head, first + 64 * CONSUMER, 0], dv_tile)
        if not OPTIONS.own_out:
            tma.store_wait(0)
            mbarrier.arrive(kv_empty.index(CONSUMER), count=1)
    tma.store_wait(0)


@gluon.jit
def consumer_1(descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr):
    consumer(1, descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS)


@gluon.jit
def stream_queries(
    loads, batch, head, low, count, shift, descriptors, ring, heads, FROM_LAST: gl.constexpr, OPTIONS: gl.constexpr
):
    """A producer's: the ``count`` query tiles from ``low`` of every query head of a key head, through the ring.

    ``descriptors``: of queries, dO, lse and delta; ``heads`` = (Hkv, group); ``loads``, the tiles loaded before, gives
    stage and parity; ``shift`` and FROM_LAST as in :func:`.schedule.tile_of_turn`.  Returns ``loads`` for the next.
    """
    q_desc, do_desc, lse_desc, delta_desc = descriptors
    q_tiles, do_tiles, lse_tiles, delta_tiles, q_full, do_full, empty = ring
    Hkv, group = heads
    for member in range(0, group):
        query_head = head * group + member
        row = batch * Hkv * group + query_head
        for turn in range(0, count):
            start = (low + tile_of_turn(turn, count, shift, FROM_LAST)) * OPTIONS.block_m
            stage = loads % OPTIONS.stages
            mbarrier.wait(empty.index(stage), ((loads // OPTIONS.stages) & 1) ^ 1)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
            tma_load(q_desc, [batch, query_head, start, 0], q_full.index(stage), q_tiles.index(stage))
            tma_load(lse_desc, [row, start], q_full.index(stage), lse_tiles.index(stage))
            mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
            tma_load(do_desc, [batch, query_head, start, 0], do_full.index(stage), do_tiles.index(stage))
            tma_load(delta_desc, [row, start], do_full.index(stage), delta_tiles.index(stage))
            loads += 1
    return loads


@gluon.jit
def producer(descriptors, kv_bufs, ring, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr):
    """One warp: K and V of every work tile, then the queries that see them through the ring."""
    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dk_desc, dv_desc = descriptors
    k_tiles, v_tiles, dk_tiles, dv_tiles, kv_full, kv_empty = kv_bufs
    Lq, Lk, left, right, Hkv, group, blocks, heads, section = sizes
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, low, count = work_item(round_, lengths, sizes, 128, OPTIONS)
        for c in gl.static_range(2):
            mbarrier.wait(kv_empty.index(c), (round_ & 1) ^ 1)
            mbarrier.expect(kv_full.index(c), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            tma_load(k_desc, [batch, head, first + 64 * c, 0], kv_full.index(c), k_tiles.index(c))
            tma_load(v_desc, [batch, head, first + 64 * c, 0], kv_full.index(c), v_tiles.index(c))
        stream = (q_desc, do_desc, lse_desc, delta_desc)
        loads = stream_queries(loads, batch, head, low, count, 0, stream, ring, (Hkv, group), False, OPTIONS)


@gluon.jit(do_not_specialize=["Lq", "Lk", "left", "right", "Hkv", "group", "blocks", "heads", "section"])
def gradients_of_keys(
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
    """Grid: any number of programs; they share the ``blocks * heads`` work tiles of 128 keys.

    q_desc, do_desc: [B, Hq, Lq, D] in boxes of block_m rows; lse_desc, delta_desc: fp32 [B * Hq, Lq rounded up], boxes
    [1, block_m], with lse in base 2 and +inf where a row sees nothing or does not exist; k_desc, v_desc, dk_desc,
    dv_desc: [B, Hkv, Lk, D] in boxes of 64 rows; ``heads`` = B * Hkv; the rest as in the forward.
    OPTIONS is a :class:`.plan.KeysOptions`.
    """
    dtype: gl.constexpr = q_desc.dtype
    M: gl.constexpr = OPTIONS.block_m
    D: gl.constexpr = OPTIONS.head_dim
    STAGES: gl.constexpr = OPTIONS.stages
    k_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], v_desc.layout)
    dk_tiles = k_tiles
    dv_tiles = v_tiles
    if OPTIONS.own_out:
        dk_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], dk_desc.layout)
        dv_tiles = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], dv_desc.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, D], q_desc.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, D], do_desc.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], lse_desc.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], delta_desc.layout)
    kv_full = new_barriers(2, 1)
    kv_empty = new_barriers(2, 1)
    q_full = new_barriers(STAGES, 1)
    do_full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    fence_async_shared()
    descriptors = (q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dk_desc, dv_desc)
    kv_bufs = (k_tiles, v_tiles, dk_tiles, dv_tiles, kv_full, kv_empty)
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
