"""What may be at work beside eager autograd: transforms, modes, and tensors that PyTorch's dispatcher has to see."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def is_transformed() -> bool:
    """Is a functorch transform or forward-mode differentiation at work?"""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_intercepted() -> bool:
    """Does a mode, or torch.jit.trace, see every operator?"""
    return _len_torch_dispatch_stack() > 0 or _get_tracing_state() is not None


def is_eager() -> bool:
    """Is nothing but eager autograd at work?"""
    return not (is_compiling() or is_transformed() or is_intercepted())


def is_ordinary(tensor: Tensor | None) -> bool:
    """Has the tensor no rules of its own, and does its memory hold its values as they are?

    The older vmap (``torch.autograd.grad(..., is_grads_batched=True)`` and what builds on it) is no functorch
    transform: only its tensors tell that it is at work. PyTorch's dispatcher calls operators for each example.
    """
    return tensor is None or (
        type(tensor) in PLAIN_TENSORS
        and (tensor.is_cpu or tensor.is_cuda)
        and not (tensor.is_neg() or tensor._is_zerotensor() or is_legacy_batchedtensor(tensor))
    )


def is_observed(tensors: Iterable[Tensor | None]) -> bool:
    """Must a call with these pass PyTorch's dispatcher, because something other than eager autograd watches it?"""
    return is_intercepted() or not all(map(is_ordinary, tensors))
