"""PyTorch's threads do not survive a fork: a child whose parent had used them waits for them forever.

That happens in a child that sets several threads (torch.set_num_threads; one is what data loaders set), at the
first operation of PyTorch's on more than 32768 elements. The C++ engine computes serially after a fork; so does
what this package asks of PyTorch around it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

_is_forked = False


def _notice_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_notice_fork)


def serial_after_fork(function: Callable) -> Callable:
    """The function, whose operations of PyTorch's take one thread in a process that has been forked."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if not _is_forked or (threads := torch.get_num_threads()) == 1:
            return function(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return wrapped
