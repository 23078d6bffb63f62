"""What the Hopper kernels can take, as reasons why they cannot."""

import functools
import os

import torch

from .plan import band_of

#: (smallest, largest) head dimension.  Below, tiles of 64 columns would be half empty, and the plain kernels have
#: smaller ones.
HEAD_DIMS = (40, 256)
#: TMA takes base addresses and strides in units of this many bytes; rows of 16-bit elements make head dimensions
#: multiples of HEAD_DIM_STEP.
TMA_ALIGNMENT = 16
HEAD_DIM_STEP = 8
#: A position, plus a bound of a band, must stay below 2^31.
LONGEST = 2**29
#: Rows of the statistics, padded by head to a multiple of ROWS_OF_A_HEAD, are numbered in 32 bits.
MOST_ROWS = 2**31
ROWS_OF_A_HEAD = 128
#: The releases of Triton whose machine code was read, and the ptxas each brings for Hopper: which products ptxas runs
#: one by one differs from release to release.  benchmarks/results/hopper_compile_report_triton_*.md say what was found.
CHECKED_TRITON = {(3, 6): "12.8", (3, 7): "12.8", (3, 8): "12.9", (3, 9): "13.4"}


def triton_reason(version: str) -> str | None:
    """Why the kernels are not to be compiled with a version of Triton, or None."""
    if tuple(int(part) for part in version.split(".")[:2]) in CHECKED_TRITON:
        return None
    checked = ", ".join(f"{major}.{minor}" for major, minor in CHECKED_TRITON)
    return (
        f"Triton {version} may run the Hopper kernels' products one by one: their machine code was read for {checked} "
        "(FASTATTN_HOPPER=1 uses them all the same)"
    )


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


def size_reasons(problem) -> list[str]:
    """Head dimensions without a tile, and sizes past what the kernels count in."""
    found = []
    B, Hq, Lq, D = problem.query.shape
    Lk, Dv = problem.key.shape[2], problem.value.shape[3]
    smallest, largest = HEAD_DIMS
    if Dv != D or not smallest <= D <= largest or D % HEAD_DIM_STEP:
        found.append(
            f"the Hopper kernels take equal head dimensions of {smallest} to {largest} in steps of {HEAD_DIM_STEP}, "
            f"not {D} and {Dv}"
        )
    if max(Lq, Lk) >= LONGEST:
        found.append(f"the Hopper kernels take sequences shorter than {LONGEST}, not {Lq} and {Lk}")
    rows = B * Hq * -(-Lq // ROWS_OF_A_HEAD) * ROWS_OF_A_HEAD
    if rows >= MOST_ROWS:
        found.append(f"the Hopper kernels take fewer than {MOST_ROWS} padded rows of queries, not {rows}")
    return found


def problem_reasons(problem) -> list[str]:
    """The reasons that lie in the problem alone, whatever the device."""
    found = size_reasons(problem)
    query, key, value = problem.query, problem.key, problem.value
    if query.dtype not in (torch.bfloat16, torch.float16):
        found.append(f"the Hopper kernels take bfloat16 and float16, not {query.dtype}")
    if problem.attn_mask is not None or problem.bias is not None:
        found.append("the Hopper kernels take no attn_mask")
    if problem.dropout_p:
        found.append("the Hopper kernels take no dropout")
    if problem.key_lengths is not None and problem.causal == "lower_right" and band_of(problem).has_left:
        found.append("the Hopper kernels take no left bound of a window that ends at each sequence's own last key")
    if not problem.scale > 0:
        found.append(f"the Hopper kernels take a positive scale, not {problem.scale}")
    if query.numel() and key.numel():
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            reason = tma_reason(name, tensor)
            if reason:
                found.append(reason)
    return found


def orders() -> tuple[bool, str | None]:
    """What decides, beside the call, in which order parts of dQ may be added."""
    return torch.are_deterministic_algorithms_enabled(), os.environ.get("FASTATTN_HOPPER_UNORDERED")


def reasons(problem) -> list[str]:
    """Why the Hopper kernels cannot take a problem; [] means that they can.

    FASTATTN_HOPPER=0 turns the kernels off, FASTATTN_HOPPER=1 asks for them whatever the version of Triton.
    """
    wish = os.environ.get("FASTATTN_HOPPER")
    if wish == "0":
        return ["FASTATTN_HOPPER=0"]
    if not problem.query.is_cuda:
        return ["the Hopper kernels need a CUDA device"]
    reason = _environment_reason() or _device_reason(problem.query.get_device())
    if reason is None and wish != "1":
        import triton

        reason = triton_reason(triton.__version__)
    return [reason] if reason else problem_reasons(problem)
