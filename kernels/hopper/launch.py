"""From a problem to the arguments and the grid of the forward kernel."""

import contextlib
import functools
import math

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .capability import tma_reason
from .configs import forward_config, tile_columns
from .forward import attention_forward
from .plan import band_of, forward_plan, without_unseen

GLUON_DTYPE = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


#: Streaming multiprocessors of an H100 or H200 (SXM), assumed where kernels are compiled without a GPU.
ASSUMED_MULTIPROCESSORS = 132
#: Shapes of tensors whose descriptors are remembered.
MOST_CHECKED = 1024


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return ASSUMED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor):
    """Makes the tensor's device the current one; does nothing where kernels are compiled without a GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def tile_layout(box: tuple[int, ...], dtype: torch.dtype):
    """The swizzled shared-memory layout of a box."""
    return gl.NVMMASharedLayout.get_default_for(list(box), GLUON_DTYPE[dtype])


def tma_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """The strides in elements, with legal ones for the dimensions of size 1, whose strides mean nothing."""
    row = shape[-1]
    return [stride if size > 1 else row for size, stride in zip(shape[:-1], strides[:-1], strict=True)] + [1]


#: Fields of checked descriptors but the tensor, by what they follow from: checks and lists cost more than a launch.
_checked: dict[tuple, dict] = {}


def tile_descriptor(tensor: torch.Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """A TMA descriptor of [B, H, L, D] in boxes of ``rows`` rows of one head, a tile's columns unless said otherwise.

    Rank 4 with the true strides and sizes: past the rows of a head and past its columns loads give zeros and stores
    do nothing.
    """
    key = (tensor.shape, tensor.stride(), tensor.dtype, rows, columns)
    fields = _checked.get(key)
    if fields is None:
        box = [1, 1, rows, columns or tile_columns(tensor.shape[-1])]
        strides = tma_strides(tensor.shape, tensor.stride())
        made = TensorDescriptor(tensor, list(tensor.shape), strides, box, tile_layout(tuple(box), tensor.dtype))
        if len(_checked) >= MOST_CHECKED:
            _checked.clear()
        _checked[key] = {name: value for name, value in vars(made).items() if name != "base"}
        return made
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(fields, base=tensor)
    return descriptor


def writable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where TMA can write it, else a contiguous stand-in to be copied back."""
    return (
        tensor
        if tma_reason("output", tensor) is None
        else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    )


def compiler_options(config) -> dict:
    """What every launch tells the compiler.

    Contraction to fused multiply-adds is asked for: Triton 3.9 announces that it will stop being the default, and the
    softmax would take half as many instructions again.
    """
    return {"num_warps": 4, "maxnreg": config.entry_registers, "enable_fp_fusion": True}


def forward(problem, out: torch.Tensor, lse: torch.Tensor, config=None) -> None:
    """Launch the forward kernel on the current stream; see kernels/hopper/__init__.py.

    Writes out [B, Hq, Lq, D] and lse [B, Hq, Lq] (fp32, natural logarithm).
    """
    query = problem.query
    if not out.numel():
        lse.fill_(-math.inf)
        return
    if not problem.key.shape[2]:
        out.zero_()
        lse.fill_(-math.inf)
        return
    band = band_of(problem)
    problem = without_unseen(problem, band)
    config = config or forward_config(query.shape[-1], band.has_left or band.has_right)
    plan = forward_plan(problem, band, config, multiprocessors(query.device))
    target = writable(out)
    lengths = problem.key_lengths if problem.key_lengths is not None else lse
    with on_device(query):
        attention_forward[(plan.programs,)](
            tile_descriptor(query, 64),
            tile_descriptor(problem.key, config.block_n),
            tile_descriptor(problem.value, config.block_n),
            tile_descriptor(target, 64),
            lse,
            lengths,
            **plan.scalars,
            OPTIONS=plan.options,
            **compiler_options(config),
        )
    if target is not out:
        out.copy_(target)
