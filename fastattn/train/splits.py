"""Cutting one file's examples into training, validation and test parts."""

from __future__ import annotations

import random
from collections import Counter

from fastattn.train.errors import TrainingError


def split(examples: list[tuple], held_out: float, seed: int, every_label: bool = False) -> tuple[list, list, list]:
    """(train, validation, test), the last two a share ``held_out`` each, drawn by ``seed``.

    Examples with the same input fall into the same part, so nothing held out was seen in training. With
    ``every_label``, an example's second element is its label, and training has one of each that there is.
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
    if every_label:
        _bring_labels(inputs, 2 * held, {key: {example[1] for example in group} for key, group in groups.items()})
    parts = inputs[2 * held :], inputs[:held], inputs[held : 2 * held]
    return tuple([example for key in part for example in groups[key]] for part in parts)


def _bring_labels(inputs: list, start: int, labels: dict[object, set]) -> None:
    """Swap inputs so that those from ``start`` on have every label; one that is there already stays in its place."""
    counts = Counter(label for key in inputs[start:] for label in labels[key])
    for held in range(start):
        if all(counts[label] for label in labels[inputs[held]]):
            continue
        spare = (i for i in range(start, len(inputs)) if all(counts[label] > 1 for label in labels[inputs[i]]))
        other = next(spare, None)
        if other is None:
            different = len(set().union(*labels.values()))
            raise TrainingError(
                f"{different} labels, and only {len(inputs) - start} of {len(inputs)} distinct examples left for "
                "training, where each label needs one"
            )
        counts.subtract(labels[inputs[other]])
        counts.update(labels[inputs[held]])
        inputs[held], inputs[other] = inputs[other], inputs[held]
