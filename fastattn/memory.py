"""Memory for large results on a CPU: huge pages, because small ones take longer to fault in than to fill.

On Linux, where transparent huge pages are on or to be had on request.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    from fastattn._C import prefer_huge_pages
except ImportError:

    def prefer_huge_pages(data: int, size: int) -> None:
        """Without the extension, pages are what they are."""


HUGE_PAGE = 2 << 20
#: Results of at least this many bytes are worth it.
LARGE = HUGE_PAGE


def new_empty_strided(
    tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """``tensor.new_empty_strided(...)`` for dense strides; a large one on a CPU starts on a huge page.

    Its storage begins up to 2 MiB earlier, in addresses that are reserved but never touched.
    """
    dtype = dtype or tensor.dtype
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or tensor.device.type != "cpu":
        return tensor.new_empty_strided(shape, strides, dtype=dtype)
    buffer = tensor.new_empty((size + HUGE_PAGE) // dtype.itemsize, dtype=dtype)
    first = -buffer.data_ptr() % HUGE_PAGE // dtype.itemsize
    # Not a view of the buffer: autograd would forbid to change an output in place.
    result = buffer.new_empty(0).set_(buffer.untyped_storage(), first, shape, strides)
    prefer_huge_pages(result.data_ptr(), size)
    return result


def new_zeros(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``tensor.new_zeros(shape, dtype=dtype)``, likewise."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return new_empty_strided(tensor, shape, strides, dtype).zero_()
