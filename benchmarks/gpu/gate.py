"""What the smoke step's dead families switch off in the steps that follow."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .pool import Task

#: What is still measured where the Hopper kernels are dead: the plain kernels and the peers on the headline shapes.
WITHOUT_HOPPER = ("headline",)


class Gate:
    """Which tasks may run, and in which environment. Open before the smoke step has run."""

    def __init__(self, rows: Iterable[dict] = ()) -> None:
        from . import smoke

        self.dead = smoke.dead_families(list(rows))
        found = smoke.consequences(self.dead)
        self.state: str = found["gate"]
        self.environment: dict[str, str] = found["environment"]
        self._drop = re.compile(found["drop"]) if found["drop"] else None

    @property
    def is_shut(self) -> bool:
        """Whether so much is dead that the rest of the time is better kept for another run."""
        return self.state != "go"

    def admits(self, step: str, task: Task) -> bool:
        if self.state == "stop":
            return False
        if self.is_shut and step not in WITHOUT_HOPPER:
            return False
        return self._drop is None or self._drop.search(task.key) is None

    def describe(self) -> str:
        return f"{self.state}; dead: {', '.join(sorted(self.dead)) or 'none'}"
