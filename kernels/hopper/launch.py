"""From a problem to the arguments and the grid of the forward kernel."""

import functools
import math

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..arguments import on_device
from ..remembered import Call, remembered
from .capability import tma_reason
from .configs import ForwardConfig, forward_config, tile_columns
from .forward import attention_forward
from .plan import Plan, band_of, forward_plan, seen_keys, without_unseen

GLUON_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


#: Streaming multiprocessors of an H100 or H200 (SXM), assumed where kernels are compiled without a GPU.
ASSUMED_MULTIPROCESSORS = 132


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return ASSUMED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def tile_layout(box: tuple[int, ...], dtype: torch.dtype):
    """The swizzled shared-memory layout of a box."""
    return gl.NVMMASharedLayout.get_default_for(list(box), GLUON_DTYPE[dtype])


def tma_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """The strides in elements, with legal ones for the dimensions of size 1, whose strides mean nothing."""
    row = shape[-1]
    return [stride if size > 1 else row for size, stride in zip(shape[:-1], strides[:-1], strict=True)] + [1]


def tile_descriptor(tensor: torch.Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """A TMA descriptor of [B, H, L, D] in boxes of ``rows`` rows of one head, a tile's columns unless said otherwise.

    Rank 4 with the true strides and sizes: past the rows of a head and past its columns loads give zeros and stores
    do nothing.
    """
    box = [1, 1, rows, columns or tile_columns(tensor.shape[-1])]
    strides = tma_strides(tensor.shape, tensor.stride())
    return TensorDescriptor(tensor, list(tensor.shape), strides, box, tile_layout(tuple(box), tensor.dtype))


def stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """What TMA writes in place of a tensor that it cannot write, to be copied back."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def compiler_options(config) -> dict:
    """What every launch tells the compiler.

    Contraction to fused multiply-adds is asked for: Triton 3.9 announces that it will stop being the default, and the
    softmax would take half as many instructions again.
    """
    return {"num_warps": 4, "maxnreg": config.entry_registers, "enable_fp_fusion": True}


def forward_numbers(problem, out: torch.Tensor, config) -> tuple[ForwardConfig, Plan, slice | None, bool] | None:
    """(configuration, plan, which keys are seen if not all, whether TMA can write ``out``), or None for no work."""
    if not out.numel() or not problem.key.shape[2]:
        return None
    band = band_of(problem)
    config = config or forward_config(problem.query.shape[-1], band.has_left or band.has_right)
    seen = seen_keys(problem, band)
    plan = forward_plan(without_unseen(problem, seen), band, config, multiprocessors(problem.query.device))
    return config, plan, seen, tma_reason("output", out) is None


def forward(problem, out: torch.Tensor, lse: torch.Tensor, config=None, call: Call | None = None) -> None:
    """Launch the forward kernel on the current stream; see kernels/hopper/__init__.py.

    Writes out [B, Hq, Lq, D] and lse [B, Hq, Lq] (fp32, natural logarithm). ``call`` is what is remembered of calls
    alike, where the caller has it already; they have no ``config``.
    """
    call = call or remembered(forward, problem, (out, lse), config)
    numbers = call.once("numbers", forward_numbers, problem, out, config)
    if numbers is None:
        out.zero_()
        lse.fill_(-math.inf)
        return
    config, plan, seen, in_place = numbers
    problem = without_unseen(problem, seen)
    target = out if in_place else stand_in(out)
    tensors = {
        "q_desc": problem.query,
        "k_desc": problem.key,
        "v_desc": problem.value,
        "o_desc": target,
        "lse_ptr": lse,
        "lengths": lse if problem.key_lengths is None else problem.key_lengths,
    }

    def arguments() -> tuple[int, dict]:
        rows = {"q_desc": 64, "k_desc": config.block_n, "v_desc": config.block_n, "o_desc": 64}
        descriptors = {name: tile_descriptor(tensors[name], number) for name, number in rows.items()}
        return plan.programs, tensors | descriptors | plan.named() | compiler_options(config)

    with on_device(out):
        call.launch(attention_forward, tensors, arguments)
    if target is not out:
        out.copy_(target)
