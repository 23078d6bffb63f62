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

from .contenders import Setup
from .worker import Unsupported


@dataclass(frozen=True)
class Candidate:
    """A configuration: ``run()`` writes ``results`` (out, or the gradients) of a set-up."""

    name: str
    default: bool
    run: Callable[[], None]
    results: dict[str, Tensor]
    config: object = None


def problem_of(setup: Setup):
    """The set-up as a validated problem."""
    from fastattn.problem import make_problem

    tensors = (setup.tensors[name].detach() for name in ("query", "key", "value"))
    return make_problem(*tensors, **setup.arguments())


def hopper(direction: str) -> Callable[[Setup], list[Candidate]]:
    """kernels/hopper/configs.py: its choice, that with each switch changed alone, and its candidates."""

    def list_candidates(setup: Setup) -> list[Candidate]:
        from fastattn.kernels.hopper import capability, configs

        problem = problem_of(setup)
        refusals = capability.reasons(problem)
        table = {"forward": configs.FORWARD_CANDIDATES, "backward": configs.BACKWARD_CANDIDATES}[direction]
        if setup.head_dim not in table:
            refusals = [*refusals, f"there is no {direction} for D = {setup.head_dim}"]
        if refusals:
            raise Unsupported("; ".join(refusals))
        choose = {"forward": configs.forward_config, "backward": configs.backward_config}[direction]
        chosen = choose(setup.head_dim, setup.causal is not None or setup.window is not None)
        named = variants(chosen, table[setup.head_dim])
        if direction == "forward":
            from fastattn.kernels.hopper.launch import forward

            return _forward_candidates(forward, problem, named, chosen)
        return _hopper_backward_candidates(setup, problem, named, chosen)

    return list_candidates


def _hopper_backward_candidates(setup: Setup, problem, named: dict, chosen) -> list[Candidate]:
    from fastattn.kernels.hopper.launch import forward
    from fastattn.kernels.hopper.launch_backward import backward

    out, lse = _forward_buffers(problem)
    forward(problem, out, lse)
    grad_out = setup.tensors["grad_out"]

    def candidate(name: str, config) -> Candidate:
        gradients = _gradient_buffers(problem, ("grad_query", "grad_key", "grad_value"))

        def run() -> None:
            backward(problem, out, lse, grad_out, None, *gradients.values(), config)

        return Candidate(name, config == chosen, run, gradients, config)

    return [candidate(name, config) for name, config in named.items()]


def _gradient_buffers(problem, names: tuple[str, ...]) -> dict[str, Tensor]:
    sources = {"grad_query": problem.query, "grad_key": problem.key, "grad_value": problem.value}
    return {name: torch.full_like(sources[name], torch.nan) for name in names}


def switches(config) -> list[dict[str, bool]]:
    """The changes to try: every other value of each on/off field, and the two ways to hide the softmax off together.

    None stands for "decided by shape", so that both other values differ from it. What matters to the backward's two
    sweeps only is changed in them.
    """
    fused = getattr(config, "fused", None)
    found = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, bool) or "bool" in str(item.type):
            sweeps = {"fused": False} if fused and item.name not in ("fused", "ordered") else {}
            found += [sweeps | {item.name: other} for other in (True, False) if other is not value]
    if fused is False:
        found = [change for change in found if "ordered" not in change]
    if {"overlap": False} in found and {"ping_pong": False} in found:
        found.append({"overlap": False, "ping_pong": False})
    return found


def variants(chosen, table: dict) -> dict:
    """{name: configuration}: the chosen one, that with each switch changed alone, and what else a table has."""
    named = {"chosen": chosen}
    for changes in switches(chosen):
        name = " ".join(f"{field}={value}" for field, value in changes.items())
        named[name] = dataclasses.replace(chosen, **changes)
    for name, config in table.items():
        if config not in named.values():
            named[name] = config
    return named


def _forward_buffers(problem) -> tuple[Tensor, Tensor]:
    """out and lse, full of NaN."""
    shape = (*problem.query.shape[:3], problem.value.shape[3])
    out = problem.query.new_full(shape, torch.nan)
    return out, torch.full(shape[:3], torch.nan, dtype=problem.lse_dtype, device=out.device)


def _forward_candidates(launch: Callable, problem, named: dict, chosen) -> list[Candidate]:
    """``launch(problem, out, lse, config)`` for each configuration."""

    def candidate(name: str, config) -> Candidate:
        out, lse = _forward_buffers(problem)
        return Candidate(name, config == chosen, lambda: launch(problem, out, lse, config), {"out": out}, config)

    return [candidate(name, config) for name, config in named.items()]


def triton_forward(setup: Setup) -> list[Candidate]:
    """kernels/configs.py, forward."""
    from fastattn.kernels import launch

    problem = problem_of(setup)
    return _forward_candidates(launch.forward, problem, *_triton_configs("forward", setup, problem))


def triton_decode(setup: Setup) -> list[Candidate]:
    """kernels/configs.py, decode, each with half, the chosen and twice the number of splits."""
    from fastattn.kernels import launch

    problem = problem_of(setup)
    splits = launch.decode_splits(problem)
    named, chosen = _triton_configs("decode", setup, problem)
    found = []
    for number in sorted({max(1, splits // 2), splits, splits * 2}):

        def decode(problem, out, lse, config, number=number) -> None:
            launch.decode(problem, out, lse, number, config)

        for candidate in _forward_candidates(decode, problem, named, chosen):
            is_default = candidate.default and number == splits
            found.append(dataclasses.replace(candidate, name=f"{candidate.name} {number} splits", default=is_default))
    return found


def _triton_backward(kernel: str) -> Callable[[Setup], list[Candidate]]:
    """kernels/configs.py, one of the backward's two kernels (each time with the row statistics)."""

    def list_candidates(setup: Setup) -> list[Candidate]:
        from fastattn.kernels import launch

        problem = problem_of(setup)
        named, chosen = _triton_configs(kernel, setup, problem)
        out, lse = _forward_buffers(problem)
        launch.forward(problem, out, lse)
        grad_out = setup.tensors["grad_out"]

        def candidate(name: str, config) -> Candidate:
            wanted = ("grad_query",) if kernel == "grad_query" else ("grad_key", "grad_value")
            buffers = _gradient_buffers(problem, wanted)
            gradients = [buffers.get(name) for name in ("grad_query", "grad_key", "grad_value")]
            configs = (None, config) if kernel == "grad_query" else (config, None)

            def run() -> None:
                launch.backward(problem, out, lse, grad_out, None, *gradients, None, *configs)

            return Candidate(name, config == chosen, run, buffers, config)

        return [candidate(name, config) for name, config in named.items()]

    return list_candidates


def _triton_configs(kernel: str, setup: Setup, problem) -> tuple[dict, object]:
    """({name: configuration}, the chosen one) of a kernel."""
    from fastattn.kernels import arguments, configs

    padded = arguments.padded(setup.head_dim)
    architecture = arguments.architecture_of(problem.query)
    chosen = configs.choose(kernel, problem.query.element_size(), padded, architecture)
    named = {_tile_name(chosen): chosen}
    for config in configs.CANDIDATES.get((kernel, padded), ()):
        named.setdefault(_tile_name(config), config)
    return named, chosen


def _tile_name(config) -> str:
    tma = " tma" if config.tma else ""
    return f"{config.block_m}x{config.block_n} {config.num_warps} warps {config.num_stages} stages{tma}"


@dataclass(frozen=True)
class Slices:
    """The one choice that the reference has, so that a run without a GPU has something to rank."""

    whole: bool = False  # one call, not one for each entry of the batch


def reference(direction: str) -> Callable[[Setup], list[Candidate]]:
    """The reference as an engine with two configurations, of which the chosen one is the slower."""

    def list_candidates(setup: Setup) -> list[Candidate]:
        from fastattn.backends import reference as engine

        problem = problem_of(setup)
        out, lse = _forward_buffers(problem)
        engine.forward(problem, out, lse)
        grad_out = setup.tensors["grad_out"]

        def candidate(name: str, config: Slices) -> Candidate:
            if direction == "forward":
                results = {"out": _forward_buffers(problem)[0]}
            else:
                results = _gradient_buffers(problem, ("grad_query", "grad_key", "grad_value"))
            entries = [slice(None)] if config.whole else [slice(i, i + 1) for i in range(setup.batch)]

            def run() -> None:
                for entry in entries:
                    part = problem._replace(**{name: getattr(problem, name)[entry] for name in INPUTS})
                    written = [tensor[entry] for tensor in results.values()]
                    if direction == "forward":
                        engine.forward(part, *written, lse[entry])
                    else:
                        engine.backward(part, out[entry], lse[entry], grad_out[entry], None, *written, None)

            return Candidate(name, not config.whole, run, results, config)

        return [candidate("chosen", Slices()), candidate("whole", Slices(whole=True))]

    return list_candidates


INPUTS = ("query", "key", "value")

#: By engine and direction.
ENGINES: dict[tuple[str, str], Callable[[Setup], list[Candidate]]] = {
    ("hopper", "forward"): hopper("forward"),
    ("hopper", "backward"): hopper("backward"),
    ("triton", "forward"): triton_forward,
    ("triton", "grad_key_value"): _triton_backward("grad_key_value"),
    ("triton", "grad_query"): _triton_backward("grad_query"),
    ("triton", "decode"): triton_decode,
    ("reference", "forward"): reference("forward"),
    ("reference", "backward"): reference("backward"),
}
