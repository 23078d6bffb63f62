"""Multi-head attention for the models: one set of weights, three implementations, a key/value cache.

The parameters are those of ``torch.nn.MultiheadAttention`` (``in_proj_weight``, ``in_proj_bias``,
``out_proj``), so state dicts move between the two.  ``implementation`` chooses what computes
softmax(QK^T)V: "fastattn" (this package), "torch" (``F.scaled_dot_product_attention``) or "naive"
(the score matrix written out), from the same weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastattn.integrations.symbolic import LeafModule

IMPLEMENTATIONS = ("fastattn", "torch", "naive")


def length_mask(key_lengths: torch.Tensor, length: int) -> torch.Tensor:
    """Bool ``[B, length]``, True at the positions below ``key_lengths`` ``[B]``."""
    return torch.arange(length, device=key_lengths.device) < key_lengths[:, None]


def _dense_mask(query, key, key_lengths, mask, causal):
    """All that forbids a key as one bool mask (True = attend), broadcastable to ``[B, H, Lq, Lk]``, or None."""
    if key_lengths is not None:
        valid = length_mask(key_lengths, key.shape[2])[:, None, None, :]
        mask = valid if mask is None else mask & valid
    if causal:
        lower = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = lower if mask is None else mask & lower
    return mask


def _fastattn(query, key, value, key_lengths, mask, causal, dropout_p):
    from fastattn import scaled_dot_product_attention

    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, key_lengths=key_lengths
    )


def _torch(query, key, value, key_lengths, mask, causal, dropout_p):
    if key_lengths is not None or mask is not None:
        mask, causal = _dense_mask(query, key, key_lengths, mask, causal), False
    return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, causal)


def naive_weights(query, key, key_lengths=None, mask=None, causal=False):
    """softmax(QK^T / sqrt(D)), ``[B, H, Lq, Lk]``; a row that may attend to nothing is zero.

    True in ``mask`` = attend.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    mask = _dense_mask(query, key, key_lengths, mask, causal)
    if mask is None:
        return scores.softmax(-1)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0.0)


def _naive(query, key, value, key_lengths, mask, causal, dropout_p):
    return F.dropout(naive_weights(query, key, key_lengths, mask, causal), dropout_p) @ value


_ATTEND = {"fastattn": _fastattn, "torch": _torch, "naive": _naive}


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    implementation: str = "fastattn",
) -> torch.Tensor:
    """softmax(QK^T / sqrt(D)) V for ``[B, H, L, D]`` tensors, by the named implementation.

    ``key_lengths`` int ``[B]`` (keys at or past it are padding), ``mask`` bool broadcastable to
    ``[B, H, Lq, Lk]`` (True = attend), ``causal`` (query i sees keys up to i).
    """
    return _ATTEND[implementation](query, key, value, key_lengths, mask, causal, dropout_p)


class KeyValueCache:
    """The projected keys and values of the positions decoded so far, ``[B, H, length, D]`` each.

    Memory for ``max_length`` positions is taken once; :meth:`append` writes in place and returns views.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.length = 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None:
            batch, heads, _, head_dim = key.shape
            self.keys = key.new_empty(batch, heads, self.max_length, head_dim)
            self.values = value.new_empty(batch, heads, self.max_length, value.shape[-1])
        end = self.length + key.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {end} are needed")
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order (beam search reorders its hypotheses)."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class Attention(LeafModule):
    """Multi-head attention over batch-first tensors, with ``nn.MultiheadAttention``'s parameters.

    Args:
        embed_dim, num_heads: E and H; the head dimension is E / H.
        dropout: on the attention weights, in training.
        implementation: one of :data:`IMPLEMENTATIONS`.
        rotary: applied to queries and keys after the projection, e.g. ``RotaryPositions(E // H)``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        implementation: str = "fastattn",
        rotary: nn.Module | None = None,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"attention must be one of {IMPLEMENTATIONS}, got {implementation!r}")
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.implementation = implementation
        self.rotary = rotary
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        *,
        key_lengths: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """``[B, Lq, E]`` from query ``[B, Lq, E]``, key and value ``[B, Lk, E]`` (default: query, key).

        Padding by ``key_lengths`` int ``[B]`` or ``key_padding_mask`` bool ``[B, Lk]`` (True = padding);
        ``mask`` bool, broadcastable to ``[B, H, Lq, Lk]``, True = attend, as in
        :func:`fastattn.scaled_dot_product_attention` and not as in :class:`fastattn.MultiHeadAttention`.
        With a ``cache`` (self-attention) the query is the next positions and sees all cached ones.
        """
        q, k, v = self._project(query, key, value, cache)
        if key_padding_mask is not None:
            valid = ~key_padding_mask[:, None, None, :]
            mask = valid if mask is None else mask & valid
        out = attend(
            q,
            k,
            v,
            key_lengths=key_lengths,
            mask=mask,
            causal=causal and cache is None,
            dropout_p=self.dropout if self.training else 0.0,
            implementation=self.implementation,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))  # [B, H, Lq, D] -> [B, Lq, E]

    def weights(self, query, key=None, *, key_lengths=None, key_padding_mask=None, causal=False):
        """The attention weights averaged over the heads, ``[B, Lq, Lk]``, for inspection.

        ``key_padding_mask`` as in :meth:`forward`: True = padding.
        """
        q, k, _ = self._project(query, key, key, None)
        mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        return naive_weights(q, k, key_lengths, mask, causal).mean(1)

    def project_memory(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the encoder's output, ``[B, H, Lk, D]`` each: once per decoded batch."""
        weight, bias = self.in_proj_weight[self.embed_dim :], self.in_proj_bias[self.embed_dim :]
        key, value = F.linear(memory, weight, bias).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def attend_projected(self, query, key, value, key_lengths=None) -> torch.Tensor:
        """Cross-attention of ``[B, Lq, E]`` queries to what :meth:`project_memory` gave, ``[B, Lq, E]``."""
        e = self.embed_dim
        q = self._heads(F.linear(query, self.in_proj_weight[:e], self.in_proj_bias[:e]))
        out = attend(q, key, value, key_lengths=key_lengths, implementation=self.implementation)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _project(self, query, key, value, cache):
        e = self.embed_dim
        if key is None:  # one matrix product for the three projections
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            value = key if value is None else value
            q_w, k_w, v_w = self.in_proj_weight.split(e)
            q_b, k_b, v_b = self.in_proj_bias.split(e)
            q, k, v = F.linear(query, q_w, q_b), F.linear(key, k_w, k_b), F.linear(value, v_w, v_b)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if self.rotary is not None:
            offset = cache.length if cache is not None else 0
            q, k = self.rotary(q, offset), self.rotary(k, offset)
        if cache is not None:
            k, v = cache.append(k, v)
        return q, k, v

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads).transpose(
            1, 2
        )  # [B, L, E] -> [B, H, L, D], a view
