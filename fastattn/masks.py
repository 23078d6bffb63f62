"""The masks of ``nn.MultiheadAttention``, in the form that the engines take.

The engines skip keys past ``key_lengths`` at no cost, and read one bool mask and one bias that
broadcast; here the module's two masks become those, without expanding either to [N, H, L, S].
In this file True means "attend", unlike in the module's arguments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.eager import is_eager, is_ordinary


class Masks(NamedTuple):
    """The mask fields of :class:`fastattn.problem.Arguments`."""

    attn_mask: Tensor | None  # bool [N|1, H|1, L|1, S|1]
    bias: Tensor | None  # float, likewise
    key_lengths: Tensor | None  # int64 [N]
    causal: str | None


def combine_masks(
    query: Tensor,
    keys: int,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    extra_keys: int = 0,
) -> Masks:
    """The engines' form of an attention module's masks.

    Args:
        query: [N, H, L, D], the projected queries, for sizes, dtype and device.
        keys: S, without the extra ones.
        attn_mask: bool (True = masked out) or float (added), 2-D [L, S], 3-D [N * H, L, S] or 4-D,
            broadcastable to [N, H, L, S].
        key_padding_mask: bool or float [N, S], likewise.
        is_causal: query i attends to keys up to i; the extra keys are open to all.
        extra_keys: keys appended after the others, which no mask covers.
    """
    batch, heads, queries, _ = query.shape
    allowed, bias = _attention_mask(attn_mask, batch, heads, query.dtype)
    kept, padding_bias = _padding_mask(key_padding_mask, query.dtype)
    key_lengths = None
    if extra_keys == 0 and keys > 0 and key_padding_mask is not None:
        kept, padding_bias, key_lengths = _split_off_trailing_padding(kept, padding_bias)
    if extra_keys > 0:
        if is_causal:
            causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
            allowed = causal if allowed is None else allowed & causal
            is_causal = False
        allowed, kept = (_padded(mask, keys, extra_keys, True) for mask in (allowed, kept))
        bias, padding_bias = (_padded(mask, keys, extra_keys, 0.0) for mask in (bias, padding_bias))

    if padding_bias is not None:
        padding_bias = padding_bias[:, None, None, :]
        bias = padding_bias if bias is None else bias + padding_bias
    if kept is not None:
        kept = kept[:, None, None, :]
        if allowed is None:
            allowed = kept
        elif bias is None:
            # A mask and a bias that both broadcast need less memory than their combination.
            bias = torch.zeros_like(kept, dtype=query.dtype).masked_fill(~kept, -torch.inf)
        else:
            allowed = allowed & kept
    return Masks(allowed, bias, key_lengths, "upper_left" if is_causal else None)


def _attention_mask(
    attn_mask: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """(True = attend, bias): one of them, 4-D."""
    if attn_mask is None:
        return None, None
    if attn_mask.dim() == 2:
        attn_mask = attn_mask[None, None]
    elif attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (batch, heads))
    return (~attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask.to(dtype))


def _padding_mask(key_padding_mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(True = attend, bias): one of them, [N, S].

    nn.TransformerEncoderLayer turns bool masks into 0 and -inf; where looking costs little, they
    are turned back.
    """
    if key_padding_mask is None:
        return None, None
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask, None
    if _can_look_at(key_padding_mask) and not key_padding_mask.requires_grad:
        kept = key_padding_mask == 0
        if torch.equal(kept, key_padding_mask != -torch.inf):
            return kept, None
    return None, key_padding_mask.to(dtype)


def _split_off_trailing_padding(
    kept: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is left of the mask, and key lengths [N] that end at the last key that is not padding."""
    attended = kept if kept is not None else bias != -torch.inf
    last = torch.arange(1, attended.shape[1] + 1, device=attended.device)
    key_lengths = (attended * last).amax(dim=1)
    if kept is not None and _can_look_at(kept) and torch.equal(attended.sum(dim=1), key_lengths):
        kept = None
    return kept, bias, key_lengths


def _can_look_at(tensor: Tensor) -> bool:
    """May its values decide what to compute, without waiting for a GPU or breaking a trace?"""
    return tensor.is_cpu and is_eager() and is_ordinary(tensor)


def _padded(mask: Tensor | None, keys: int, extra_keys: int, value: bool | float) -> Tensor | None:
    if mask is None:
        return None
    return F.pad(mask.expand(*mask.shape[:-1], keys), (0, extra_keys), value=value)
