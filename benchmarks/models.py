"""Training steps of the models, and additive attention, as workloads of the suite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.additive import additive_attention
from fastattn.models.classifier import Classifier, ClassifierConfig
from fastattn.models.detector import Detector, DetectorConfig, Targets
from fastattn.models.set_loss import set_loss
from fastattn.models.transformer import Transformer, TransformerConfig, translation_loss

VOCAB_SIZE = 1000
CLASSES = 2
#: Of an image for the detector.
OBJECTS = 4


@dataclass(frozen=True)
class ModelWorkload:
    """One training step: forward, loss, backward, AdamW.

    ``model`` is "transformer", "classifier" or "detector"; ``length`` is in tokens, for the detector in cells
    of its square feature map.
    """

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
        elif self.model == "detector":  # the decoder projects keys and values; its few queries do not count
            weights += 2 * self.layers * self.embed_dim**2 + _backbone_weights(self.embed_dim)
        return self.batch * (6.0 * weights * self.length + attention)

    def make(self) -> ModelInputs:
        return ModelInputs(self)

    def fields(self) -> dict:
        return asdict(self) | {"dtype": "float32", "backward": True}


def _backbone_weights(embed_dim: int) -> int:
    """Multiplications of the detector's convolutions for each cell of its feature map."""
    config = DetectorConfig()
    count, channels = 0, config.in_channels
    for stage, width in enumerate(config.backbone_channels, 1):
        cells = (config.stride // 2**stage) ** 2  # of this stage, within one of the last
        count += cells * 9 * (channels + width) * width
        channels = width
    return count + channels * embed_dim


@dataclass(frozen=True)
class Trained:
    """A model and its loss on a batch without padding."""

    model: nn.Module
    loss: Callable[[], Tensor]


def _transformer(w: ModelWorkload, attention: str) -> Trained:
    layers = {"encoder_layers": w.layers, "decoder_layers": w.layers}
    model = Transformer(TransformerConfig(**_sizes(w, attention), **layers))
    tokens = _tokens(w)
    return Trained(model, lambda: translation_loss(model(tokens, tokens), tokens.roll(-1, 1), pad_id=0))


def _classifier(w: ModelWorkload, attention: str) -> Trained:
    options = {"num_classes": CLASSES, "layers": w.layers, "pooling": "dot", "positions": "sinusoidal"}
    model = Classifier(ClassifierConfig(**_sizes(w, attention), **options))
    tokens, lengths = _tokens(w), torch.full((w.batch,), w.length)
    return Trained(model, lambda: F.cross_entropy(model(tokens, lengths), tokens[:, 0] % CLASSES))


def _detector(w: ModelWorkload, attention: str) -> Trained:
    config = DetectorConfig(
        embed_dim=w.embed_dim,
        num_heads=w.heads,
        encoder_layers=w.layers,
        decoder_layers=w.layers,
        feedforward_dim=4 * w.embed_dim,
        attention=attention,
    )
    model = Detector(config)
    side = math.isqrt(w.length) * config.stride
    images = torch.randn(w.batch, config.in_channels, side, side)
    sizes = torch.full((w.batch, 2), side)
    boxes = torch.rand(w.batch, OBJECTS, 4) / 4 + 0.25
    labels = torch.randint(config.num_classes, (w.batch, OBJECTS))
    targets = Targets(labels, boxes, torch.ones(w.batch, OBJECTS, dtype=torch.bool))

    def loss() -> Tensor:
        torch.manual_seed(2)  # of the denoising queries
        return set_loss(model(images, sizes, targets), targets)["loss"]

    return Trained(model, loss)


MODELS = {"transformer": _transformer, "classifier": _classifier, "detector": _detector}


def _sizes(w: ModelWorkload, attention: str) -> dict:
    sizes = {"embed_dim": w.embed_dim, "num_heads": w.heads, "feedforward_dim": 4 * w.embed_dim}
    return sizes | {"dropout": 0.0, "max_length": w.length, "attention": attention, "vocab_size": VOCAB_SIZE}


def _tokens(w: ModelWorkload) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (w.batch, w.length))


class ModelInputs:
    """The model in its three implementations, with the same weights and the same batch."""

    def __init__(self, workload: ModelWorkload, implementations: tuple[str, ...] = ("fastattn", "torch", "naive")):
        self.trained = {}
        for name in implementations:
            torch.manual_seed(0)
            self.trained[name] = MODELS[workload.model](workload, name)

    def call(self, implementation: str) -> Callable[[], object]:
        trained = self.trained[implementation]
        optimizer = torch.optim.AdamW(trained.model.parameters(), lr=1e-4, foreach=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            trained.loss().backward()
            optimizer.step()

        return step

    def check(self) -> None:
        """Losses agree to a few roundings, gradients to a few thousandths of their norm.

        Not closer: where an input of a ReLU rounds to the other side of 0, a row of a gradient changes by as
        much, for any two implementations. Gradients of norms below 1e-3 are compared as if they had that:
        softmax is blind to a bias of all keys.
        """
        results = {}
        for name, trained in self.trained.items():
            loss = trained.loss()
            results[name] = loss.detach(), torch.autograd.grad(loss, list(trained.model.parameters()))
        loss, grads = results.pop("fastattn")
        for other_loss, other_grads in results.values():
            torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=0.0)
            for ours, theirs in zip(grads, other_grads, strict=True):
                apart, norm = (ours - theirs).norm().item(), theirs.norm().item()
                if not apart <= 3e-3 * max(norm, 1e-3):
                    raise AssertionError(f"a gradient {list(ours.shape)} of norm {norm:.2e} is {apart:.2e} apart")


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
