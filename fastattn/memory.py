"""Memory for large results."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from fastattn._C import prefer_huge_pages
except ImportError:

    def prefer_huge_pages(data: int, size: int) -> None:
        """Without the extension, pages are what they are."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """:func:`torch.zeros`, on a CPU in huge pages where they save time."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor.zero_()
