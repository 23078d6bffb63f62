"""Which backend computes a problem: the only place that decides it, and that can say why.

A backend is a module in :mod:`fastattn.backends`.  It states why it cannot be used at all
(``unavailable()``) and why it cannot take a problem (``reasons(problem)``); nothing is a boolean,
so that errors, warnings and :func:`explain` can tell the same story.  One with several engines inside may say
which of them runs (``notes(problem)``).
"""

from __future__ import annotations

import importlib
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from torch import Tensor
from torch.autograd import profiler

from fastattn.integrations.profiling import RecordingEngine
from fastattn.problem import Problem

#: Every backend by name, the best first.
BACKENDS = ("cpu", "triton", "torch", "reference")

#: What "auto" tries, by device type. An interpreter or a device without an engine is never chosen.
AUTO = {"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "reference")}

#: What "auto" falls back to, in a warning's words.
FALLBACKS = {
    "torch": "torch's own attention, which is exact for this call (others take the dense reference, slowly)",
    "reference": "the dense reference, slowly and in O(Lq * Lk) memory",
}

#: The engine of a plain call, and its (D, Dv).
Plain = tuple[ModuleType, tuple[int, int]]

_warned: set[str] = set()


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, what it says about it, and for each other one why it does not run."""

    backend: str | None
    reasons: dict[str, list[str]]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"backend: {self.backend}", *(f"  {note}" for note in self.notes)]
        for name, why in self.reasons.items():
            lines += [f"  {name}: {reason}" for reason in why]
        return "\n".join(lines)

    __repr__ = __str__


@cache
def load(name: str) -> ModuleType | ImportError:
    """The backend's module, or the error that importing it raised."""
    try:
        return importlib.import_module(f"fastattn.backends.{name}")
    except ImportError as error:
        return error


def check_backend_name(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        *names, last = map(repr, ("auto", *BACKENDS))
        raise ValueError(f"backend must be {', '.join(names)} or {last}, got {backend!r}")


def backend_reasons(name: str, problem: Problem) -> list[str]:
    """Why the named backend cannot compute the problem; empty if it can."""
    module = load(name)
    if isinstance(module, ImportError):
        return [f"could not be imported: {module}"]
    missing = module.unavailable()
    return [missing] if missing is not None else module.reasons(problem)


def select(problem: Problem, backend: str = "auto") -> ModuleType:
    """The module that computes the problem.

    An explicit backend that cannot raises ValueError with its reasons. "auto" takes the engine of
    the device, else what is exact of the next ones, and warns once of what the device's engine says.
    """
    if backend != "auto":
        why = backend_reasons(backend, problem)
        if why:
            raise ValueError(f"backend={backend!r} cannot compute this call: {'; '.join(why)}")
        return _watched(load(backend))
    refusals = []
    device = "cpu" if problem.query.is_cpu else problem.query.device.type  # the type is slow to ask for
    for name in AUTO.get(device, ("reference",)):
        why = backend_reasons(name, problem)
        if not why:
            break
        refusals.append(f"{name}: {'; '.join(why)}")
    if refusals:
        _warn_once(f"fastattn computes with {FALLBACKS[name]}, because {' and '.join(refusals)}", refusals[0])
    return _watched(load(name))


def select_plain(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, name: str = "cpu") -> Plain | None:
    """What :func:`select` would choose for a call of these alone, if it takes them unchecked; None in any doubt.

    ``name`` is that of the backend to ask: "cpu", or "triton" for the tensors of a GPU.
    """
    engine = load(name)
    head_dims = getattr(engine, "plain_head_dims", _no_head_dims)(query, key, value, enable_gqa)
    return None if head_dims is None else (_watched(engine), head_dims)


def _no_head_dims(*_) -> None:
    """The answer of a backend that has no plain calls, or could not be imported."""


def _watched(engine: ModuleType) -> ModuleType | RecordingEngine:
    """The engine, with rows in the profile of a profiler that runs."""
    return RecordingEngine(engine) if profiler._is_profiler_enabled else engine


def explain_problem(problem: Problem, backend: str = "auto") -> Explanation:
    """What :func:`select` would choose for the problem, without warning or raising."""
    candidates = AUTO.get(problem.query.device.type, ("reference",)) if backend == "auto" else (backend,)
    refusals = {name: backend_reasons(name, problem) for name in BACKENDS}
    chosen = next((name for name in candidates if not refusals[name]), None)
    reasons = {}
    for name in BACKENDS:
        if name == chosen:
            continue
        if refusals[name]:
            reasons[name] = refusals[name]
        elif backend != "auto":
            reasons[name] = [f"backend={backend!r} was asked for"]
        elif name not in candidates:
            reasons[name] = [f"not chosen automatically for {problem.query.device.type} tensors"]
        else:
            reasons[name] = [f"{chosen} comes first"]
    notes = getattr(load(chosen), "notes", None) if chosen else None
    return Explanation(chosen, reasons, tuple(notes(problem)) if notes else ())


def _warn_once(message: str, reason: str) -> None:
    """Warn of the same reason once in a process, at the line of the caller's own code."""
    if reason in _warned:
        return
    _warned.add(reason)
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastattn", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
