"""torch.profiler: a row for each pass of an engine, which PyTorch's dispatcher would give and eager calls go past."""

from __future__ import annotations

from types import ModuleType

import torch
from torch.autograd import profiler

from fastattn.problem import Problem

_record = getattr(torch._C._profiler, "_RecordFunctionFast", None)


class RecordingEngine:
    """An engine whose passes are rows of the profile, such as ``fastattn::attention_forward[cpu]``."""

    def __init__(self, engine: ModuleType) -> None:
        self._engine = engine
        self._name = engine.__name__.rpartition(".")[2]

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def forward(self, problem: Problem, *results) -> None:
        with self._row("forward", problem):
            self._engine.forward(problem, *results)

    def backward(self, problem: Problem, *results) -> None:
        with self._row("backward", problem):
            self._engine.backward(problem, *results)

    def weights(self, problem: Problem, *results) -> None:
        with self._row("weights", problem):
            self._engine.weights(problem, *results)

    def _row(self, direction: str, problem: Problem):
        name = f"fastattn::attention_{direction}[{self._name}]"
        if _record is None:
            return profiler.record_function(name)
        return _record(name, [problem.query, problem.key, problem.value])
