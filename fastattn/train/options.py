"""How to train: the options shared by all tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from fastattn.train.errors import TrainingError

#: Options that a resumed run may change: they say how long, where and how often, not what is computed.
CHANGEABLE = ("epochs", "steps", "minutes", "patience", "device", "checkpoint_every", "threads")

SCHEDULES = ("inverse_sqrt", "cosine", "constant")


@dataclass(frozen=True)
class TrainOptions:
    """Options of the training loop.

    ``epochs``, ``steps`` and ``minutes`` each end the run when reached (None: no such limit).
    ``patience``: evaluations without improvement before the run stops.  ``evaluate_every`` and
    ``checkpoint_every`` count steps; None means once per epoch.
    """

    epochs: int = 10
    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 200
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    patience: int | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    compile: bool = False
    threads: int | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise TrainingError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        for name in ("epochs", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise TrainingError(f"{name} must be positive, got {getattr(self, name)}")

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


def only_known(values: dict) -> dict:
    """The entries that are options and were given (not None)."""
    names = {f.name for f in fields(TrainOptions)}
    return {k: v for k, v in values.items() if k in names and v is not None}
