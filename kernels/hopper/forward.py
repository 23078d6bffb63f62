"""Attention forward for Hopper: warp-specialised, asynchronous, persistent.

One warp (the producer) feeds shared memory with TMA; two or three warpgroups (the consumers) hold 64
queries each, run both matrix products on wgmma and the online softmax (Milakov and Gimelshein 2018;
FlashAttention-3, Shah et al. 2024, for the schedule) between them.

The consumer's loop is rotated.  Iteration i holds the probabilities of tile i - 1 in registers::

    wait for P V (i - 2), rescale the output      nothing of this warpgroup is in flight here
    issue S = Q K(i)', then O += P V (i - 1)
    wait for S alone
    softmax(S) -> P                               under P V (i - 1)

With the wait at the head of the loop ptxas keeps the exponentials under the wgmma; with the wait at the
end it hoists it above the softmax.  The other consumer's products run meanwhile: named barriers let one
warpgroup issue at a time (ping-pong), so that one computes exponentials while another multiplies.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .primitives import named_barrier, pass_turn, take_turn, tma_load, tma_store
from .schedule import key_tile, keys_of_queries, locate_tile, tile_of_round, tiles_of_program


@gluon.jit
def sequence_length(lengths, batch, Lk, KEY_LENGTHS: gl.constexpr):
    """Keys of this batch entry."""
    if KEY_LENGTHS:
        return gl.load(lengths + batch).to(gl.int32)
    else:
        return Lk


@gluon.jit
def position_offset(Lq, length, LOWER_RIGHT: gl.constexpr):
    """Position of query 0."""
    if LOWER_RIGHT:
        return length - Lq
    else:
        return length * 0


@gluon.constexpr_function
def split_layout(columns):
    """wgmma's accumulator layout of [64, columns], seen as [64, columns / 8, 8]."""
    registers = [[0, 0, 1], [8, 0, 0]]
    chunk = 1
    while chunk < columns // 8:
        registers.append([0, chunk, 0])
        chunk *= 2
    return gl.DistributedLinearLayout(
        registers,
        [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, columns // 8, 8],
    )


@gluon.jit
def mask_scores(s, row_low, row_high, BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, s_layout: gl.constexpr):
    """s [64, BLOCK_N] with -inf outside the columns [row_low, row_high) of each row.

    Columns are split as 8 * chunk + lane: in wgmma's layout a thread owns two fixed lanes of every chunk,
    so ``8 * chunk < row_high - lane`` compares an immediate with one of four registers.  Comparing whole
    column numbers makes the compiler keep all of them in registers through the loop, and ptxas then
    serialises the wgmma for want of registers.
    """
    chunks: gl.constexpr = BLOCK_N // 8
    split: gl.constexpr = split_layout(BLOCK_N)
    lane = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, split)))
    chunk = 8 * gl.arange(0, chunks, gl.SliceLayout(0, gl.SliceLayout(2, split)))
    high = gl.convert_layout(row_high, gl.SliceLayout(1, gl.SliceLayout(2, split)))
    low = gl.convert_layout(row_low, gl.SliceLayout(1, gl.SliceLayout(2, split)))
    limit = gl.expand_dims(gl.expand_dims(high, 1), 2) - gl.expand_dims(gl.expand_dims(lane, 0), 1)
    column = gl.expand_dims(gl.expand_dims(chunk, 0), 2)
    seen = column < limit
    if HAS_LEFT:
        seen = seen & (column >= gl.expand_dims(gl.expand_dims(low, 1), 2) - gl.expand_dims(gl.expand_dims(lane, 0), 1))
    s = gl.where(seen, gl.convert_layout(s.reshape([64, chunks, 8]), split), -float("inf"))
    return gl.convert_layout(s.reshape([64, BLOCK_N]), s_layout)


@gluon.jit
def softmax_tile(
    s,
    row_max,
    row_sum,
    scale,
    row_low,
    row_high,
    start,
    cut,
    BLOCK_N: gl.constexpr,
    MASKED: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    s_layout: gl.constexpr,
):
    """One step of the online softmax in base 2; ``scale`` includes log2(e).

    s [64, BLOCK_N] raw scores -> (p, row_max, row_sum, alpha), alpha the factor of what was summed before.
    """
    if MASKED:
        if cut:
            s = mask_scores(s, row_low - start, row_high - start, BLOCK_N, HAS_LEFT, s_layout)
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale)
    base = new_max
    if MASKED:
        base = gl.where(new_max == -float("inf"), 0.0, new_max)  # a row that has seen nothing: -inf - 0, not -inf + inf
    p = gl.exp2(s * scale - base[:, None])
    alpha = gl.exp2(row_max - base)
    return p, new_max, row_sum * alpha + gl.sum(p, 1), alpha


@gluon.jit
def zero_tail(v_tile, rows, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Zero the rows of a V tile at or past ``rows``: 0 * NaN is NaN, so a padded value must not reach wgmma."""
    if CONSUMER == 0:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
        row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
        tile = v_tile.load(layout)
        v_tile.store(gl.where((row < rows)[:, None], tile, 0.0))
        fence_async_shared()
    named_barrier("sync", "11", "256" if CONSUMERS == 2 else "384")


@gluon.jit
def step(
    i,
    loads,
    keys,
    o_token,
    p_operand,
    softmax,
    q_tile,
    s_zero,
    rows,
    ring,
    scale,
    CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    PING_PONG: gl.constexpr,
    OVERLAP: gl.constexpr,
    s_layout: gl.constexpr,
    o_layout: gl.constexpr,
    p_layout: gl.constexpr,
):
    """Key tile i >= 1: scores and softmax of tile i, the product with V of tile i - 1.

    ``loads`` counts the K/V tiles that this program has loaded before tile i: it gives stage and parity.
    """
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    row_max, row_sum, alpha = softmax
    row_low, row_high = rows
    edge, low, low_edge, high = keys
    stage = loads % STAGES
    parity = (loads // STAGES) & 1
    before = (loads - 1) % STAGES
    before_parity = ((loads - 1) // STAGES) & 1
    output = warpgroup_mma_wait(0, deps=[o_token])
    mbarrier.arrive(v_empty.index((loads + STAGES - 2) % STAGES), count=1, pred=i >= 2)
    output = output * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    mbarrier.wait(k_full.index(stage), parity)
    if PING_PONG:
        take_turn(CONSUMER)
    s_token = warpgroup_mma(
        q_tile, k_tiles.index(stage).reshape((BLOCK_N, D)).permute((1, 0)), s_zero, use_acc=False, is_async=True
    )
    mbarrier.wait(v_full.index(before), before_parity)
    o_token = warpgroup_mma(p_operand, v_tiles.index(before).reshape((BLOCK_N, D)), output, is_async=True)
    if PING_PONG:
        pass_turn(CONSUMER, CONSUMERS)
    if OVERLAP:
        s = warpgroup_mma_wait(1, deps=[s_token])
    else:
        s, output = warpgroup_mma_wait(0, deps=[s_token, o_token])
        o_token = warpgroup_mma_init(output)
    mbarrier.arrive(k_empty.index(stage), count=1)
    p, row_max, row_sum, alpha = softmax_tile(
        s,
        row_max,
        row_sum,
        scale,
        row_low,
        row_high,
        key_tile(i, edge, low, low_edge, high) * BLOCK_N,
        i <= edge + low_edge,
        BLOCK_N,
        MASKED,
        HAS_LEFT,
        s_layout,
    )
    p_operand = gl.convert_layout(p.to(q_tile.dtype), p_layout)
    return o_token, p_operand, row_max, row_sum, alpha


@gluon.jit
def work_item(
    round_,
    lengths,
    sizes,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    LOWER_RIGHT: gl.constexpr,
    KEY_LENGTHS: gl.constexpr,
    HEADS_INNER: gl.constexpr,
):
    """The tile of queries of this program's round: (first query, batch, head, key length, position offset)
    and what :func:`keys_of_queries` says about it."""
    Lq, Lk, left, right, Hq, group, blocks, heads, section = sizes
    tile = tile_of_round(round_, gl.program_id(0), gl.num_programs(0))
    block, batch_head = locate_tile(tile, blocks, heads, section, HAS_RIGHT, HEADS_INNER)
    first = block * BLOCK_M
    batch = batch_head // Hq
    length = sequence_length(lengths, batch, Lk, KEY_LENGTHS)
    offset = position_offset(Lq, length, LOWER_RIGHT)
    count, edge, low, low_edge, high = keys_of_queries(
        first, (Lq, offset, left, right), length, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    return first, batch, batch_head % Hq, length, offset, count, edge, low, low_edge, high


@gluon.jit
def consumer(
    CONSUMER: gl.constexpr,
    descriptors,
    q_bufs,
    ring,
    lse_ptr,
    lengths,
    scale,
    sizes,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    LOWER_RIGHT: gl.constexpr,
    KEY_LENGTHS: gl.constexpr,
    PING_PONG: gl.constexpr,
    OVERLAP: gl.constexpr,
    HEADS_INNER: gl.constexpr,
    OWN_OUT: gl.constexpr,
):
    """A warpgroup: 64 queries of every work tile."""
    q_desc, k_desc, v_desc, o_desc = descriptors
    q_tiles, o_tiles, q_full, q_empty = q_bufs
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    Lq, Lk, left, right, Hq, group, blocks, heads, section = sizes
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_tile = q_tiles.index(CONSUMER).reshape((64, D))
    s_zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    if PING_PONG and CONSUMER == CONSUMERS - 1:
        pass_turn(CONSUMER, CONSUMERS)  # consumer 0 goes first
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, count, edge, low, low_edge, high = work_item(
            round_, lengths, sizes, 64 * CONSUMERS, BLOCK_N, HAS_LEFT, HAS_RIGHT, LOWER_RIGHT, KEY_LENGTHS, HEADS_INNER
        )
        row = first + 64 * CONSUMER + gl.arange(0, 64, s_row)
        row_low = row + (offset - left)
        row_high = gl.zeros([64], gl.int32, s_row) + length
        if HAS_RIGHT:
            row_high = gl.minimum(row_high, row + (offset + right + 1))
        rows = (row_low, row_high)
        keys = (edge, low, low_edge, high)

        # tile 0: nothing to overlap with yet
        stage = loads % STAGES
        parity = (loads // STAGES) & 1
        mbarrier.wait(q_full.index(CONSUMER), round_ & 1)
        mbarrier.wait(k_full.index(stage), parity)
        s_token = warpgroup_mma(
            q_tile, k_tiles.index(stage).reshape((BLOCK_N, D)).permute((1, 0)), s_zero, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=[s_token])
        mbarrier.arrive(k_empty.index(stage), count=1)
        row_max = gl.full([64], -float("inf"), gl.float32, s_row)
        row_sum = gl.zeros([64], gl.float32, s_row)
        p, row_max, row_sum, alpha = softmax_tile(
            s, row_max, row_sum, scale, row_low, row_high, (high - 1) * BLOCK_N, True, BLOCK_N, True, HAS_LEFT, s_layout
        )
        p_operand = gl.convert_layout(p.to(q_tile.dtype), p_layout)
        if KEY_LENGTHS:
            if length < gl.minimum(high * BLOCK_N, Lk):
                mbarrier.wait(v_full.index(stage), parity)
                zero_tail(
                    v_tiles.index(stage).reshape((BLOCK_N, D)),
                    length - (high - 1) * BLOCK_N,
                    CONSUMER,
                    CONSUMERS,
                    BLOCK_N,
                    D,
                )

        o_token = warpgroup_mma_init(gl.zeros([64, D], gl.float32, o_layout))
        for i in range(1, count):
            o_token, p_operand, row_max, row_sum, alpha = step(
                i,
                loads + i,
                keys,
                o_token,
                p_operand,
                (row_max, row_sum, alpha),
                q_tile,
                s_zero,
                rows,
                ring,
                scale,
                CONSUMER,
                CONSUMERS,
                BLOCK_N,
                D,
                STAGES,
                HAS_LEFT or HAS_RIGHT,
                HAS_LEFT,
                PING_PONG,
                OVERLAP,
                s_layout,
                o_layout,
                p_layout,
            )
        loads += count
        if OWN_OUT:
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)

        output = warpgroup_mma_wait(0, deps=[o_token])
        mbarrier.arrive(v_empty.index((loads + STAGES - 2) % STAGES), count=1, pred=count >= 2)
        output = output * gl.convert_layout(alpha, o_row)[:, None]
        stage = (loads - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((loads - 1) // STAGES) & 1)
        o_token = warpgroup_mma(p_operand, v_tiles.index(stage).reshape((BLOCK_N, D)), output, is_async=True)
        seen = row_sum > 0.0
        lse = gl.where(seen, (row_max + gl.log2(row_sum)) * 0.6931471805599453, -float("inf"))
        gl.store(lse_ptr + (batch * Hq + head) * Lq + row, lse, mask=row < Lq)
        inverse = gl.where(seen, 1.0 / row_sum, 0.0)
        output = warpgroup_mma_wait(0, deps=[o_token])
        mbarrier.arrive(v_empty.index(stage), count=1)
        inverse = gl.convert_layout(inverse, o_row)[:, None]
        output = gl.where(inverse != 0.0, output * inverse, 0.0)
        tma.store_wait(0)
        o_tile = o_tiles.index(CONSUMER)
        o_tile.reshape((64, D)).store(output.to(q_tile.dtype))
        fence_async_shared()
        tma_store(o_desc, [batch, head, first + 64 * CONSUMER, 0], o_tile)
        if not OWN_OUT:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
    tma.store_wait(0)
    if PING_PONG and CONSUMER == 0:
        take_turn(CONSUMER)  # the turn that nobody took


@gluon.jit
def producer(
    descriptors,
    q_bufs,
    ring,
    lse_ptr,
    lengths,
    scale,
    sizes,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    LOWER_RIGHT: gl.constexpr,
    KEY_LENGTHS: gl.constexpr,
    PING_PONG: gl.constexpr,
    OVERLAP: gl.constexpr,
    HEADS_INNER: gl.constexpr,
    OWN_OUT: gl.constexpr,
):
    """One warp: Q of every work tile, then its K and V through the ring."""
    q_desc, k_desc, v_desc, o_desc = descriptors
    q_tiles, o_tiles, q_full, q_empty = q_bufs
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = ring
    Lq, Lk, left, right, Hq, group, blocks, heads, section = sizes
    loads = 0
    for round_ in range(0, tiles_of_program(gl.program_id(0), gl.num_programs(0), blocks * heads)):
        first, batch, head, length, offset, count, edge, low, low_edge, high = work_item(
            round_, lengths, sizes, 64 * CONSUMERS, BLOCK_N, HAS_LEFT, HAS_RIGHT, LOWER_RIGHT, KEY_LENGTHS, HEADS_INNER
        )
        for i in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(i), (round_ & 1) ^ 1)
            mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
            tma_load(q_desc, [batch, head, first + 64 * i, 0], q_full.index(i), q_tiles.index(i))
        for i in range(0, count):
            start = key_tile(i, edge, low, low_edge, high) * BLOCK_N
            stage = loads % STAGES
            free = ((loads // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), free)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma_load(k_desc, [batch, head // group, start, 0], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), free)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma_load(v_desc, [batch, head // group, start, 0], v_full.index(stage), v_tiles.index(stage))
            loads += 1


@gluon.jit
def consumer_1(
    descriptors,
    q_bufs,
    ring,
    lse_ptr,
    lengths,
    scale,
    sizes,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    LOWER_RIGHT: gl.constexpr,
    KEY_LENGTHS: gl.constexpr,
    PING_PONG: gl.constexpr,
    OVERLAP: gl.constexpr,
    HEADS_INNER: gl.constexpr,
    OWN_OUT: gl.constexpr,
):
    consumer(
        1,
        descriptors,
        q_bufs,
        ring,
        lse_ptr,
        lengths,
        scale,
        sizes,
        CONSUMERS,
        BLOCK_N,
        D,
        STAGES,
        HAS_LEFT,
        HAS_RIGHT,
        LOWER_RIGHT,
        KEY_LENGTHS,
        PING_PONG,
        OVERLAP,
        HEADS_INNER,
        OWN_OUT,
    )


@gluon.jit
def consumer_2(
    descriptors,
    q_bufs,
    ring,
    lse_ptr,
    lengths,
    scale,
    sizes,
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    LOWER_RIGHT: gl.constexpr,
    KEY_LENGTHS: gl.constexpr,
    PING_PONG: gl.constexpr,
    OVERLAP: gl.constexpr,
    HEADS_INNER: gl.constexpr,
    OWN_OUT: gl.constexpr,
):
    consumer(
        2,
        descriptors,
        q_bufs,
        ring,
        lse_ptr,
        lengths,
        scale,
        sizes,
        CONSUMERS,
        BLOCK_N,
        D,
        STAGES,
        HAS_LEFT,
        HAS_RIGHT,
        LOWER_RIGHT,
        KEY_LENGTHS,
        PING_PONG,
        OVERLAP,
        HEADS_INNER,
        OWN_OUT,
    )


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
    CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    LOWER_RIGHT: gl.constexpr,
    KEY_LENGTHS: gl.constexpr,
    PING_PONG: gl.constexpr,
    OVERLAP: gl.constexpr,
    HEADS_INNER: gl.constexpr,
    OWN_OUT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    """Grid: any number of programs; they share the ``blocks * heads`` work tiles of 64 * CONSUMERS queries.

    q_desc, o_desc: [B, Hq, Lq, D] in boxes of 64 rows; k_desc, v_desc: [B, Hkv, Lk, D] in boxes of BLOCK_N
    rows; lse_ptr [B, Hq, Lq] fp32; lengths int64 [B] (read with KEY_LENGTHS); ``scale`` includes log2(e);
    ``heads`` = B * Hq; ``left`` and ``right`` bound the band around position query + offset, where offset is
    0, or key length - Lq with LOWER_RIGHT; ``section``: see :func:`locate_tile`.
    """
    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, D], q_desc.layout)
    o_tiles = q_tiles
    if OWN_OUT:
        o_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, D], o_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    descriptors = (q_desc, k_desc, v_desc, o_desc)
    q_bufs = (q_tiles, o_tiles, q_full, q_empty)
    ring = (k_tiles, v_tiles, k_full, k_empty, v_full, v_empty)
    sizes = (Lq, Lk, left, right, Hq, group, blocks, heads, section)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (
                        0,
                        descriptors,
                        q_bufs,
                        ring,
                        lse_ptr,
                        lengths,
                        scale,
                        sizes,
                        CONSUMERS,
                        BLOCK_N,
                        D,
                        STAGES,
                        HAS_LEFT,
                        HAS_RIGHT,
                        LOWER_RIGHT,
                        KEY_LENGTHS,
                        PING_PONG,
                        OVERLAP,
                        HEADS_INNER,
                        OWN_OUT,
                    ),
                ),
                (
                    consumer_1,
                    (
                        descriptors,
                        q_bufs,
                        ring,
                        lse_ptr,
                        lengths,
                        scale,
                        sizes,
                        CONSUMERS,
                        BLOCK_N,
                        D,
                        STAGES,
                        HAS_LEFT,
                        HAS_RIGHT,
                        LOWER_RIGHT,
                        KEY_LENGTHS,
                        PING_PONG,
                        OVERLAP,
                        HEADS_INNER,
                        OWN_OUT,
                    ),
                ),
                (
                    producer,
                    (
                        descriptors,
                        q_bufs,
                        ring,
                        lse_ptr,
                        lengths,
                        scale,
                        sizes,
                        CONSUMERS,
                        BLOCK_N,
                        D,
                        STAGES,
                        HAS_LEFT,
                        HAS_RIGHT,
                        LOWER_RIGHT,
                        KEY_LENGTHS,
                        PING_PONG,
                        OVERLAP,
                        HEADS_INNER,
                        OWN_OUT,
                    ),
                ),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    consumer,
                    (
                        0,
                        descriptors,
                        q_bufs,
                        ring,
                        lse_ptr,
                        lengths,
                        scale,
                        sizes,
                        CONSUMERS,
                        BLOCK_N,
                        D,
                        STAGES,
                        HAS_LEFT,
                        HAS_RIGHT,
                        LOWER_RIGHT,
                        KEY_LENGTHS,
                        PING_PONG,
                        OVERLAP,
                        HEADS_INNER,
                        OWN_OUT,
                    ),
                ),
                (
                    consumer_1,
                    (
                        descriptors,
                        q_bufs,
                        ring,
                        lse_ptr,
                        lengths,
                        scale,
                        sizes,
                        CONSUMERS,
                        BLOCK_N,
                        D,
                        STAGES,
                        HAS_LEFT,
                        HAS_RIGHT,
                        LOWER_RIGHT,
                        KEY_LENGTHS,
                        PING_PONG,
                        OVERLAP,
                        HEADS_INNER,
                        OWN_OUT,
                    ),
                ),
                (
                    consumer_2,
                    (
                        descriptors,
                        q_bufs,
                        ring,
                        lse_ptr,
                        lengths,
                        scale,
                        sizes,
                        CONSUMERS,
                        BLOCK_N,
                        D,
                        STAGES,
                        HAS_LEFT,
                        HAS_RIGHT,
                        LOWER_RIGHT,
                        KEY_LENGTHS,
                        PING_PONG,
                        OVERLAP,
                        HEADS_INNER,
                        OWN_OUT,
                    ),
                ),
                (
                    producer,
                    (
                        descriptors,
                        q_bufs,
                        ring,
                        lse_ptr,
                        lengths,
                        scale,
                        sizes,
                        CONSUMERS,
                        BLOCK_N,
                        D,
                        STAGES,
                        HAS_LEFT,
                        HAS_RIGHT,
                        LOWER_RIGHT,
                        KEY_LENGTHS,
                        PING_PONG,
                        OVERLAP,
                        HEADS_INNER,
                        OWN_OUT,
                    ),
                ),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24],
        )
