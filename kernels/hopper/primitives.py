"""The Hopper instructions that Gluon does not name, or names differently between Triton releases."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton 3.6 calls the bulk tensor copies async_copy_*; later releases async_load and async_store.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


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
