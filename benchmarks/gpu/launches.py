"""What a run will launch, launched on the stub: the run's own tasks, without what judges and times them.

Each function makes the calls of one kind of task, told by its arguments; :func:`calls_of` yields them one by one, so
that one that fails costs only itself.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from unittest import mock

from .pool import Task

#: What is compiled first: the gate and the headline, what chooses the Hopper kernels' configurations, then by how often
#: it is used.
ORDER = (
    r"^smoke",
    r"^bench/d128_l(8192|1024|16384)_\w+_bf16(_upper_left)?$",
    r"^tune/hopper\w*_d128",
    r"^check/bf16",
    r"^tune/hopper",
    r"^(bench|profile)",
    r"^check/device",
    r"^tune",
    r"^check/fp16",
    r"",
)

Call = Callable[[], object]


def planned(names: tuple[str, ...] = ()) -> list[Task]:
    """The tasks of a run's steps (all, or those named) that launch our kernels, in the order in which a cache should
    have them."""
    from .plan import steps

    tasks = [task for step in steps("cuda", "triton") if not names or step.name in names for task in step.tasks]
    return sorted(tasks, key=lambda task: next(rank for rank, key in enumerate(ORDER) if re.search(key, task.key)))


def calls_of(task: Task) -> Iterator[tuple[str, Call]]:
    """The calls of a task with their names; ValueError where its arguments are of no known kind."""
    arguments = task.arguments
    if "family" in arguments:
        yield from _smoke(arguments["family"])
    elif "case" in arguments:
        yield from _case(**arguments)
    elif "direction" in arguments and "engine" in arguments:
        yield from _candidates(**arguments)
    elif "setup" in arguments:
        yield from _contenders(arguments["setup"], arguments.get("contenders", ("fastattn",)))
    elif task.handler.endswith(":run_host"):
        yield from _host()
    elif task.handler.endswith(":run"):
        yield task.key, lambda: _handler(task)
    else:
        raise ValueError(f"{task.key}: nothing here knows what {task.handler} launches")


def _smoke(family: str) -> Iterator[tuple[str, Call]]:
    """The calls of a family of the gate, without their truth."""
    from . import smoke

    if smoke.FAMILIES[family].engine == "torch":
        return

    def unknown(problem, *gradients, dtype=None) -> dict:
        import torch

        lse = torch.empty(problem.query.shape[:3])
        return {"out": torch.empty(*lse.shape, problem.value.shape[-1]), "lse": lse}

    for case in smoke.cases_of(family, "cuda"):
        with (
            mock.patch("fastattn.testing.run_reference", unknown),
            mock.patch.object(smoke, "_additive_truth", unknown),
        ):
            call = smoke.Call(family, case, "cpu")
        yield case.name, lambda call=call: smoke.launch_family(call, "triton")


def _case(case: dict, dtype: str, engine: str, **others) -> Iterator[tuple[str, Call]]:
    """Forward and backward of a case of the table."""
    from fastattn import testing

    from .problems import DTYPES, load_engine

    case = testing.Case(**{name: tuple(value) if isinstance(value, list) else value for name, value in case.items()})
    problem = case.make("cpu", DTYPES[dtype])
    loaded = load_engine(engine)
    if loaded.reasons(problem):
        return
    grad_out, grad_lse = case.make_grad_out("cpu", DTYPES[dtype]), case.make_grad_lse("cpu", problem.lse_dtype)
    yield f"{engine} forward", lambda: testing.run_backend(loaded, problem)
    yield f"{engine} backward", lambda: testing.run_backend(loaded, problem, grad_out, grad_lse)


def _candidates(engine: str, direction: str, setup: dict, **others) -> Iterator[tuple[str, Call]]:
    """Each configuration that is to be ranked."""
    from .candidates import ENGINES
    from .contenders import Setup

    if (engine, direction) in ENGINES:
        for candidate in ENGINES[engine, direction](Setup(**setup | {"device": "cpu"})):
            yield candidate.name, candidate.run


def _contenders(setup: dict, contenders) -> Iterator[tuple[str, Call]]:
    """Our contenders' forward and, but for decoding, backward, as a user calls them."""
    import torch

    from .contenders import CONTENDERS, OURS, Setup

    made = Setup(**setup | {"device": "cpu", "backend": "triton"})

    def call(name: str) -> None:
        forward = CONTENDERS[name](made)
        with torch.no_grad():
            forward()
        out = forward()
        if made.queries > 1:
            torch.autograd.grad(out, made.leaves, made.tensors["grad_out"])

    for name in contenders:
        if name in OURS:
            yield name, lambda name=name: call(name)


def _host() -> Iterator[tuple[str, Call]]:
    """The tiny call and the layer whose host time is measured."""
    import torch

    import fastattn

    query = torch.empty(1, 8, 16, 64, dtype=torch.bfloat16)
    yield "call", lambda: fastattn.scaled_dot_product_attention(query, query, query, backend="triton")
    layer = fastattn.MultiHeadAttention(512, 8, batch_first=True).bfloat16()
    x = torch.empty(16, 1024, 512, dtype=torch.bfloat16, requires_grad=True)
    yield "layer", lambda: layer(x, x, x, need_weights=False)[0].sum().backward()


class _Silent:
    """A context (worker.Context) whose rows nobody reads."""

    current = None

    def stage(self, name: str, seconds: float | None = None) -> bool:
        self.current = name
        return True

    def row(self, status: str, **values) -> None:
        pass


class _CpuInPlaceOfCuda(str):
    """The device "cpu" of a check that asks whether it is "cuda", and then takes the sizes of one."""

    def __new__(cls):
        return super().__new__(cls, "cpu")

    def __eq__(self, other) -> bool:
        return other == "cuda"

    __hash__ = str.__hash__


def _handler(task: Task) -> None:
    """The task itself, on the CPU: streams, graphs and the compiler of torch do nothing, and every result is right."""
    import torch

    from . import devices

    module, function = task.handler.split(":")
    handler = getattr(importlib.import_module(module, __package__), function)
    names = ("Stream", "stream", "current_stream", "CUDAGraph", "graph", "synchronize", "_sleep")
    absent = {name: mock.MagicMock() for name in names}
    absent["Stream"].return_value.query.return_value = False
    with (
        mock.patch.multiple(torch.cuda, **absent),
        mock.patch.multiple(torch, compile=lambda f, **options: f, equal=lambda *tensors: True),
        mock.patch.object(devices, "_close", lambda *results: None),
    ):
        device = _CpuInPlaceOfCuda() if task.arguments.get("name") in devices.WIDE_CHECKS else "cpu"
        handler(_Silent(), **task.arguments | {"device": device})
