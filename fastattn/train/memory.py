"""Is there room for a model?  To be asked before it is built: who takes memory that is not there is killed."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from fastattn.train.errors import TrainingError


def build(model: type[nn.Module], config: Any) -> nn.Module:
    """``model(config)``, if :func:`require_room` finds room for it."""
    require_room(model, config)
    return model(config)


def require_room(model: type[nn.Module], config: Any) -> None:
    """Raise unless ``model(config)`` can be built and trained.

    Raises:
        TrainingError: its weights, their gradients and AdamW's two moments are more than the machine's memory.
    """
    with torch.device("meta"):  # shapes alone
        empty = model(config)
    numbers = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    needed, available = 4 * 4 * numbers, physical_memory()
    if needed > available:
        raise TrainingError(
            f"{model.__name__}: {numbers:.1e} weights need {needed / 2**30:.1e} GiB to train, this machine has "
            f"{available / 2**30:.1f} GiB; make embed_dim, feedforward_dim, max_length or the number of layers smaller"
        )


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def is_lack_of_memory(error: Exception) -> bool:
    """Does the error say that memory was asked for that is not there?  torch raises a RuntimeError on a CPU."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        phrase in text for phrase in ("can't allocate memory", "not enough memory", "calculation overflowed")
    )
