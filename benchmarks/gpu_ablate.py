"""Part ``ablate``: the Hopper kernels' design choices, each switched alone.

Starts from the configuration that the engine chooses and changes one switch at a time.
"""

from __future__ import annotations

import gpu_tune
from gpu_pool import Task

SHAPES = ((128, None, 8192), (128, "upper_left", 8192), (128, None, 1024), (64, None, 8192), (64, "upper_left", 8192))


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
