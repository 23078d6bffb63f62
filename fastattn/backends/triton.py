"""The GPU backend: plain Triton kernels, and on Hopper the warp-specialised ones for what they take.

With ``TRITON_INTERPRET=1`` set before Triton is imported it takes CPU tensors, for checking.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastattn.eager import is_ordinary
from fastattn.problem import Problem, is_canonical

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 512
LEAST_CAPABILITY = (8, 0)
LSE_IS_OPTIONAL = False
KEEPS_RESIDUAL = False


@cache
def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them; its interpreter is mended if so."""
    import triton

    if not triton.knobs.runtime.interpret:
        return False
    from fastattn.kernels import interpreter

    interpreter.mend()
    return True


@cache
def unavailable() -> str | None:
    """Why the backend cannot be used at all, else None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error}): pip install triton==3.6.0"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"Triton {triton.__version__} is too old: 3.6 or newer is needed"
    if not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


@cache
def device_reason(index: int) -> str | None:
    """Why a CUDA device is too old or not NVIDIA's, else None."""
    if torch.version.hip:
        return "AMD devices are not supported"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"{name} has capability {capability[0]}.{capability[1]}, 8.0 or newer is needed"
    return None


def reasons(problem: Problem) -> list[str]:
    """Why the backend cannot take the problem; empty if it can."""
    query = problem.query
    why = []
    if query.is_cuda:
        reason = device_reason(query.get_device())
        why += [reason] if reason else []
    elif not (query.device.type == "cpu" and interpreted()):
        why.append(f"the tensors are on {query.device}, not on a CUDA device")
    if query.dtype not in DTYPES:
        why.append(f"dtype {query.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}")
    largest = max(query.shape[-1], problem.value.shape[-1])
    if largest > LARGEST_HEAD_DIM:
        why.append(f"the head dimension is {largest}, over {LARGEST_HEAD_DIM}")
    if max(query.shape[2], problem.key.shape[2]) >= 2**30:
        why.append("a sequence is longer than 2^30")
    return why


def is_on_gpu(tensor: Tensor) -> bool:
    return getattr(tensor, "is_cuda", False) is True  # a proxy's is neither true nor false


def plain_head_dims(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[int, int] | None:
    """(D, Dv) if the kernels can compute a call of these alone, as they are given; None in any doubt."""
    is_plain = (
        is_on_gpu(query)
        and is_canonical(query, key, value, grouped)
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and is_ordinary(query)
        and is_ordinary(key)
        and is_ordinary(value)
        and unavailable() is None
        and not reasons(Problem(query, key, value, 1.0))
    )
    return (query.shape[3], value.shape[3]) if is_plain else None


@cache
def _module(name: str) -> ModuleType:
    """A module that needs Triton, imported when it is first wanted: an import statement takes 1 us each time."""
    return importlib.import_module(name)


def hopper_reasons(problem: Problem, direction: str) -> list[str]:
    """Why the plain kernels run the problem's "forward" or "backward", not the Hopper ones; empty if these do."""
    why = _module("fastattn.kernels.hopper").reasons(problem)
    if direction == "forward" and _module("fastattn.kernels.launch").splits_keys(problem):
        why = [*why, "so few queries split their keys over programs"]
    return why


def notes(problem: Problem) -> list[str]:
    """Which of the device's kernels run each pass of the problem, and why not the Hopper ones."""
    if not problem.query.is_cuda:
        return []
    found = []
    for direction in ("forward", "backward"):
        why = hopper_reasons(problem, direction)
        found.append(f"{direction}: " + (f"plain kernels, because {'; '.join(why)}" if why else "Hopper kernels"))
    return found


def _is_for_hopper(problem: Problem, direction: str, call) -> bool:
    """Whether :func:`hopper_reasons` has none, asked once of calls alike (kernels/remembered.py).

    The environment and a version of Triton may change from one to the next.
    """
    chosen_by = direction, os.environ.get("FASTATTN_HOPPER"), _module("triton").__version__
    return not call.once(chosen_by, hopper_reasons, problem, direction)


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    call = _module("fastattn.kernels.remembered").remembered(forward, problem, (out, lse))
    is_for_hopper = _is_for_hopper(problem, "forward", call)
    launch = _module("fastattn.kernels.hopper.launch" if is_for_hopper else "fastattn.kernels.launch")
    launch.forward(problem, out, lse, None, call)


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    common = (problem, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value)
    tensors, orders = (*common[1:], grad_bias), _module("fastattn.kernels.hopper.capability").orders()
    call = _module("fastattn.kernels.remembered").remembered(backward, problem, tensors, *orders)
    if grad_bias is None and _is_for_hopper(problem, "backward", call):
        _module("fastattn.kernels.hopper.launch_backward").backward(*common, None, call)
    else:
        _module("fastattn.kernels.launch").backward(*common, grad_bias, None, None, None, call)


def weights(problem: Problem, lse: Tensor, out: Tensor, average: bool) -> None:
    _module("fastattn.kernels.launch").weights(problem, lse, out, average)
