"""What the Hopper kernels can take, as reasons why they cannot."""

import functools
import os

import torch

#: Head dimensions by direction; a problem that may be differentiated must be among both.
HEAD_DIMS = {"forward": (64, 128, 256), "backward": (64, 128)}
#: TMA takes base addresses and strides in units of this many bytes.
TMA_ALIGNMENT = 16


@functools.cache
def _environment_reason() -> str | None:
    try:
        from triton.experimental.gluon.language.nvidia import hopper  # noqa: F401
    except ImportError as error:
        return f"Gluon for Hopper is not in this Triton: {error}"
    return None


@functools.cache
def _device_reason(index: int) -> str | None:
    if torch.version.hip:
        return "the Hopper kernels need an NVIDIA device"
    major, minor = torch.cuda.get_device_capability(index)
    if major != 9:
        return f"the Hopper kernels need capability 9.x, the device has {major}.{minor}"
    return None


def tma_reason(name: str, tensor: torch.Tensor) -> str | None:
    """Why TMA cannot address a tensor [B, H, L, D], or None."""
    size = tensor.element_size()
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return f"{name}'s last stride is {tensor.stride(-1)}, not 1"
    if tensor.data_ptr() % TMA_ALIGNMENT:
        return f"{name} is not aligned to {TMA_ALIGNMENT} bytes"
    for length, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if length > 1 and (stride <= 0 or stride * size % TMA_ALIGNMENT):
            return f"{name}'s strides {tuple(tensor.stride())} are not positive multiples of {TMA_ALIGNMENT} bytes"
    return None


def problem_reasons(problem, direction: str = "backward") -> list[str]:
    """The reasons that lie in the problem alone, whatever the device."""
    found = []
    head_dims = HEAD_DIMS[direction]
    query, key, value = problem.query, problem.key, problem.value
    if query.dtype not in (torch.bfloat16, torch.float16):
        found.append(f"the Hopper kernels take bfloat16 and float16, not {query.dtype}")
    if query.shape[-1] != value.shape[-1] or query.shape[-1] not in head_dims:
        found.append(
            f"the Hopper kernels take equal head dimensions of {head_dims}, not {query.shape[-1]} and {value.shape[-1]}"
        )
    if problem.attn_mask is not None or problem.bias is not None:
        found.append("the Hopper kernels take no attn_mask")
    if problem.dropout_p:
        found.append("the Hopper kernels take no dropout")
    if not problem.scale > 0:
        found.append(f"the Hopper kernels take a positive scale, not {problem.scale}")
    if query.numel() and key.numel():
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            reason = tma_reason(name, tensor)
            if reason:
                found.append(reason)
    return found


def reasons(problem, direction: str = "backward") -> list[str]:
    """Why the Hopper kernels cannot take a problem; [] means that they can.

    ``direction`` "backward" asks for both directions, "forward" for that one alone, which takes larger head
    dimensions.  FASTATTN_HOPPER=0 turns the kernels off.
    """
    if os.environ.get("FASTATTN_HOPPER", "1") == "0":
        return ["FASTATTN_HOPPER=0"]
    if not problem.query.is_cuda:
        return ["the Hopper kernels need a CUDA device"]
    reason = _environment_reason() or _device_reason(problem.query.get_device())
    return [reason] if reason else problem_reasons(problem, direction)
