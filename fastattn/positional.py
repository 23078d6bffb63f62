"""Positional encodings: sinusoidal and learned (added to embeddings), rotary (applied to queries and keys)."""

from __future__ import annotations

import math

import torch
from torch import nn


def sinusoidal_table(length: int, embed_dim: int, base: float = 10000.0) -> torch.Tensor:
    """The table of Vaswani et al. (2017), section 3.5, as float32 ``[length, embed_dim]``.

    Entry ``[pos, 2i]`` is ``sin(pos / base**(2i / embed_dim))``, entry ``[pos, 2i + 1]`` the cosine of
    the same angle.  An odd ``embed_dim`` ends with a sine.
    """
    pairs = (embed_dim + 1) // 2
    frequency = torch.exp(torch.arange(pairs, dtype=torch.float64) * (-2.0 * math.log(base) / embed_dim))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency  # [length, pairs]
    table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)  # [length, 2 * pairs]
    return table[:, :embed_dim].float()


class SinusoidalPositions(nn.Module):
    """Fixed sinusoidal encodings: ``forward(length, offset)`` gives ``[length, embed_dim]``.

    Not part of the state dict.  Raises ``ValueError`` past ``max_length``.
    """

    def __init__(self, embed_dim: int, max_length: int = 4096):
        super().__init__()
        self.register_buffer("table", sinusoidal_table(max_length, embed_dim), persistent=False)

    def forward(self, length: int, offset: int = 0) -> torch.Tensor:
        _check_length(offset + length, self.table.shape[0])
        return self.table[offset : offset + length]


class LearnedPositions(nn.Module):
    """One learned vector per position: ``forward(length, offset)`` gives ``[length, embed_dim]``."""

    def __init__(self, embed_dim: int, max_length: int = 512):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_length, embed_dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, length: int, offset: int = 0) -> torch.Tensor:
        _check_length(offset + length, self.weight.shape[0])
        return self.weight[offset : offset + length]


class RotaryPositions(nn.Module):
    """Rotary embeddings (Su et al., 2021): turns each pair of features by an angle proportional to the position.

    The score of a rotated query and a rotated key depends on their distance only.  The pairs are
    ``(x[i], x[i + head_dim / 2])``, the layout of GPT-NeoX and Llama.

    ``forward(x, offset)`` takes ``[..., length, head_dim]`` and returns the same shape and dtype; the
    rotation is computed in float32.  Raises ``ValueError`` for an odd ``head_dim``.
    """

    def __init__(self, head_dim: int, base: float = 10000.0):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {head_dim}")
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        self.register_buffer("frequency", (base**-exponent).float(), persistent=False)  # [head_dim / 2]

    def forward(self, x: torch.Tensor, offset: int = 0) -> torch.Tensor:
        length = x.shape[-2]
        position = torch.arange(offset, offset + length, device=x.device, dtype=torch.float32)
        angle = position[:, None] * self.frequency  # [length, head_dim / 2]
        cos, sin = angle.cos(), angle.sin()
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _check_length(needed: int, available: int) -> None:
    if needed > available:
        raise ValueError(f"the sequence reaches position {needed}, the encoding has {available} (max_length)")


def make_positions(kind: str, embed_dim: int, max_length: int) -> nn.Module | None:
    """The additive encoding named by ``kind``: "sinusoidal", "learned", or None for "rotary" and "none"."""
    if kind == "sinusoidal":
        return SinusoidalPositions(embed_dim, max_length)
    if kind == "learned":
        return LearnedPositions(embed_dim, max_length)
    if kind in ("rotary", "none"):
        return None
    raise ValueError(f"positions must be 'sinusoidal', 'learned', 'rotary' or 'none', got {kind!r}")
