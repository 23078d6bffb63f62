"""All three gradients in one sweep on Hopper: five products per tile instead of seven, dQ added across programs.

As in backward_keys.py a program owns 128 keys, 64 per consumer warpgroup, and streams the queries that see them.  dS'
of both warpgroups meets in shared memory, each multiplies it with one half of K's columns, and a warp of its own (the
writer) adds the result to dQ (fp32, global memory) by TMA while the consumers go on::

    dQ[:, half] = dS K[:, half]

With ``ordered`` the parts of each query tile are added in the order of their keys, by a counter per tile, so that the
result is deterministic; without, in any order, and the last bits of dQ change from run to run.  A program waits for
programs with a smaller id only, which are launched before it: it must be launched with one work tile per program.
Which keys come first and which way programs walk through their queries decides how long they wait:

- keys from the first to the last, queries from the last to the first: under a causal band, the keys that most queries
  see come first, and yet reach each tile before those that follow;
- with ``last_keys_first`` keys from the last to the first, and queries upwards from the first that sees a block: under
  a causal band each program is the first to reach its first tile, and one turn behind its predecessor at every other,
  but the longest programs come last;
- ``shifted`` (never ordered): block b of keys starts at query tile b and walks upwards, round to the tile before it, so
  that programs add to different tiles.  An order of parts that follows this walk would let the first program wait for
  the last one at the tiles where it has come round, which ends only if both run at a time: nothing promises that.

The same block of ``section`` heads comes one after the other, so that few programs of a head run at a time and the
last of them waits for few others.  With two ``writers`` one polls and adds while the other's addition is on its way.
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

from .backward_keys import stream_queries
from .band import mask_keys, position_offset, sequence_length, zero_tail
from .primitives import (
    hold_order,
    named_barrier,
    new_barriers,
    publish_stores,
    tma_load,
    tma_reduce_add,
    tma_store,
    unknown_zero,
)
from .schedule import keys_of_queries, locate_tile, queries_of_keys, tile_of_turn


@gluon.jit
def work_item(lengths, sizes, OPTIONS: gl.constexpr):
    """The block of keys of this program: (first key, batch, key head, key length, position offset, first query tile,
    query tiles per head, the shift of its walk through them)."""
    Lq, Lk, left, right, Hkv, group, blocks, heads, section = sizes
    block, batch_head = locate_tile(gl.program_id(0), blocks, heads, section, OPTIONS.last_keys_first, True)
    first = block * 128
    batch = batch_head // Hkv
    length = sequence_length(lengths, batch, Lk, OPTIONS)
    offset = position_offset(Lq, length, OPTIONS)
    low, count = queries_of_keys(
        first, (Lq, offset, left, right), length, OPTIONS.block_m, 128, OPTIONS.has_left, OPTIONS.has_right
    )
    shift = block * 0
    if OPTIONS.shifted:
        shift = block % gl.maximum(count, 1)
    return first, batch, batch_head % Hkv, length, offset, low, count, shift


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr,
    descriptors,
    kv_bufs,
    ring,
    dq_bufs,
    counters,
    lengths,
    scale,
    scale_log2,
    sizes,
    OPTIONS: gl.constexpr,
):
    """A warpgroup: 64 keys, and half of the columns of dQ."""
    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dq_desc, dk_desc, dv_desc = descriptors
    k_tiles, v_tiles, kv_full = kv_bufs
    q_tiles, do_tiles, lse_tiles, delta_tiles, q_full, do_full, empty = ring
    ds_tiles, dq_tiles, dq_full, dq_empty = dq_bufs
    Lq, Lk, left, right, Hkv, group, blocks, heads, section = sizes
    M: gl.constexpr = OPTIONS.block_m
    D: gl.constexpr = OPTIONS.head_dim
    STAGES: gl.constexpr = OPTIONS.stages
    DQ_STAGES: gl.constexpr = OPTIONS.dq_stages
    dtype: gl.constexpr = k_tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, 2)
    first, batch, head, length, offset, low, count, shift = work_item(lengths, sizes, OPTIONS)
    k_all = k_tiles.index(0).reshape((128, D))
    v_all = v_tiles.index(0).reshape((128, D))
    s_zero = gl.zeros([64, M], gl.float32, s_layout)
    dq_zero = gl.zeros([M, D // 2], gl.float32, dq_layout)
    key = first + 64 * CONSUMER + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    mbarrier.wait(kv_full, 0)
    if OPTIONS.key_lengths:  # noqa: SIM102 - a compile-time and a run-time condition
        if length < gl.minimum(first + 128, Lk):
            zero_tail(k_all, length - first, CONSUMER, 2)
            zero_tail(v_all, length - first, CONSUMER, 2)
    dk = gl.zeros([64, D], gl.float32, d_layout)
    dv = gl.zeros([64, D], gl.float32, d_layout)
    m = count if OPTIONS.from_last_query else shift - 1
    for i in range(0, count * group):
        stage = i % STAGES
        parity = (i // STAGES) & 1
        zero = unknown_zero(i)
        k_tile = k_tiles.index(zero).reshape((128, D)).slice(64 * CONSUMER, 64, dim=0)
        v_tile = v_tiles.index(zero).reshape((128, D)).slice(64 * CONSUMER, 64, dim=0)
        k_columns = k_tiles.index(zero).reshape((128, D)).slice(D // 2 * CONSUMER, D // 2, dim=1)
        q_tile = q_tiles.index(stage).reshape((M, D))
        do_tile = do_tiles.index(stage).reshape((M, D))
        mbarrier.wait(q_full.index(stage), parity)
        s_token = warpgroup_mma(k_tile, q_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(stage), parity)
        dp_token = warpgroup_mma(v_tile, do_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s_token])
        if OPTIONS.from_last_query:
            m = gl.where(m == 0, count, m) - 1
        else:
            m = gl.where(m + 1 == count, 0, m + 1)
        start = (low + m) * M
        s = mask_keys(s, start, first, offset, key, left, right, 128, OPTIONS, s_layout)
        p = gl.exp2(s * scale_log2 - lse_tiles.index(stage).load(s_layout))
        hold_order(do_full.index(stage), parity)
        dp = warpgroup_mma_wait(0, deps=[dp_token])
        dv_token = warpgroup_mma(gl.convert_layout(p.to(dtype), a_layout), do_tile, dv, is_async=True)
        ds = (p * (dp - delta_tiles.index(stage).load(s_layout))).to(dtype)
        ds_tile = ds_tiles.index(i % 2)
        ds_tile.slice(64 * CONSUMER, 64, dim=0).store(ds)
        fence_async_shared()
        dk_token = warpgroup_mma(gl.convert_layout(ds, a_layout), q_tile, dk, is_async=True)
        named_barrier("sync", "8", "256")  # both halves of dS' are in shared memory
        dq_token = warpgroup_mma(ds_tile.permute((1, 0)), k_columns, dq_zero, use_acc=False, is_async=True)
        dv, dk, dq = warpgroup_mma_wait(0, deps=[dv_token, dk_token, dq_token])
        mbarrier.arrive(empty.index(stage), count=1)
        dq_stage = i % DQ_STAGES
        mbarrier.wait(dq_empty.index(dq_stage), ((i // DQ_STAGES) & 1) ^ 1)
        dq_tiles.index(2 * dq_stage + CONSUMER).reshape((M, D // 2)).store(dq)
        fence_async_shared()
        mbarrier.arrive(dq_full.index(dq_stage), count=1)
    named_barrier("sync", "8", "256")  # the other warpgroup's dQ has read all of K
    real = gl.convert_layout(key, gl.SliceLayout(1, d_layout)) < length
    k_all.slice(64 * CONSUMER, 64, dim=0).store(gl.where(real[:, None], dk * scale, 0.0).to(dtype))
    v_all.slice(64 * CONSUMER, 64, dim=0).store(gl.where(real[:, None], dv, 0.0).to(dtype))
    fence_async_shared()
    tma_store(dk_desc, [batch, head, first + 64 * CONSUMER, 0], k_tiles.index(0).slice(64 * CONSUMER, 64, dim=2))
    tma_store(dv_desc, [batch, head, first + 64 * CONSUMER, 0], v_tiles.index(0).slice(64 * CONSUMER, 64, dim=2))
    tma.store_wait(0)


@gluon.jit
def consumer_1(descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr):
    consumer(1, descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS)


@gluon.jit
def producer(descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr):
    """One warp: K and V, then the queries that see them through the ring."""
    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dq_desc, dk_desc, dv_desc = descriptors
    k_tiles, v_tiles, kv_full = kv_bufs
    Lq, Lk, left, right, Hkv, group, blocks, heads, section = sizes
    first, batch, head, length, offset, low, count, shift = work_item(lengths, sizes, OPTIONS)
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma_load(k_desc, [batch, head, first, 0], kv_full, k_tiles.index(0))
    tma_load(v_desc, [batch, head, first, 0], kv_full, v_tiles.index(0))
    stream = (q_desc, do_desc, lse_desc, delta_desc)
    stream_queries(
        gl.to_tensor(0), batch, head, low, count, shift, stream, ring, (Hkv, group), OPTIONS.from_last_query, OPTIONS
    )


@gluon.jit
def parts_before(first, start, band, length, OPTIONS: gl.constexpr):
    """How many blocks of keys add their part of the query tile at ``start`` before the block at key ``first``.

    The tile counts as whole, as in :func:`.schedule.queries_of_keys`: a block past the last query's band that a whole
    tile would see adds zeros, and takes its turn.
    """
    Lq, offset, left, right = band
    M: gl.constexpr = OPTIONS.block_m
    keys, edge, low, low_edge, high = keys_of_queries(
        start, (start + M, offset, left, right), length, M, 128, OPTIONS.has_left, OPTIONS.has_right
    )
    before = first // 128 - low
    if OPTIONS.last_keys_first:
        before = high - 1 - first // 128
    return before


@gluon.jit
def writer(
    WRITER: gl.constexpr,
    descriptors,
    kv_bufs,
    ring,
    dq_bufs,
    counters,
    lengths,
    scale,
    scale_log2,
    sizes,
    OPTIONS: gl.constexpr,
):
    """One warp: adds every ``writers``-th of the consumers' parts of dQ to global memory, each in its turn."""
    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dq_desc, dk_desc, dv_desc = descriptors
    ds_tiles, dq_tiles, dq_full, dq_empty = dq_bufs
    Lq, Lk, left, right, Hkv, group, blocks, heads, section = sizes
    M: gl.constexpr = OPTIONS.block_m
    D: gl.constexpr = OPTIONS.head_dim
    first, batch, head, length, offset, low, count, shift = work_item(lengths, sizes, OPTIONS)
    tiles = gl.cdiv(Lq, M)
    for part in range(WRITER, count * group, OPTIONS.writers):
        query_head = head * group + part // count
        m = low + tile_of_turn(part % count, count, shift, OPTIONS.from_last_query)
        start = m * M
        stage = part % OPTIONS.dq_stages
        counter = counters + ((batch * Hkv * group + query_head) * tiles + m)
        mbarrier.wait(dq_full.index(stage), (part // OPTIONS.dq_stages) & 1)
        if OPTIONS.ordered:
            before = parts_before(first, start, (Lq, offset, left, right), length, OPTIONS)
            while gl.atomic_add(counter, 0, sem="acquire") < before:
                pass
        for half in gl.static_range(2):
            tma_reduce_add(dq_desc, [batch, query_head, start, D // 2 * half], dq_tiles.index(2 * stage + half))
        if OPTIONS.ordered:
            publish_stores()
            gl.atomic_add(counter, 1, sem="release")
        else:
            tma.store_wait(0)
        mbarrier.arrive(dq_empty.index(stage), count=1)


@gluon.jit
def writer_1(descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr):
    writer(1, descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS)


@gluon.jit
def writer_0(descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS: gl.constexpr):
    writer(0, descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS)


@gluon.jit(do_not_specialize=["Lq", "Lk", "left", "right", "Hkv", "group", "blocks", "heads", "section"])
def gradients(
    q_desc,
    do_desc,
    lse_desc,
    delta_desc,
    k_desc,
    v_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    counters,
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
    DS_LAYOUT: gl.constexpr,
    OPTIONS: gl.constexpr,
):
    """Grid: ``blocks * heads`` programs, one per block of 128 keys.

    Arguments as in :func:`.backward_keys.gradients_of_keys`, but k_desc and v_desc in boxes of 128 rows; dq_desc: fp32
    [B, Hq, Lq, D], dQ / scale, zeros before the launch, in boxes of block_m rows and D / 2 columns; counters: int32
    [B * Hq, query tiles], zeros before the launch.  OPTIONS is a :class:`.plan.FusedOptions`.
    """
    dtype: gl.constexpr = q_desc.dtype
    M: gl.constexpr = OPTIONS.block_m
    D: gl.constexpr = OPTIONS.head_dim
    STAGES: gl.constexpr = OPTIONS.stages
    DQ_STAGES: gl.constexpr = OPTIONS.dq_stages
    k_tiles = gl.allocate_shared_memory(dtype, [1, 1, 1, 128, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [1, 1, 1, 128, D], v_desc.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, D], q_desc.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, D], do_desc.layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], lse_desc.layout)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, M], delta_desc.layout)
    ds_tiles = gl.allocate_shared_memory(dtype, [2, 128, M], DS_LAYOUT)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2 * DQ_STAGES, 1, 1, M, D // 2], dq_desc.layout)
    kv_full = new_barriers(1, 1).index(0)
    q_full = new_barriers(STAGES, 1)
    do_full = new_barriers(STAGES, 1)
    empty = new_barriers(STAGES, 2)
    dq_full = new_barriers(DQ_STAGES, 2)
    dq_empty = new_barriers(DQ_STAGES, 1)
    fence_async_shared()
    descriptors = (q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dq_desc, dk_desc, dv_desc)
    kv_bufs = (k_tiles, v_tiles, kv_full)
    ring = (q_tiles, do_tiles, lse_tiles, delta_tiles, q_full, do_full, empty)
    dq_bufs = (ds_tiles, dq_tiles, dq_full, dq_empty)
    sizes = (Lq, Lk, left, right, Hkv, group, blocks, heads, section)
    if OPTIONS.writers == 1:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (0, descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS),
                ),
                (
                    consumer_1,
                    (descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS),
                ),
                (producer, (descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS)),
                (writer_0, (descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (0, descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS),
                ),
                (
                    consumer_1,
                    (descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS),
                ),
                (producer, (descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS)),
                (writer_0, (descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS)),
                (writer_1, (descriptors, kv_bufs, ring, dq_bufs, counters, lengths, scale, scale_log2, sizes, OPTIONS)),
            ],
            [4, 1, 1, 1],
            [240, 24, 24, 24],
        )
