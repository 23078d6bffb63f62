"""From a problem to what every kernel takes: its tensors as operands, the band, and compile-time options."""

import functools
from contextlib import nullcontext

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Config
from .operands import Dropout, Options, Rows, Scores, Sizes

LOG2_E = 1.4426950408889634
#: Bytes of K and V (or Q and dO) that may share the L2 cache.
SHARED_CACHE = 32 * 2**20


def padded(head_dim: int) -> int:
    """The head dimension inside a kernel: a power of two of at least 16, as tl.dot takes it."""
    return max(16, 1 << (head_dim - 1).bit_length())


def rows_of(tensor: torch.Tensor | None) -> Rows | None:
    """A tensor [B, H, L, D] as an operand."""
    return None if tensor is None else Rows(tensor, *tensor.stride()[:3])


def scores_of(tensor: torch.Tensor | None) -> Scores | None:
    """A mask or bias as an operand; bool as bytes."""
    if tensor is None:
        return None
    return Scores(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, *tensor.stride())


def dropout_of(problem) -> Dropout | None:
    if not problem.dropout_p > 0:
        return None
    threshold = int(problem.dropout_p * 2**32) - 2**31
    keep_scale = 1.0 / (1.0 - problem.dropout_p) if problem.dropout_p < 1 else 0.0  # of 1, nothing is kept
    return Dropout(problem.rng_state, threshold, keep_scale)


def edges(problem) -> tuple[int | None, int | None]:
    """Causality and window as keys [position - left, position + right]; a side too wide to matter is None."""
    widest = problem.query.shape[2] + problem.key.shape[2]
    left, right = problem.window_left, problem.window_right
    if problem.causal is not None:
        right = 0 if right is None else min(right, 0)
    return tuple(side if side is not None and side < widest else None for side in (left, right))


def options_of(problem, config: Config) -> Options:
    """What a kernel is compiled for."""
    left, right = edges(problem)
    D, DV = problem.query.shape[-1], problem.value.shape[-1]
    return Options(
        D=D,
        DV=DV,
        block_d=padded(D),
        block_dv=padded(DV),
        block_m=config.block_m,
        block_n=config.block_n,
        has_left=left is not None,
        has_right=right is not None,
        lower_right=problem.causal == "lower_right",
        positive_scale=problem.scale > 0,
        precision="ieee" if problem.query.dtype == torch.float32 else "tf32",
        chunk=config.chunk or padded(max(D, DV)),
    )


def sizes_of(problem) -> Sizes:
    return Sizes(problem.query.shape[2], problem.key.shape[2], problem.query.shape[1], problem.group_size)


def launch_arguments(problem, config: Config) -> dict:
    """The keyword arguments that all attention kernels share, the launch's own among them."""
    left, right = edges(problem)
    return {
        "query": rows_of(problem.query),
        "key": rows_of(problem.key),
        "key_lengths": problem.key_lengths,
        "mask": scores_of(problem.attn_mask),
        "bias": scores_of(problem.bias),
        "sizes": sizes_of(problem),
        "left": left or 0,
        "right": right or 0,
        "scale": problem.scale * LOG2_E,
        "OPTIONS": options_of(problem, config),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def tensors_of(problem) -> dict[str, torch.Tensor | None]:
    """The problem's tensors by the names of the kernels' parameters that hold them."""
    return {
        "query": problem.query,
        "key": problem.key,
        "value": problem.value,
        "key_lengths": problem.key_lengths,
        "mask": problem.attn_mask,
        "bias": problem.bias,
        "dropout": problem.rng_state,
    }


def heads_together(heads: int, *tensors: torch.Tensor) -> int:
    """How many of ``heads`` heads take turns: those whose rows of these [B, H, L, D] tensors share the L2 cache."""
    per_head = sum(tensor.shape[2] * tensor.shape[3] * tensor.element_size() for tensor in tensors)
    return max(1, min(heads, SHARED_CACHE // per_head))


def legal_strides(tensor: torch.Tensor) -> list[int]:
    """The strides in elements, with legal ones for the dimensions of size 1, whose strides mean nothing."""
    row = tensor.shape[-1] * tensor.element_size() // 16 * 16 // tensor.element_size() or 16
    return [stride if size > 1 else row for size, stride in zip(tensor.shape, tensor.stride(), strict=True)][:-1] + [1]


def tma_ready(*tensors: torch.Tensor) -> bool:
    """Whether TMA can address rows of these [B, H, L, D] tensors: addresses and strides in units of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in legal_strides(tensor)[:-1])
        for tensor in tensors
    )


def descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of [B, H, L, D] in boxes of ``rows`` rows of one head; it reads zeros outside."""
    box = [1, 1, rows, padded(tensor.shape[-1])]
    return TensorDescriptor(tensor, list(tensor.shape), legal_strides(tensor), box)


def boxes(config: Config, rows: int, **tensors: torch.Tensor) -> dict:
    """TMA descriptors of these tensors in boxes of ``rows`` rows as ``NAME_boxes``, or None where TMA is not to be."""
    first = next(iter(tensors.values()))
    able = architecture_of(first) >= 90 or not first.is_cuda
    by_tma = config.tma and able and tma_ready(*tensors.values())
    return {f"{name}_boxes": descriptor(tensor, rows) if by_tma else None for name, tensor in tensors.items()}


_as_it_is = nullcontext()


def on_device(tensor: torch.Tensor):
    """The tensor's device as the current one, which it mostly is already."""
    index = tensor.get_device()  # -1 for the CPU
    return _as_it_is if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


#: Set while kernels are compiled for a device that is not there (offline.py).
assumed_architecture: int | None = None
#: Of that device; the interpreter counts as few.
assumed_multiprocessors = 4


@functools.cache
def architecture(index: int) -> int:
    """The capability of a device as one number: 80, 90, 100..."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture_of(tensor: torch.Tensor) -> int:
    """The architecture to choose configurations for; the interpreter counts as 80."""
    if assumed_architecture is not None:
        return assumed_architecture
    return architecture(tensor.get_device()) if tensor.is_cuda else 80


@functools.cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors_of(tensor: torch.Tensor) -> int:
    """The multiprocessors to divide work among."""
    return multiprocessors(tensor.get_device()) if tensor.is_cuda else assumed_multiprocessors
