"""Part ``ablate``: the Hopper kernels' design choices, each switched alone.

Starts from the configuration that the engine chooses and changes one switch at a time. The predictions
were written before the kernels ran on a GPU; kernels/hopper/README.md gives their reasons.
"""

from __future__ import annotations

import gpu_tune
from gpu_pool import Task

SHAPES = ((128, None, 8192), (128, "upper_left", 8192), (128, None, 1024), (64, None, 8192), (64, "upper_left", 8192))

#: (variant, length, causal): the predicted speed relative to the chosen forward configuration, D = 128.
PREDICTIONS = {
    ("overlap=False", 8192, None): 0.92,
    ("ping_pong=False", 8192, None): 0.96,
    ("overlap=False ping_pong=False", 8192, None): 0.80,
    ("persistent=False", 8192, None): 0.98,
    ("persistent=False", 1024, None): 0.92,
    ("heads_inner=False", 8192, "upper_left"): 0.90,
    ("own_out=False", 8192, None): 0.99,
    ("own_out=False", 1024, None): 0.94,
}


def prediction(row: dict) -> float | None:
    """What was predicted for a row of this part."""
    if row["direction"] != "forward" or row["head_dim"] != 128:
        return None
    return PREDICTIONS.get((row["variant"], row["queries"], row["causal"]))


def tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """One task per direction and shape."""
    if device == "cpu":
        return []
    wanted = [
        gpu_tune.task_of("ablate", "hopper_switches", direction, head_dim, causal, length)
        for direction in ("forward", "backward")
        for head_dim, causal, length in SHAPES
    ]
    return wanted[:1] if quick else wanted


compile_tasks = gpu_tune.compile_tasks
