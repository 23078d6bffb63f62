"""How to train: the options shared by all tasks, and the learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from fastattn.train.errors import TrainingError

#: Options that a resumed run may change: they say how long, where and how often, not what is computed.
CHANGEABLE = ("epochs", "steps", "minutes", "patience", "device", "checkpoint_every", "threads")

SCHEDULES = ("inverse_sqrt", "cosine", "constant")


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainOptions:
    """Options of the training loop; each is an option of the command line, with the text given here."""

    epochs: int = _option(10, "Passes over the training data.")
    steps: int | None = _option(None, "Optimiser steps, in place of --epochs.")
    minutes: float | None = _option(None, "Stop after this much training time.")
    batch_size: int = _option(64, "Examples in a step.")
    learning_rate: float = _option(1e-3, "The peak, after the warm-up.")
    schedule: str = _option("cosine", f"After the warm-up: {', '.join(SCHEDULES)}.")
    warmup_steps: int = _option(200, "Steps of linear warm-up.")
    weight_decay: float = _option(0.01, "AdamW's, on matrices only.")
    clip_norm: float = _option(1.0, "Largest norm of the gradient.")
    patience: int | None = _option(None, "Evaluations without gain before stopping early.")
    evaluate_every: int | None = _option(None, "Steps between evaluations; default: an epoch.")
    checkpoint_every: int | None = _option(None, "Steps between checkpoints; default: an epoch.")
    seed: int = _option(0, "Of the weights, the data's order and the dropout.")
    device: str = _option("cpu", "Where to train: cpu, cuda, cuda:1...")
    bf16: bool = _option(False, "Autocast to bfloat16.")
    compile: bool = _option(False, "Compile the model with torch.compile.")
    threads: int | None = _option(None, "CPU threads; default: torch's own number.")

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}")
        positive = ("epochs", "steps", "minutes", "batch_size", "learning_rate", "clip_norm")
        for name in (*positive, "patience", "evaluate_every", "checkpoint_every", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise TrainingError(f"{name} must be positive, got {value}")

    def resumed_with(self, **given) -> TrainOptions:
        """These options with what the user gave anew; raises if that would change the computation."""
        for name, value in given.items():
            if name not in CHANGEABLE and value != getattr(self, name):
                raise TrainingError(
                    f"the run was started with {name}={getattr(self, name)}; it cannot be resumed with {value}"
                )
        return replace(self, **given)


def learning_rate_factor(options: TrainOptions, step: int, total_steps: int) -> float:
    """The factor of the learning rate at ``step`` (from 0): linear warm-up, then the schedule.

    "inverse_sqrt" is Vaswani et al. (2017), section 5.3, scaled to 1 at its peak; "cosine" falls to 0
    at ``total_steps`` (Loshchilov and Hutter, 2017).
    """
    warmup = max(1, options.warmup_steps)
    if step + 1 < warmup:
        return (step + 1) / warmup
    if options.schedule == "inverse_sqrt":
        return math.sqrt(warmup / (step + 1))
    if options.schedule == "cosine":
        progress = min(1.0, (step + 1 - warmup) / max(1, total_steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
