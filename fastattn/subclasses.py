"""Subclasses of torch.Tensor: what one means may lie in its rules (``__torch_function__``), not in its memory.

Engines read memory. One that only dispatches (``__torch_dispatch__``) meets its rules at the operators; one without
rules of its own is read like any tensor.
"""

from __future__ import annotations

from types import NoneType

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl
from torch.overrides import has_torch_function

from fastattn.eager import PLAIN_TENSORS

_WITHOUT_RULES = frozenset((*PLAIN_TENSORS, NoneType, list))


def has_rules(*arguments: object) -> bool:
    """Is one of a call's arguments to be asked first, as torch's functions do (``handle_torch_function``)?"""
    if _WITHOUT_RULES.issuperset(map(type, arguments)):
        return False
    asked = [x for x in arguments if type(x) not in _WITHOUT_RULES and hasattr(type(x), "__torch_function__")]
    return len(asked) > 0 and has_torch_function([x for x in asked if not is_causal_bias(x)])


def check_no_rules(name: str, tensor: Tensor) -> None:
    """Raise TypeError for a mask or lengths of which torch's functions would not read the memory."""
    given = type(tensor)
    if given in PLAIN_TENSORS:
        return
    function = given.__torch_function__
    if getattr(function, "__func__", function) not in (
        Tensor.__torch_function__.__func__,
        _disabled_torch_function_impl,
    ):
        raise TypeError(
            f"{name} must be a torch.Tensor whose values are in its memory, got {given.__name__}, which has rules of "
            f"its own (__torch_function__): give a plain tensor of its values"
        )


def is_causal_bias(mask: object) -> bool:
    """Is it one of ``torch.nn.attention.bias.causal_upper_left`` and ``causal_lower_right``, which hold no values?"""
    if type(mask) in _WITHOUT_RULES or not isinstance(mask, Tensor):
        return False
    from torch.nn.attention.bias import CausalBias  # costs an import of torch's compiler, unless the mask is one

    return isinstance(mask, CausalBias)


def causal_of(mask: Tensor, queries: int, keys: int) -> str:
    """The ``causal`` that a causal bias means, "upper_left" where both are the same."""
    from torch.nn.attention.bias import CausalVariant

    if (mask.seq_len_q, mask.seq_len_kv) != (queries, keys):
        raise ValueError(
            f"attn_mask, a causal bias, must have the sizes of queries and keys {[queries, keys]}, "
            f"got {[mask.seq_len_q, mask.seq_len_kv]}"
        )
    return "upper_left" if queries == keys or mask.variant == CausalVariant.UPPER_LEFT else "lower_right"


def materialized(mask: Tensor, device: torch.device) -> Tensor:
    """A causal bias as a bool mask [Lq, Lk], True = attend."""
    from torch.nn.attention.bias import CausalVariant

    offset = 0 if mask.variant == CausalVariant.UPPER_LEFT else mask.seq_len_kv - mask.seq_len_q
    return torch.ones(mask.seq_len_q, mask.seq_len_kv, dtype=torch.bool, device=device).tril(offset)
