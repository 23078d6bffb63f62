"""Cutting one file's examples into training, validation and test parts."""

from __future__ import annotations

import random

from fastattn.train.errors import TrainingError


def split(examples: list[tuple], held_out: float, seed: int) -> tuple[list, list, list]:
    """(train, validation, test), the last two a share ``held_out`` each, drawn by ``seed``.

    Examples with the same input fall into the same part, so nothing held out was seen in training.
    """
    if not 0 < held_out < 0.5:
        raise TrainingError(f"the held-out share must lie between 0 and 0.5, got {held_out}")
    groups: dict[object, list[tuple]] = {}
    for example in examples:
        groups.setdefault(example[0], []).append(example)
    inputs = list(groups)
    random.Random(seed).shuffle(inputs)
    held = max(1, round(len(inputs) * held_out))
    if len(inputs) < 2 * held + 1:
        raise TrainingError(f"{len(inputs)} distinct examples are too few to hold out {held} twice")
    parts = inputs[2 * held :], inputs[:held], inputs[held : 2 * held]
    return tuple([example for key in part for example in groups[key]] for part in parts)
