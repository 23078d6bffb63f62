"""Encoder and decoder layers with the parameter names of ``nn.Transformer``, so its state dicts load here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastattn.models.attention import Attention, KeyValueCache
from fastattn.positional import RotaryPositions

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class FeedForward:
    """linear2(dropout(activation(linear1(x)))), shared by both layers; they own the parameters."""

    def _init_feed_forward(self, embed_dim: int, feedforward_dim: int, dropout: float, activation: str):
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {tuple(_ACTIVATIONS)}, got {activation!r}")
        self.linear1 = nn.Linear(embed_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.activation = _ACTIVATIONS[activation]

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class EncoderLayer(nn.Module, FeedForward):
    """Self-attention and feed-forward with residuals; normalised before (``norm_first``) or after each."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = True,
        attention: str = "fastattn",
        rotary: bool = False,
    ):
        super().__init__()
        positions = RotaryPositions(embed_dim // num_heads) if rotary else None
        self.self_attn = Attention(embed_dim, num_heads, dropout, attention, positions)
        self._init_feed_forward(embed_dim, feedforward_dim, dropout, activation)
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.norm_first = norm_first

    def forward(self, x: torch.Tensor, key_lengths: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, L, E]`` to ``[B, L, E]``."""
        if self.norm_first:
            x = x + self.dropout(self.self_attn(self.norm1(x), key_lengths=key_lengths))
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self.dropout(self.self_attn(x, key_lengths=key_lengths)))
        return self.norm2(x + self._feed_forward(x))


class DecoderState:
    """What one decoder layer keeps while decoding: its cache, and the memory's keys and values."""

    def __init__(self, layer: DecoderLayer, memory: torch.Tensor, max_length: int):
        self.cache = KeyValueCache(max_length)
        self.memory_key, self.memory_value = layer.multihead_attn.project_memory(memory)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch.  The memory's rows must be selected too."""
        self.cache.select(rows)
        self.memory_key, self.memory_value = self.memory_key[rows], self.memory_value[rows]


class DecoderLayer(nn.Module, FeedForward):
    """Causal self-attention, cross-attention to the encoder's output ("memory"), feed-forward."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = True,
        attention: str = "fastattn",
        rotary: bool = False,
    ):
        super().__init__()
        positions = RotaryPositions(embed_dim // num_heads) if rotary else None
        self.self_attn = Attention(embed_dim, num_heads, dropout, attention, positions)
        self.multihead_attn = Attention(embed_dim, num_heads, dropout, attention)
        self._init_feed_forward(embed_dim, feedforward_dim, dropout, activation)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.norm_first = norm_first

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor,
        memory_lengths: torch.Tensor | None = None,
        state: DecoderState | None = None,
    ) -> torch.Tensor:
        """``[B, Lt, E]`` from x ``[B, Lt, E]`` and memory ``[B, Ls, E]``.

        With a ``state``, x holds the next positions only.
        """
        if self.norm_first:
            x = x + self.dropout(self._attend_self(self.norm1(x), state))
            x = x + self.dropout(self._attend_memory(self.norm2(x), memory, memory_lengths, state))
            return x + self._feed_forward(self.norm3(x))
        x = self.norm1(x + self.dropout(self._attend_self(x, state)))
        x = self.norm2(x + self.dropout(self._attend_memory(x, memory, memory_lengths, state)))
        return self.norm3(x + self._feed_forward(x))

    def _attend_self(self, x, state):
        return self.self_attn(x, causal=True, cache=None if state is None else state.cache)

    def _attend_memory(self, x, memory, memory_lengths, state):
        if state is None:
            return self.multihead_attn(x, memory, key_lengths=memory_lengths)
        return self.multihead_attn.attend_projected(x, state.memory_key, state.memory_value, memory_lengths)


class Encoder(nn.Module):
    """A stack of encoder layers and a final norm."""

    def __init__(self, layers: int, embed_dim: int, **layer_options):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(embed_dim, **layer_options) for _ in range(layers))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: torch.Tensor, key_lengths: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, key_lengths)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers and a final norm."""

    def __init__(self, layers: int, embed_dim: int, **layer_options):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(embed_dim, **layer_options) for _ in range(layers))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor,
        memory_lengths: torch.Tensor | None = None,
        states: list[DecoderState] | None = None,
    ) -> torch.Tensor:
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x = layer(x, memory, memory_lengths, state)
        return self.norm(x)

    def start(self, memory: torch.Tensor, max_length: int) -> list[DecoderState]:
        """Empty states for decoding up to ``max_length`` positions against this memory."""
        return [DecoderState(layer, memory, max_length) for layer in self.layers]
