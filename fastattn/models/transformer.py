"""The encoder-decoder Transformer (Vaswani et al., 2017) for sequence-to-sequence tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastattn.models.fields import Layers, Share, Size, Token, check_fields
from fastattn.models.layers import Decoder, DecoderState, Encoder
from fastattn.positional import make_positions


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a :class:`Transformer`.

    ``positions``: "sinusoidal", "learned" or "rotary".  ``tied_embeddings``: source, target and output
    share one matrix (they share the vocabulary).  ``attention``: see :mod:`fastattn.models.attention`.

    Raises:
        TypeError, ValueError: a field has another type than its annotation, or lies outside its range.
    """

    vocab_size: Size
    embed_dim: Size = 128
    num_heads: Size = 4
    encoder_layers: Layers = 2
    decoder_layers: Layers = 2
    feedforward_dim: Size = 512
    dropout: Share = 0.1
    activation: str = "relu"
    norm_first: bool = True
    positions: str = "sinusoidal"
    max_length: Size = 256
    tied_embeddings: bool = True
    pad_id: Token = 0
    bos_id: Token = 1
    eos_id: Token = 2
    attention: str = "fastattn"

    def __post_init__(self):
        check_fields(self)
        for name in ("pad_id", "bos_id", "eos_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} must be below vocab_size={self.vocab_size}, got {getattr(self, name)}")


class Transformer(nn.Module):
    """Tokens in, next-token logits out.  Sequences are padded on the right with ``config.pad_id``.

    ``encoder`` and ``decoder`` carry the parameter names of ``nn.Transformer``: its state dict loads
    with ``strict=False`` (only the embeddings are missing), its layers' state dicts load as they are.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        options = {
            "num_heads": config.num_heads,
            "feedforward_dim": config.feedforward_dim,
            "dropout": config.dropout,
            "activation": config.activation,
            "norm_first": config.norm_first,
            "attention": config.attention,
            "rotary": config.positions == "rotary",
        }
        self.source_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.target_embedding = self.source_embedding
        if not config.tied_embeddings:
            self.target_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.positions = make_positions(config.positions, config.embed_dim, config.max_length)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = Encoder(config.encoder_layers, config.embed_dim, **options)
        self.decoder = Decoder(config.decoder_layers, config.embed_dim, **options)
        self.output = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "embedding" not in name:
                nn.init.xavier_uniform_(parameter)
        for embedding in (self.source_embedding, self.target_embedding):
            # embed() multiplies by sqrt(E): the scaled embeddings have unit variance, near the sinusoids' 1/2.
            nn.init.normal_(embedding.weight, std=config.embed_dim**-0.5)
        if config.tied_embeddings:
            self.output.weight = self.source_embedding.weight

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Teacher forcing: logits ``[B, Lt, V]`` from source ``[B, Ls]`` and the target's input ``[B, Lt]``.

        Logit ``[b, t]`` predicts the token after ``target[b, t]``; the target's input begins with
        ``bos_id``.  Tokens are int64.
        """
        memory, memory_lengths = self.encode(source)  # [B, Ls, E], [B]
        hidden = self.decoder(self.embed(self.target_embedding, target), memory, memory_lengths)  # [B, Lt, E]
        return self.output(hidden)

    def encode(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's output ``[B, Ls, E]`` and the sources' lengths ``[B]``."""
        lengths = (source != self.config.pad_id).sum(1)
        return self.encoder(self.embed(self.source_embedding, source), lengths), lengths

    def decode_step(
        self,
        token: torch.Tensor,
        memory: torch.Tensor,
        memory_lengths: torch.Tensor,
        states: list[DecoderState],
    ) -> torch.Tensor:
        """Logits ``[B, V]`` of the token after ``token`` ``[B]``; the states remember all earlier ones."""
        position = states[0].cache.length
        x = self.embed(self.target_embedding, token[:, None], position)  # [B, 1, E]
        return self.output(self.decoder(x, memory, memory_lengths, states)[:, 0])

    def embed(self, embedding: nn.Embedding, tokens: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """``[B, L]`` tokens to ``[B, L, E]``: scaled embedding plus position, with dropout."""
        x = embedding(tokens) * math.sqrt(self.config.embed_dim)
        if self.positions is not None:
            x = x + self.positions(tokens.shape[1], offset)
        return self.dropout(x)

    @torch.no_grad()
    def cross_attention(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Where each target position looks in the source: ``[decoder_layers, B, Lt, Ls]``, averaged over heads."""
        memory, lengths = self.encode(source)
        x = self.embed(self.target_embedding, target)
        maps = []
        for layer in self.decoder.layers:
            record = _capture_input(layer.multihead_attn)
            x = layer(x, memory, lengths)
            maps.append(layer.multihead_attn.weights(record(), memory, key_lengths=lengths))
        return torch.stack(maps)


def _capture_input(module: nn.Module):
    """Remember the first argument of the module's next call; the returned function gives it back."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def result() -> torch.Tensor:
        handle.remove()
        return seen[0]

    return result


def translation_loss(
    logits: torch.Tensor, target: torch.Tensor, pad_id: int, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Mean cross-entropy per token of logits ``[B, L, V]`` against target ``[B, L]``, padding left out.

    Label smoothing (Szegedy et al., 2016): a share of the target's mass is spread over the vocabulary.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), target.flatten(), ignore_index=pad_id, label_smoothing=label_smoothing
    )
