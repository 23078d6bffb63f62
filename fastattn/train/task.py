"""What the training loop asks of a task."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

#: Of :meth:`Task.about_losses`.
LOSSES_DIFFER = "The training loss has {reasons}; the validation loss has none."


class Task(ABC):
    """A model, its data and how it is judged.

    The loop shuffles example indices, asks :meth:`collate` for a batch and :meth:`loss` for its loss;
    :meth:`evaluate` gives the figures for the curves, of which :attr:`metric` decides which weights
    are the best and when to stop.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    larger_is_better: ClassVar[bool] = True
    #: Steps that a run on little data needs before it has learnt what they tell.
    least_steps: ClassVar[int] = 1

    model: nn.Module
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def lengths(self) -> list[int]:
        """The length of each training example: batches are cut from examples of like length."""

    @abstractmethod
    def collate(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        """The training examples as padded tensors on :attr:`device`."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The mean loss of the batch.  ``model`` is :attr:`model`, perhaps compiled."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Figures on the validation data; the model is in evaluation mode."""

    def about_losses(self) -> str:
        """What a reader of the curves needs to know about the losses, as a sentence."""
        return ""

    def report(self) -> dict[str, Any]:
        """Figures on the test data with the best weights, at the end of the run."""
        return {}

    @abstractmethod
    def configuration(self) -> dict[str, Any]:
        """The model's configuration, as JSON values: enough to build it again."""

    @abstractmethod
    def save_files(self, directory: Path) -> None:
        """Write what prediction needs besides the weights: the tokenizer, the labels."""

    @abstractmethod
    def digest(self) -> str:
        """A fingerprint of the training data: a run resumes on its own data only."""


def digest_of(*texts) -> str:
    """A fingerprint of nested sequences of strings and numbers."""
    fingerprint = hashlib.sha256()
    for text in texts:
        fingerprint.update(repr(text).encode())
    return fingerprint.hexdigest()[:16]
