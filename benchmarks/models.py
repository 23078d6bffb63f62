"""Training steps of the models, and additive attention, as workloads of the suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.additive import additive_attention
from fastattn.models.classifier import Classifier, ClassifierConfig
from fastattn.models.transformer import Transformer, TransformerConfig, translation_loss

VOCAB_SIZE = 1000
CLASSES = 2


@dataclass(frozen=True)
class ModelWorkload:
    """One training step: forward, loss, backward, AdamW.  ``model`` is "transformer" or "classifier"."""

    model: str
    batch: int
    length: int
    embed_dim: int = 128
    heads: int = 4
    layers: int = 2
    dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.model} {self.batch}x{self.length} E={self.embed_dim} H={self.heads} layers={self.layers}"

    @property
    def flops(self) -> float:
        """Of the matrix products: 6 per weight and token (12 E^2 weights a layer), 14 L^2 E per attention."""
        weights = 12 * self.layers * self.embed_dim**2
        attention = 14.0 * self.layers * self.length**2 * self.embed_dim
        if self.model == "transformer":  # cross-attention adds 4 E^2, and causal self-attention is half of one
            weights = (24 + 4) * self.layers * self.embed_dim**2 + VOCAB_SIZE * self.embed_dim
            attention *= 2.5
        return self.batch * (6.0 * weights * self.length + attention)

    def make(self) -> ModelInputs:
        return ModelInputs(self)

    def fields(self) -> dict:
        return asdict(self) | {"dtype": "float32", "backward": True}


class ModelInputs:
    """The model in its three implementations, with the same weights, and a batch without padding."""

    def __init__(self, workload: ModelWorkload, implementations: tuple[str, ...] = ("fastattn", "torch", "naive")):
        self.workload = workload
        torch.manual_seed(0)
        self.tokens = torch.randint(3, VOCAB_SIZE, (workload.batch, workload.length))
        self.models = {name: self._build(name) for name in implementations}

    def _build(self, attention: str) -> nn.Module:
        w = self.workload
        torch.manual_seed(1)
        sizes = {"embed_dim": w.embed_dim, "num_heads": w.heads, "feedforward_dim": 4 * w.embed_dim}
        sizes |= {"dropout": 0.0, "max_length": w.length, "attention": attention, "vocab_size": VOCAB_SIZE}
        if w.model == "transformer":
            layers = {"encoder_layers": w.layers, "decoder_layers": w.layers}
            return Transformer(TransformerConfig(**sizes, **layers))
        config = ClassifierConfig(num_classes=CLASSES, layers=w.layers, pooling="dot", positions="sinusoidal", **sizes)
        return Classifier(config)

    def loss(self, implementation: str) -> Tensor:
        model, tokens = self.models[implementation], self.tokens
        if self.workload.model == "transformer":
            return translation_loss(model(tokens, tokens), tokens.roll(-1, 1), pad_id=0)
        lengths = torch.full((tokens.shape[0],), tokens.shape[1])
        return F.cross_entropy(model(tokens, lengths), tokens[:, 0] % CLASSES)

    def call(self, implementation: str) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(self.models[implementation].parameters(), lr=1e-4, foreach=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            self.loss(implementation).backward()
            optimizer.step()

        return step

    def check(self) -> None:
        """Losses and gradients of the implementations agree to a few roundings of their largest value."""
        results = {}
        for name, model in self.models.items():
            loss = self.loss(name)
            results[name] = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
        for name in results.keys() - {"fastattn"}:
            for ours, theirs in zip(results["fastattn"], results[name], strict=True):
                atol = 1e-4 * max(theirs.abs().max().item(), 1e-3)
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=atol)


@dataclass(frozen=True)
class AdditiveWorkload:
    """Forward and backward of additive attention over ``batch`` sequences."""

    batch: int
    queries: int
    keys: int
    features: int
    dtype = torch.float32

    def __str__(self) -> str:
        return f"additive {self.batch}x{self.queries}x{self.keys} D={self.features} forward+backward"

    @property
    def flops(self) -> float:
        """One tanh, and a multiply-add for its score, forward; the same and three more multiply-adds backward."""
        return 11.0 * self.batch * self.queries * self.keys * self.features

    def make(self) -> AdditiveInputs:
        return AdditiveInputs(self)

    def fields(self) -> dict:
        return asdict(self) | {"dtype": "float32", "backward": True}


class AdditiveInputs:
    """Projected queries and keys, values, the score's vector."""

    def __init__(self, workload: AdditiveWorkload):
        w = workload
        torch.manual_seed(0)
        shapes = ((w.batch, w.queries, w.features), (w.batch, w.keys, w.features), (w.batch, w.keys, w.features))
        self.tensors = [torch.randn(shape, requires_grad=True) for shape in (*shapes, (w.features,))]
        self.grad_out = torch.randn(shapes[0])

    def out(self, implementation: str) -> Tensor:
        if implementation == "fastattn":
            return additive_attention(*self.tensors)
        query, key, value, weight = self.tensors
        return (torch.tanh(query[:, :, None] + key[:, None]) @ weight).softmax(-1) @ value

    def call(self, implementation: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(self.out(implementation), self.tensors, self.grad_out)

    def check(self) -> None:
        for ours, naive in zip(self.call("fastattn")(), self.call("naive")(), strict=True):
            torch.testing.assert_close(ours, naive, rtol=0.0, atol=1e-4 * naive.abs().max().item())
