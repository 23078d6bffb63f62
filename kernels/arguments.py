"""From a problem to what every kernel takes: pointers, strides, the band, and compile-time switches."""

import functools

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
#: Bytes of K and V (or Q and dO) that may share the L2 cache.
SHARED_CACHE = 32 * 2**20


def padded(head_dim: int) -> int:
    """The head dimension inside a kernel: a power of two of at least 16, as tl.dot takes it."""
    return max(16, triton.next_power_of_2(head_dim))


def band(problem) -> dict:
    """Causality and window as keys [position - left, position + right]; a side too wide to matter is open."""
    widest = problem.query.shape[2] + problem.key.shape[2]
    left, right = problem.window_left, problem.window_right
    if problem.causal is not None:
        right = 0 if right is None else min(right, 0)
    has_left = left is not None and left < widest
    has_right = right is not None and right < widest
    return {
        "left": left if has_left else 0,
        "right": right if has_right else 0,
        "HAS_LEFT": has_left,
        "HAS_RIGHT": has_right,
        "LOWER_RIGHT": problem.causal == "lower_right",
    }


def _strides(prefix: str, tensor: torch.Tensor | None, names: str) -> dict:
    values = tensor.stride() if tensor is not None else (0,) * len(names)
    return {f"stride_{prefix}{name}": value for name, value in zip(names, values, strict=False)}


def head_strides(name: str, tensor: torch.Tensor) -> dict:
    """The strides of the batch, the head and the row of a [B, H, L, D] tensor, as ``stride_{name[0]}..``."""
    row = "n" if name in ("k", "v", "dk", "dv") else "m"
    return _strides(name, tensor, "bh" + row)


def problem_arguments(problem) -> dict:
    """The keyword arguments that all attention kernels share."""
    query, key, value = problem.query, problem.key, problem.value
    D, DV = query.shape[-1], value.shape[-1]
    dropout = problem.dropout_p > 0
    mask = problem.attn_mask.view(torch.uint8) if problem.attn_mask is not None else None
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_lengths": problem.key_lengths,
        "mask": mask,
        "bias": problem.bias,
        "rng_state": problem.rng_state if dropout else None,
        **head_strides("q", query),
        **head_strides("k", key),
        **head_strides("v", value),
        **_strides("mask_", problem.attn_mask, "bhmn"),
        **_strides("bias_", problem.bias, "bhmn"),
        "Lq": query.shape[2],
        "Lk": key.shape[2],
        "heads": query.shape[1],
        "group": problem.group_size,
        **band(problem),
        "scale": problem.scale * LOG2_E,
        "threshold": int(problem.dropout_p * 2**32) - 2**31,
        "keep_scale": 1.0 / (1.0 - problem.dropout_p),
        "D": D,
        "DV": DV,
        "BLOCK_D": padded(D),
        "BLOCK_DV": padded(DV),
        "POSITIVE_SCALE": problem.scale > 0,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
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


#: Set while kernels are compiled for a device that is not there (offline.py).
assumed_architecture: int | None = None


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
