"""How to train: the options shared by all tasks, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Annotated

from fastattn.models.fields import Range, check_fields
from fastattn.train.errors import TrainingError

#: Options that a resumed run may change: they say how long, where and how often, not what is computed.
CHANGEABLE = ("epochs", "steps", "minutes", "patience", "device", "checkpoint_every", "threads")

#: More threads than any machine has processors: the system refuses a process more than it has room for.
MOST_THREADS = 1024

Count = Annotated[int, Range(1, 1 << 31)]
Positive = Annotated[float, Range(0, math.inf, without_least=True)]

#: Steps between evaluations and between checkpoints on small data, at least: an epoch of a few steps changes too
#: little to be judged, and takes less time than to be saved.
LEAST_BETWEEN = {"evaluate_every": 20, "checkpoint_every": 100}
#: Batches of an epoch, and examples of a batch, that smaller batches on small data must give.
BATCHES_OF_AN_EPOCH, LEAST_BATCH = 16, 32

SCHEDULES = ("inverse_sqrt", "cosine", "constant")


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainOptions:
    """Options of the training loop; each is an option of the command line, with the text given here.

    They say what is done on data of any size; :meth:`suited_to` gives those for a training set that may be small.

    Raises:
        TrainingError: one has another type than its annotation, or lies outside its range.
    """

    epochs: Count = _option(10, "Passes over the training data.")
    steps: Count | None = _option(None, "Optimiser steps, in place of --epochs.")
    minutes: Positive | None = _option(None, "Stop after this much training time.")
    batch_size: Count = _option(64, "Examples in a step.")
    learning_rate: Positive = _option(1e-3, "The peak, after the warm-up.")
    schedule: str = _option("cosine", f"After the warm-up: {', '.join(SCHEDULES)}.")
    warmup_steps: Annotated[int, Range(0, 1 << 31)] = _option(
        200, "Steps of linear warm-up, at most a quarter of the run."
    )
    weight_decay: Annotated[float, Range(0, math.inf)] = _option(0.01, "AdamW's, on matrices only.")
    clip_norm: Positive = _option(1.0, "Largest norm of the gradient.")
    patience: Count | None = _option(None, "Evaluations without gain before stopping early.")
    evaluate_every: Count | None = _option(None, "Steps between evaluations; default: an epoch.")
    checkpoint_every: Count | None = _option(None, "Steps between checkpoints; default: an epoch.")
    seed: Annotated[int, Range(-(1 << 32), 1 << 32)] = _option(0, "Of the weights, the data's order and the dropout.")
    device: str = _option("cpu", "Where to train: cpu, cuda, cuda:1...")
    bf16: bool = _option(False, "Autocast to bfloat16.")
    compile: bool = _option(False, "Compile the model with torch.compile.")
    threads: Annotated[int, Range(1, MOST_THREADS)] | None = _option(None, "CPU threads; default: torch's own number.")

    def __post_init__(self):
        try:
            check_fields(self)
        except (TypeError, ValueError) as error:
            raise TrainingError(str(error)) from None
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}")

    def suited_to(self, examples: int, least_steps: int, given: Collection[str] = ()) -> TrainOptions:
        """These options for so many training examples: where they are few, for a run that can learn from them.

        The options named in ``given`` stay, and so do all on large data. On small data:

        - batches are smaller, down to LEAST_BATCH, until an epoch has BATCHES_OF_AN_EPOCH;
        - the epochs are more, until they make ``least_steps``, unless the length is given or counted in steps; the run
          does not stop before, as few validation examples soon show no gain;
        - the warm-up is a quarter of the run at most;
        - an evaluation and a checkpoint come after whole epochs, of LEAST_BETWEEN steps at least.
        """
        suited = self
        while (
            "batch_size" not in given
            and suited.batch_size >= 2 * LEAST_BATCH
            and suited.steps_per_epoch(examples) < BATCHES_OF_AN_EPOCH
        ):
            suited = replace(suited, batch_size=suited.batch_size // 2)
        per_epoch = suited.steps_per_epoch(examples)
        if "epochs" not in given and self.steps is None:
            suited = replace(suited, epochs=max(self.epochs, math.ceil(least_steps / per_epoch)))
            if suited.epochs > self.epochs and "patience" not in given:
                suited = replace(suited, patience=None)
        if "warmup_steps" not in given:
            suited = replace(suited, warmup_steps=min(self.warmup_steps, suited.total_steps(examples) // 4))
        for name, least in LEAST_BETWEEN.items():
            if getattr(self, name) is None:
                suited = replace(suited, **{name: per_epoch * math.ceil(least / per_epoch)})
        return suited

    def steps_per_epoch(self, examples: int) -> int:
        """Batches of an epoch, the last one perhaps smaller."""
        return math.ceil(examples / self.batch_size)

    def total_steps(self, examples: int) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch(examples) if self.steps is None else self.steps

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
