"""The kernels' configurations, launched one by one, whatever engine they belong to.

A candidate is a configuration with a name. ``candidates`` lists those of an engine for a set-up, the
engine's own choice among them; ``launch`` runs one into given buffers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_contenders import Setup
from gpu_worker import Unsupported


@dataclass(frozen=True)
class Candidate:
    """A configuration: ``run()`` writes ``results`` (out, or the gradients) of a set-up."""

    name: str
    default: bool
    run: Callable[[], None]
    results: dict[str, Tensor]


def problem_of(setup: Setup):
    """The set-up as a validated problem."""
    from fastattn.problem import make_problem

    tensors = (setup.tensors[name].detach() for name in ("query", "key", "value"))
    return make_problem(*tensors, **setup.arguments())


def hopper_forward(setup: Setup) -> list[Candidate]:
    """kernels/hopper/configs.py, forward."""
    from fastattn.kernels.hopper import capability, configs, launch

    problem = problem_of(setup)
    refusals = capability.reasons(problem)
    if refusals:
        raise Unsupported("; ".join(refusals))
    banded = setup.causal is not None or setup.window is not None
    chosen = configs.forward_config(setup.head_dim, banded)
    named = {"chosen": chosen} | {
        name: config for name, config in configs.FORWARD_CANDIDATES[setup.head_dim].items() if config != chosen
    }
    return _forward_candidates(launch.forward, problem, named, chosen)


def hopper_forward_switches(setup: Setup) -> list[Candidate]:
    """The engine's choice, and each of its switches changed alone."""
    from fastattn.kernels.hopper import capability, configs, launch

    problem = problem_of(setup)
    refusals = capability.reasons(problem)
    if refusals:
        raise Unsupported("; ".join(refusals))
    chosen = configs.forward_config(setup.head_dim, setup.causal is not None or setup.window is not None)
    switched = {"chosen": chosen} | {
        f"{name}={value}": dataclasses.replace(chosen, **{name: value}) for name, value in switches(chosen)
    }
    return _forward_candidates(launch.forward, problem, switched, chosen)


def switches(config) -> list[tuple[str, bool]]:
    """Every other value of each on/off field of a configuration; None stands for "decided by shape"."""
    found = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, bool) or "bool" in str(item.type):
            found += [(item.name, other) for other in (True, False) if other is not value]
    return found


def _forward_candidates(launch: Callable, problem, named: dict, chosen) -> list[Candidate]:
    """``launch(problem, out, lse, config)`` for each configuration."""
    shape = (*problem.query.shape[:3], problem.value.shape[3])

    def candidate(name: str, config) -> Candidate:
        out = problem.query.new_full(shape, torch.nan)
        lse = torch.full(shape[:3], torch.nan, dtype=problem.lse_dtype, device=out.device)
        return Candidate(name, config == chosen, lambda: launch(problem, out, lse, config), {"out": out})

    return [candidate(name, config) for name, config in named.items()]


#: By engine and direction.
ENGINES: dict[tuple[str, str], Callable[[Setup], list[Candidate]]] = {
    ("hopper", "forward"): hopper_forward,
    ("hopper_switches", "forward"): hopper_forward_switches,
}
