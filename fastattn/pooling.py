"""Attention pooling: a learned query summarises a padded sequence as one vector."""

from __future__ import annotations

import torch
from torch import nn

from fastattn.additive import additive_attention, additive_weights
from fastattn.checks import check_sequences, check_size
from fastattn.integrations.symbolic import LeafModule
from fastattn.models.attention import IMPLEMENTATIONS, attend, naive_weights
from fastattn.problem import INTEGER_DTYPES

SCORES = ("dot", "additive")


class AttentionPooling(LeafModule):
    """``[B, L, E]`` to ``[B, E]``: a softmax over the positions, scored against a learned query.

    Args:
        embed_dim: E.
        score: "dot" (scaled dot product of query and key) or "additive" (Bahdanau).
        attention: the implementation of the dot-product form ("fastattn", "torch", "naive"); the
            additive form is fused for "fastattn" and written out for the other two.

    Raises TypeError or ValueError, naming the argument.

    Only the keys are projected; the values are the inputs themselves, so a position's weight says how
    much of it is in the result.
    """

    def __init__(self, embed_dim: int, score: str = "dot", attention: str = "fastattn"):
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got {score!r}")
        if attention not in IMPLEMENTATIONS:
            raise ValueError(f"attention must be one of {IMPLEMENTATIONS}, got {attention!r}")
        check_size("embed_dim", embed_dim)
        self.score, self.attention = score, attention
        self.query = nn.Parameter(torch.empty(embed_dim))
        self.key_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.normal_(self.query, std=embed_dim**-0.5)
        if score == "additive":
            self.weight = nn.Parameter(torch.empty(embed_dim))
            nn.init.uniform_(self.weight, -(embed_dim**-0.5), embed_dim**-0.5)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, E]`` from x ``[B, L, E]``; positions at or past ``lengths`` int ``[B]`` are padding."""
        self._check(x, lengths)
        query, key = self.query.expand(x.shape[0], 1, -1), self.key_proj(x)  # [B, 1, E], [B, L, E]
        if self.score == "additive":
            if self.attention == "fastattn":
                return additive_attention(query, key, x, self.weight, lengths)[:, 0]
            return (self._naive_additive(query, key, lengths) @ x)[:, 0]
        heads = (y.unsqueeze(1) for y in (query, key, x))  # one head: [B, 1, L, E]
        return attend(*heads, key_lengths=lengths, implementation=self.attention)[:, 0, 0]

    @torch.no_grad()
    def weights(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The share of each position in the result, ``[B, L]``; 0 for padding."""
        self._check(x, lengths)
        query, key = self.query.expand(x.shape[0], 1, -1), self.key_proj(x)
        if self.score == "additive":
            return additive_weights(query, key, self.weight, lengths)[:, 0]
        return naive_weights(query.unsqueeze(1), key.unsqueeze(1), lengths)[:, 0, 0]

    def _check(self, x: torch.Tensor, lengths: torch.Tensor | None) -> None:
        check_sequences("x", x, self.key_proj.in_features)
        if lengths is None:
            return
        if not isinstance(lengths, torch.Tensor):
            raise TypeError(f"lengths must be a torch.Tensor, got {type(lengths).__name__}")
        if lengths.shape != x.shape[:1] or lengths.dtype not in INTEGER_DTYPES:
            given = f"{lengths.dtype} {list(lengths.shape)}"
            raise ValueError(f"lengths must be int [B] = [{x.shape[0]}], got {given}")

    def _naive_additive(self, query, key, lengths):
        score = torch.tanh(query[:, :, None] + key[:, None]) @ self.weight  # [B, 1, L]
        if lengths is not None:
            padding = torch.arange(key.shape[1], device=key.device) >= lengths[:, None, None]
            score = score.masked_fill(padding, float("-inf"))
        return score.softmax(-1)
