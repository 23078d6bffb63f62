"""Attention forward for Hopper: warp-specialised, asynchronous, persistent.

One warp (the producer) feeds shared memory with TMA; two or three warpgroups (the consumers) hold 64
queries each, run both matrix products on wgmma and the online softmax (Milakov and Gimelshein 2018;
FlashAttention-3, Shah et al. 2024, for the schedule) between them.

Iteration i of the consumer's loop holds the probabilities of tile i - 1 in registers::

    issue S = Q K(i)', then O += P V (i - 1)
    wait for S alone
    softmax(S)                                    under P V (i - 1)
    wait for P V (i - 1), rescale the output, round softmax(S) to P

Nothing is in flight over the loop's back edge, and P is not written before the product that reads it from registers
has ended: registers of a wgmma in flight may not be touched.  The other consumer's products run meanwhile: named
barriers let one warpgroup issue at a time (ping-pong), so that one computes exponentials while another multiplies.
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

from .band import by_chunks, mask_scores, quad_layout, query_item, zero_tail
from .primitives import hold_order, new_barriers, pass_turn, take_turn, tma_load, tma_store
from .schedule import key_tile, tiles_of_program


@gluon.jit
def raise_maxima(
    s, row_max, scale, rows, start, cut, MASKED: gl.constexpr, OPTIONS: gl.constexpr, s_layout: gl.constexpr
):
    """First half of a step of the online softmax, in base 2; ``scale`` includes log2(e).

    s [64, block_n] raw scores of the keys from ``start``, ``rows`` the (low, high) bounds of each row's keys, which
    matter if the tile is ``cut`` by them -> (s with its mask, row_max, base: what to subtract in the exponents).
    """
    if MASKED:  # noqa: SIM102 - a compile-time and a run-time condition
        if cut:
            row_low, row_high = rows
            s = mask_scores(s, row_low - start, row_high - start, OPTIONS.has_left, True, s_layout)
    # over the chunks first: a thread then has a chain of its own for each of its two lanes
    tile_max = gl.convert_layout(gl.max(gl.max(by_chunks(s), 1), 1), gl.SliceLayout(1, s_layout))
    row_max = gl.maximum(row_max, tile_max * scale)
    base = row_max
    if MASKED:
        base = gl.where(row_max == -float("inf"), 0.0, row_max)  # a row that has seen nothing: -inf - 0, not -inf + inf
    return s, row_max, base


@gluon.jit
def weigh(s, base, old_max, quad_sums, scale):
    """Second half: (p [64, block_n], quad_sums, alpha), alpha the factor of what was summed before.

    quad_sums [64, 4]: what each of the four threads that share a row has summed.  They do not wait for each other
    before the last tile; then :func:`consumer` adds them.
    """
    p = gl.exp2(s * scale - base[:, None])
    alpha = gl.exp2(old_max - base)
    quads: gl.constexpr = quad_layout()
    tile_sums = gl.convert_layout(gl.sum(gl.sum(by_chunks(p), 1).reshape([64, 4, 2]), 2), quads)
    return p, quad_sums * gl.convert_layout(alpha, gl.SliceLayout(1, quads))[:, None] + tile_sums, alpha


@gluon.jit
def step(
    i,
    load,
    keys,
    output,
    p_operand,
    row_max,
    quad_sums,
    q_tile,
    ring,
    rows,
    scale,
    CONSUMER: gl.constexpr,
    OPTIONS: gl.constexpr,
    s_layout: gl.constexpr,
    o_layout: gl.constexpr,
):
    """Key tile i >= 1: scores and softmax of tile i, the product with V of tile i - 1.

    ``load`` numbers tile i among all that this program loads: it gives stage and parity.
    """
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    count, edge, low, low_edge, high = keys
    N: gl.constexpr = OPTIONS.block_n
    STAGES: gl.constexpr = OPTIONS.stages
    stage = load % STAGES
    before = (load - 1) % STAGES
    mbarrier.wait(k_full.index(stage), (load // STAGES) & 1)
    if OPTIONS.ping_pong:
        take_turn(CONSUMER)
    k_tile = k_tiles.index(stage).reshape((N, OPTIONS.head_dim))
    s_zero = gl.zeros([64, N], gl.float32, s_layout)
    s_token = warpgroup_mma(q_tile, k_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
    v_parity = ((load - 1) // STAGES) & 1
    mbarrier.wait(v_full.index(before), v_parity)
    v_tile = v_tiles.index(before).reshape((N, OPTIONS.head_dim))
    o_token = warpgroup_mma(p_operand, v_tile, output, is_async=True)
    if OPTIONS.ping_pong:
        pass_turn(CONSUMER, OPTIONS.consumers)
    if OPTIONS.overlap:
        s = warpgroup_mma_wait(1, deps=[s_token])
    else:
        s, output = warpgroup_mma_wait(0, deps=[s_token, o_token])
    mbarrier.arrive(k_empty.index(stage), count=1)
    start = key_tile(i, edge, low, low_edge, high) * N
    old_max = row_max
    MASKED: gl.constexpr = OPTIONS.has_left or OPTIONS.has_right
    s, row_max, base = raise_maxima(s, old_max, scale, rows, start, i <= edge + low_edge, MASKED, OPTIONS, s_layout)
    if OPTIONS.maxima_first:
        hold_order(v_full.index(before), v_parity)
    p, quad_sums, alpha = weigh(s, base, old_max, quad_sums, scale)
    if OPTIONS.overlap:
        hold_order(v_full.index(before), v_parity)
        output = warpgroup_mma_wait(0, deps=[o_token])
    mbarrier.arrive(v_empty.index(before), count=1)
    output = output * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    p_operand = gl.convert_layout(p.to(q_tile.dtype), gl.DotOperandLayout(0, o_layout, 2))
    return output, p_operand, row_max, quad_sums


@gluon.jit
def consumer(CONSUMER: gl.constexpr, descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS: gl.constexpr):
    """A warpgroup: 64 queries of every work tile."""
    q_desc, k_desc, v_desc, o_desc = descriptors
    q_tiles, o_tiles, q_full, q_empty = q_bufs
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    Lq, Lk, left, right, Hq, group, blocks, heads, section = sizes
    N: gl.constexpr = OPTIONS.block_n
    D: gl.constexpr = OPTIONS.head_dim
    STAGES: gl.constexpr = OPTIONS.stages
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_tile = q_tiles.index(CONSUMER).reshape((64, D))
    if OPTIONS.ping_pong and OPTIONS.consumers - 1 == CONSUMER:
        pass_turn(CONSUMER, OPTIONS.consumers)  # consumer 0 goes first
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, keys = query_item(round_, lengths, sizes, 64 * OPTIONS.consumers, OPTIONS)
        count, edge, low, low_edge, high = keys
        row = first + 64 * CONSUMER + gl.arange(0, 64, s_row)
        row_high = gl.zeros([64], gl.int32, s_row) + length
        if OPTIONS.has_right:
            row_high = gl.minimum(row_high, row + (offset + right + 1))
        rows = (row + (offset - left), row_high)

        # tile 0, the rightmost: nothing to overlap with yet
        stage = loads % STAGES
        parity = (loads // STAGES) & 1
        mbarrier.wait(q_full.index(CONSUMER), round_ & 1)
        mbarrier.wait(k_full.index(stage), parity)
        k_tile = k_tiles.index(stage).reshape((N, D))
        s_zero = gl.zeros([64, N], gl.float32, s_layout)
        s_token = warpgroup_mma(q_tile, k_tile.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        if OPTIONS.key_lengths:  # noqa: SIM102 - a compile-time and a run-time condition
            if length < gl.minimum(high * N, Lk):  # under the product, while no probabilities take registers
                mbarrier.wait(v_full.index(stage), parity)
                v_tile = v_tiles.index(stage).reshape((N, D))
                zero_tail(v_tile, length - (high - 1) * N, CONSUMER, OPTIONS.consumers)
        s = warpgroup_mma_wait(0, deps=[s_token])
        mbarrier.arrive(k_empty.index(stage), count=1)
        nothing = gl.full([64], -float("inf"), gl.float32, s_row)
        s, row_max, base = raise_maxima(s, nothing, scale, rows, (high - 1) * N, True, True, OPTIONS, s_layout)
        quad_zeros = gl.zeros([64, 4], gl.float32, quad_layout())
        p, quad_sums, alpha = weigh(s, base, nothing, quad_zeros, scale)
        p_operand = gl.convert_layout(p.to(q_tile.dtype), gl.DotOperandLayout(0, o_layout, 2))
        output = gl.zeros([64, D], gl.float32, o_layout)
        for i in range(1, count):
            output, p_operand, row_max, quad_sums = step(
                i,
                loads + i,
                keys,
                output,
                p_operand,
                row_max,
                quad_sums,
                q_tile,
                ring,
                rows,
                scale,
                CONSUMER,
                OPTIONS,
                s_layout,
                o_layout,
            )
        loads += count
        if OPTIONS.own_out:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)

        stage = (loads - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((loads - 1) // STAGES) & 1)
        o_token = warpgroup_mma(p_operand, v_tiles.index(stage).reshape((N, D)), output, is_async=True)
        row_sum = gl.convert_layout(gl.sum(quad_sums, 1), s_row)
        seen = row_sum != 0.0  # a NaN was seen
        lse = gl.where(seen, (row_max + gl.log2(row_sum)) * 0.6931471805599453, -float("inf"))
        gl.store(lse_ptr + (batch * Hq + head) * Lq + row, lse, mask=row < Lq)
        inverse = gl.convert_layout(gl.where(seen, 1.0 / row_sum, 0.0), o_row)[:, None]
        output = warpgroup_mma_wait(0, deps=[o_token])
        mbarrier.arrive(v_empty.index(stage), count=1)
        output = gl.where(inverse != 0.0, output * inverse, 0.0)
        tma.store_wait(0)
        o_tile = o_tiles.index(CONSUMER)
        o_tile.reshape((64, D)).store(output.to(q_tile.dtype))
        fence_async_shared()
        tma_store(o_desc, [batch, head, first + 64 * CONSUMER, 0], o_tile)
        if not OPTIONS.own_out:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
    tma.store_wait(0)
    if OPTIONS.ping_pong and CONSUMER == 0:
        take_turn(CONSUMER)  # the turn that nobody took


@gluon.jit
def consumer_1(descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS: gl.constexpr):
    consumer(1, descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS)


@gluon.jit
def consumer_2(descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS: gl.constexpr):
    consumer(2, descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS)


@gluon.jit
def producer(descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS: gl.constexpr):
    """One warp: Q of every work tile, then its K and V through the ring."""
    q_desc, k_desc, v_desc, o_desc = descriptors
    q_tiles, o_tiles, q_full, q_empty = q_bufs
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    Lq, Lk, left, right, Hq, group, blocks, heads, section = sizes
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, keys = query_item(round_, lengths, sizes, 64 * OPTIONS.consumers, OPTIONS)
        count, edge, low, low_edge, high = keys
        for i in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(i), (round_ & 1) ^ 1)
            mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
            tma_load(q_desc, [batch, head, first + 64 * i, 0], q_full.index(i), q_tiles.index(i))
        for i in range(0, count):
            start = key_tile(i, edge, low, low_edge, high) * OPTIONS.block_n
            stage = loads % OPTIONS.stages
            free = ((loads // OPTIONS.stages) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), free)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [batch, head // group, start, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), free)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [batch, head // group, start, 0], v_full.index(stage), v_tiles.index(stage))
            loads += 1


@gluon.jit(do_not_specialize=["Lq", "Lk", "left", "right", "Hq", "group", "blocks", "heads", "section"])
def attention_forward(
    q_desc,
    k_desc,
    v_desc,
    o_desc,
    lse_ptr,
    lengths,
    scale,
    Lq,
    Lk,
    left,
    right,
    Hq,
    group,
    blocks,
    heads,
    section,
    OPTIONS: gl.constexpr,
):
    """Grid: any number of programs; they share the ``blocks * heads`` work tiles of 64 * consumers queries.

    q_desc, o_desc: [B, Hq, Lq, D] in boxes of 64 rows; k_desc, v_desc: [B, Hkv, Lk, D] in boxes of block_n rows;
    lse_ptr [B, Hq, Lq] fp32; lengths int64 [B] (read with key_lengths); ``scale`` includes log2(e); ``heads`` = B * Hq;
    ``left`` and ``right`` bound the band around position query + offset, where offset is 0, or key length - Lq with
    lower_right; ``section``: see :func:`locate_tile`.  OPTIONS is a :class:`.plan.ForwardOptions`.
    """
    dtype: gl.constexpr = q_desc.dtype
    STAGES: gl.constexpr = OPTIONS.stages
    CONSUMERS: gl.constexpr = OPTIONS.consumers
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, OPTIONS.head_dim], q_desc.layout)
    o_tiles = q_tiles
    if OPTIONS.own_out:
        o_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, OPTIONS.head_dim], o_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, OPTIONS.block_n, OPTIONS.head_dim], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, OPTIONS.block_n, OPTIONS.head_dim], v_desc.layout)
    q_full = new_barriers(CONSUMERS, 1)
    q_empty = new_barriers(CONSUMERS, 1)
    k_full = new_barriers(STAGES, 1)
    v_full = new_barriers(STAGES, 1)
    k_empty = new_barriers(STAGES, CONSUMERS)
    v_empty = new_barriers(STAGES, CONSUMERS)
    fence_async_shared()
    descriptors = (q_desc, k_desc, v_desc, o_desc)
    q_bufs = (q_tiles, o_tiles, q_full, q_empty)
    ring = (k_tiles, v_tiles, k_full, k_empty, v_full, v_empty)
    sizes = (Lq, Lk, left, right, Hq, group, blocks, heads, section)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consumer, (0, descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS)),
                (consumer_1, (descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS)),
                (producer, (descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS)),
            ],
            [4, 1],
            [OPTIONS.registers, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS)),
                (consumer_1, (descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS)),
                (consumer_2, (descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS)),
                (producer, (descriptors, q_bufs, ring, lse_ptr, lengths, scale, sizes, OPTIONS)),
            ],
            [4, 4, 1],
            [OPTIONS.registers, OPTIONS.registers, 24],
        )
