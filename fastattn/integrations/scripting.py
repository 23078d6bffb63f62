"""torch.jit.script: the forward of :class:`fastattn.MultiHeadAttention` in the language that TorchScript compiles.

That language has neither NamedTuple methods nor a look at what is in a mask, so the masks are joined in their
plainest form. The operators are those of every call; a scripted model that is loaded in another process needs
``import fastattn`` there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    batch_first: bool,
    in_proj_weight: Tensor | None,
    separate_weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    in_proj_bias: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """The heads, merged, [N, L, E] or as query lies, and the weights or None; see the module's forward."""
    is_batched = query.dim() == 3
    if not is_batched:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    elif not batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    query, key, value = project(query, key, value, in_proj_weight, separate_weights, in_proj_bias)
    queries, keys, extra_keys = query.size(1), key.size(1), 0
    if extra_key is not None and extra_value is not None:
        key = torch.cat([key, extra_key.to(key.dtype).expand(key.size(0), 1, key.size(2))], dim=1)
        value = torch.cat([value, extra_value.to(value.dtype).expand(value.size(0), 1, value.size(2))], dim=1)
        extra_keys += 1
    if add_zero_attn:
        key, value = F.pad(key, [0, 0, 0, 1]), F.pad(value, [0, 0, 0, 1])
        extra_keys += 1
    query, key, value = (split_heads(query, num_heads), split_heads(key, num_heads), split_heads(value, num_heads))
    allowed, bias = join_masks(query, key_padding_mask, attn_mask)
    causal: str | None = None
    if is_causal and extra_keys > 0:
        lower = torch.ones([queries, keys], dtype=torch.bool, device=query.device).tril()[None, None]
        allowed = lower if allowed is None else torch.logical_and(allowed, lower)
    elif is_causal:
        causal = "upper_left"
    if extra_keys > 0:
        if allowed is not None:
            allowed = F.pad(allowed, [0, extra_keys], value=1.0)
        if bias is not None:
            bias = F.pad(bias, [0, extra_keys])
    rng_state: Tensor | None = None
    if dropout_p > 0.0:
        rng_state = torch.randint(0, 9223372036854775807, [2], dtype=torch.int64, device=query.device)
    results = torch.ops.fastattn.attention_forward(
        query, key, value, allowed, bias, None, None, causal, None, None, dropout_p, rng_state, backend
    )
    out, lse = results[0], results[1]
    weights: Tensor | None = None
    if need_weights:
        weights = torch.ops.fastattn.attention_weights(
            lse.detach(),
            average_attn_weights,
            *(query, key, value, allowed, bias, None, None, causal, None, None, dropout_p, rng_state, backend),
        ).to(out.dtype)
        if not is_batched:
            weights = weights.squeeze(0)
    merged = out.transpose(1, 2).flatten(2)
    if not is_batched:
        merged = merged.squeeze(0)
    elif not batch_first:
        merged = merged.transpose(0, 1)
    return merged, weights


def project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_proj_weight: Tensor | None,
    separate_weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    in_proj_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections, each by its own matrix."""
    query_weight, key_weight, value_weight = separate_weights
    if in_proj_weight is not None:
        query_weight, key_weight, value_weight = in_proj_weight.chunk(3)
    assert query_weight is not None and key_weight is not None and value_weight is not None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    value_bias: Tensor | None = None
    if in_proj_bias is not None:
        query_bias, key_bias, value_bias = in_proj_bias.chunk(3)
    return (
        F.linear(query, query_weight, query_bias),
        F.linear(key, key_weight, key_bias),
        F.linear(value, value_weight, value_bias),
    )


def split_heads(projected: Tensor, num_heads: int) -> Tensor:
    """[N, L, E] -> a view [N, H, L, D]."""
    return projected.unflatten(-1, [num_heads, projected.size(-1) // num_heads]).transpose(1, 2)


def join_masks(
    query: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(True = attend, bias), broadcastable to [N, H, L, S], of the module's two masks, True = masked out."""
    allowed: Tensor | None = None
    bias: Tensor | None = None
    if attn_mask is not None:
        if attn_mask.dim() == 2:
            attn_mask = attn_mask[None, None]
        elif attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, [query.size(0), query.size(1)])
        if attn_mask.dtype == torch.bool:
            allowed = torch.logical_not(attn_mask)
        else:
            bias = attn_mask.to(query.dtype)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
        if key_padding_mask.dtype == torch.bool:
            kept = torch.logical_not(key_padding_mask)
            allowed = kept if allowed is None else torch.logical_and(allowed, kept)
        else:
            key_padding_mask = key_padding_mask.to(query.dtype)
            bias = key_padding_mask if bias is None else bias + key_padding_mask
    return allowed, bias
