"""A classifier of sequences: an encoder, attention pooling, a linear layer.

The encoder is a Transformer, a bidirectional LSTM or a 1-D convolution; the pooling scores its
positions by dot product (as in Vaswani et al., 2017) or additively (Bahdanau et al., 2015): the
document classifiers of the literature (e.g. Yang et al., 2016) are combinations of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastattn.models.attention import length_mask
from fastattn.models.fields import Layers, Share, Size, Token, check_fields
from fastattn.models.layers import Encoder
from fastattn.pooling import AttentionPooling
from fastattn.positional import make_positions

ENCODERS = ("transformer", "bilstm", "cnn")


@dataclass(frozen=True)
class ClassifierConfig:
    """The shape of a :class:`Classifier`.

    The input is either tokens (``vocab_size``) or feature vectors (``input_dim``): give exactly one.
    ``pooling``: "dot" or "additive".  ``kernel_size``: of the convolution, odd.

    Raises:
        TypeError, ValueError: a field has another type than its annotation, or lies outside its range.
    """

    num_classes: Size
    vocab_size: Size | None = None
    input_dim: Size | None = None
    encoder: str = "transformer"
    pooling: str = "additive"
    embed_dim: Size = 64
    num_heads: Size = 4
    layers: Layers = 2
    feedforward_dim: Size = 128
    kernel_size: Size = 5
    dropout: Share = 0.1
    norm_first: bool = True
    positions: str = "rotary"
    max_length: Size = 512
    pad_id: Token = 0
    attention: str = "fastattn"

    def __post_init__(self):
        check_fields(self)


class Classifier(nn.Module):
    """Sequences in, class logits out.  Padding is on the right."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        if (config.vocab_size is None) == (config.input_dim is None):
            raise ValueError("give either vocab_size (tokens) or input_dim (feature vectors)")
        self.config = config
        if config.vocab_size is not None:
            self.embedding = nn.Embedding(config.vocab_size, config.embed_dim, padding_idx=config.pad_id)
        else:
            self.embedding = nn.Linear(config.input_dim, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = make_encoder(config)
        self.pooling = AttentionPooling(config.embed_dim, config.pooling, config.attention)
        self.output = nn.Linear(config.embed_dim, config.num_classes)

    def forward(self, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, num_classes]`` of tokens ``[B, L]`` or features ``[B, L, input_dim]``, lengths ``[B]``."""
        hidden = self.encode(inputs, lengths)  # [B, L, E]
        return self.output(self.dropout(self.pooling(hidden, lengths)))

    def encode(self, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.dropout(self.embedding(inputs)), lengths)

    @torch.no_grad()
    def explain(self, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[B, num_classes]`` and the pooling's weights ``[B, L]``: where the decision looked."""
        hidden = self.encode(inputs, lengths)
        return self.output(self.dropout(self.pooling(hidden, lengths))), self.pooling.weights(hidden, lengths)


def make_encoder(config: ClassifierConfig) -> nn.Module:
    """The module ``[B, L, E], lengths [B] -> [B, L, E]`` that the configuration names."""
    if config.encoder == "transformer":
        return TransformerEncoder(config)
    if config.encoder == "bilstm":
        return BidirectionalLSTM(config)
    if config.encoder == "cnn":
        return Convolution(config)
    raise ValueError(f"encoder must be one of {ENCODERS}, got {config.encoder!r}")


class TransformerEncoder(nn.Module):
    """Positions and a stack of encoder layers."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.positions = make_positions(config.positions, config.embed_dim, config.max_length)
        self.stack = Encoder(
            config.layers,
            config.embed_dim,
            num_heads=config.num_heads,
            feedforward_dim=config.feedforward_dim,
            dropout=config.dropout,
            norm_first=config.norm_first,
            attention=config.attention,
            rotary=config.positions == "rotary",
        )

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if self.positions is not None:
            x = x + self.positions(x.shape[1])
        return self.stack(x, lengths)


class BidirectionalLSTM(nn.Module):
    """A bidirectional LSTM with E / 2 units in each direction."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        if config.embed_dim % 2:
            raise ValueError(f"a bidirectional LSTM needs an even embed_dim, got {config.embed_dim}")
        dropout = config.dropout if config.layers > 1 else 0.0
        half = config.embed_dim // 2
        self.lstm = nn.LSTM(
            config.embed_dim, half, config.layers, batch_first=True, bidirectional=True, dropout=dropout
        )

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        # Packed, so that the backward direction starts at each sequence's own end.
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class Convolution(nn.Module):
    """Residual 1-D convolutions; padding stays zero, so that it does not leak into the last positions."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        if config.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {config.kernel_size}")
        e, k = config.embed_dim, config.kernel_size
        self.convolutions = nn.ModuleList(nn.Conv1d(e, e, k, padding=k // 2) for _ in range(config.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(e) for _ in range(config.layers))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        valid = length_mask(lengths, x.shape[1])[:, :, None]  # [B, L, 1]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = norm(x).masked_fill(~valid, 0.0).transpose(1, 2)  # [B, E, L]
            x = x + self.dropout(convolution(y).transpose(1, 2).relu())
        return x
