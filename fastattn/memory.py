"""Memory for large results on a CPU: huge pages, kept from one result for the next.

Fresh memory has to be zeroed by the system, and faulted in page by page: a tenth of what attention takes in a
training step. On Linux, where transparent huge pages are on or to be had on request, results lie on those. All
this needs torch 2.10 or later; before, torch's allocator serves.

Environment:
    FASTATTN_KEPT_MIB: how many MiB that results have left are kept at most for later ones; 128 by default, 0
        gives all memory back to the system at once.
"""

from __future__ import annotations

import math
import os
import sys

import torch
from torch import Tensor

from fastattn.backends import cpu

HUGE_PAGE = 2 << 20
#: Results of at least this many bytes are worth it.
LARGE = HUGE_PAGE


def new_empty_strided(
    tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """``tensor.new_empty_strided(...)`` for dense strides; a large one on a CPU starts on a huge page."""
    dtype = dtype or tensor.dtype
    is_large = tensor.device.type == "cpu" and math.prod(shape) * dtype.itemsize >= LARGE
    if not is_large or not cpu.makes_results():
        return tensor.new_empty_strided(shape, strides, dtype=dtype)
    return cpu.new_result(shape, strides, dtype)


def new_contiguous(tensor: Tensor, last_size: int) -> Tensor | None:
    """The same in one call for a contiguous [B, H, L, D] tensor; None for any other, and for a small result."""
    if not tensor.is_cpu or not cpu.makes_results():
        return None
    return cpu.new_result_like(tensor, last_size, LARGE)


def new_zeros(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``tensor.new_zeros(shape, dtype=dtype)``, likewise."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return new_empty_strided(tensor, shape, strides, dtype).zero_()


def keep_at_most(mebibytes: int) -> None:
    """Keep no more than this for later results from now on; 0 gives all back to the system."""
    if mebibytes < 0:
        raise ValueError(f"mebibytes must be at least 0, got {mebibytes}")
    cpu.keep_results(min(mebibytes << 20, sys.maxsize))


def kept() -> int:
    """Bytes that are kept for later results now."""
    return cpu.kept_results()


def _limit_from_environment() -> int:
    given = os.environ.get("FASTATTN_KEPT_MIB", "128")
    if not given.isdecimal():
        raise ValueError(f"FASTATTN_KEPT_MIB must be a whole number of MiB, at least 0, got {given!r}")
    return int(given)


if cpu.makes_results():
    keep_at_most(_limit_from_environment())
