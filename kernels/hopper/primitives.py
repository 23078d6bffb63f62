"""The Hopper instructions that Gluon does not name, or names differently between Triton releases."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.6 calls the bulk tensor copies async_copy_*; later releases async_load and async_store.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def _reduce_add():
    """TMA's addition to global memory: Triton 3.6's builder has it, its language does not; later releases name it."""
    named = getattr(tma, "async_atomic_add", None)
    if named is not None:
        return named
    from triton._C.libtriton import ir
    from triton.experimental.gluon.language._core import builtin

    @builtin
    def tma_reduce_add(tensor_desc, coord, src, _semantic=None):
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)

    return tma_reduce_add


tma_reduce_add = _reduce_add()


@gluon.jit
def publish_stores():
    """Wait until this thread's TMA stores and additions are in global memory, and make them visible to the GPU.

    ``tma.store_wait`` waits only until shared memory has been read.
    """
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; fence.acq_rel.gpu; bar.warp.sync 0xffffffff; mov.u32 $0, $1;",
        "=r,r",
        [gl.to_tensor(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def named_barrier(action: gl.constexpr, name: gl.constexpr, threads: gl.constexpr):
    """``bar.sync`` (meet) or ``bar.arrive`` (signal only) on hardware barrier ``name`` of ``threads``.

    Names below 8 are left to Triton, which takes one per warp-specialised partition.
    """
    gl.inline_asm_elementwise(
        "bar." + action + " " + name + ", " + threads + "; mov.u32 $0, $1;",
        "=r,r",
        [gl.to_tensor(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def hold_order(barrier, parity):
    """Keep ptxas from moving the wait for a product that follows above the arithmetic that precedes.

    ptxas moves the wait for a wgmma up within a basic block, so that what was written to run under the product runs
    after it.  The loop of an mbarrier wait ends the block; this one, on a phase that the caller has waited for and
    that cannot begin again before the caller lets it, is over at once.
    """
    mbarrier.wait(barrier, parity)


@gluon.jit
def unknown_zero(i):
    """0, of an i >= 0, as the compiler cannot know.

    The descriptors of a tile that stays through a loop are constants of the loop, and the compiler holds them in
    registers through it, two for each step of each product.  Of a tile at an index that may change, it computes them
    in every turn, on the uniform datapath.
    """
    return gl.inline_asm_elementwise(
        "shr.u32 $0, $1, 31;", "=r,r", [gl.to_tensor(i)], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def new_barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """``number`` mbarriers that turn after ``arrivals`` arrivals (and the bytes that they expect)."""
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def take_turn(CONSUMER: gl.constexpr):
    """Wait until the tensor cores are this warpgroup's (ping-pong between the consumers)."""
    named_barrier("sync", "8" if CONSUMER == 0 else ("9" if CONSUMER == 1 else "10"), "256")


@gluon.jit
def pass_turn(CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Hand the tensor cores to the next warpgroup, round robin."""
    if CONSUMER == CONSUMERS - 1:
        named_barrier("arrive", "8", "256")
    else:
        named_barrier("arrive", "9" if CONSUMER == 0 else "10", "256")
