"""Part ``tune``: the candidates of kernels/configs.py and kernels/hopper/configs.py, ranked.

Each candidate's result is verified before it is timed; the ones of a task take turns, so that their
order is not the order of the clock. The table says what configs.py should choose.
"""

from __future__ import annotations

from .pool import Task

TOKENS, WIDTH = 16384, 2048
PAIRS = (
    ("hopper", "forward"),
    ("hopper", "backward"),
    ("triton", "forward"),
    ("triton", "grad_key_value"),
    ("triton", "grad_query"),
)


def tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """Engine, direction, head dimension, causality and length; the most used first."""
    if device == "cpu":
        return []
    wanted = []
    for head_dim in (128, 64, 256):
        for engine, direction in PAIRS:
            for causal in (None, "upper_left"):
                wanted.append(task_of("tune", engine, direction, head_dim, causal, 8192))
    for causal in (None, "upper_left"):
        wanted.append(task_of("tune", "hopper", "forward", 128, causal, 1024))
    wanted.append(task_of("tune", "triton", "decode", 128, None, 8192, batch=16, heads=32, kv_heads=8, queries=1))
    wanted.append(task_of("tune", "triton", "decode", 128, None, 65536, batch=1, heads=16, kv_heads=16, queries=1))
    return wanted[:2] if quick else wanted


def task_of(part: str, engine: str, direction: str, head_dim: int, causal: str | None, length: int, **changes) -> Task:
    """A task on one shape; ``changes`` are fields of :class:`contenders.Setup`."""
    setup = {
        "batch": max(1, TOKENS // length),
        "heads": WIDTH // head_dim,
        "kv_heads": WIDTH // head_dim,
        "queries": length,
        "keys": length,
        "head_dim": head_dim,
        "dtype": "bf16",
        "causal": causal,
    } | changes
    return Task(
        part=part,
        key=f"{part}/{engine}_{direction}_d{head_dim}_l{length}_{causal or 'full'}",
        handler=".tune:run",
        arguments={"engine": engine, "direction": direction, "setup": setup},
        timeout=25.0,
        estimate=3.0,
    )


def compile_tasks(timed: list[Task]) -> list[Task]:
    """The same candidates run once, untimed, side by side; one that hangs is left out afterwards."""
    return [Task("compile", f"compile/{task.key}", ".tune:compile_only", task.arguments, 60.0, 9.0) for task in timed]


def compile_only(context, engine: str, direction: str, setup: dict) -> None:
    from .problems import synchronize
    from .worker import run_stage

    def run(candidate) -> None:
        _run_if_it_fits(candidate)
        synchronize(setup.get("device", "cuda"))

    for candidate in _candidates(context, engine, direction, setup):
        run_stage(context, candidate.name, lambda candidate=candidate: run(candidate), variant=candidate.name)


def _run_if_it_fits(candidate) -> None:
    """A tile that takes more shared memory or registers than there are is no failure, only no candidate."""
    from triton.runtime.errors import OutOfResources

    from .worker import Unsupported

    try:
        candidate.run()
    except OutOfResources as error:
        raise Unsupported(str(error)) from None


def _candidates(context, engine: str, direction: str, setup: dict) -> list:
    from .candidates import ENGINES
    from .contenders import Setup
    from .worker import run_stage

    if (engine, direction) not in ENGINES:
        context.row("unsupported", stage="list", error=f"the {engine} engine has no {direction} candidates")
        return []
    return run_stage(context, "list", lambda: ENGINES[engine, direction](Setup(**setup))) or []


def run(context, engine: str, direction: str, setup: dict) -> None:
    """Verify and rank; one row per candidate."""
    rank(context, _candidates(context, engine, direction, setup), setup, direction, {"engine": engine})


def rank(context, candidates: list, setup: dict, direction: str, labels: dict) -> None:
    """Verify candidates against the float64 reference, then time them in turns beside a matrix product."""
    from .contenders import Setup
    from .timing import time_beside_ceiling
    from .verify import Truth
    from .worker import run_stage

    if not candidates:
        return
    made = Setup(**setup)
    truth = Truth(made, with_gradients=direction != "forward")
    labels = labels | {"direction": direction} | {k: v for k, v in setup.items() if k not in ("device", "backend")}
    functions, default = {}, {}
    for candidate in candidates:

        def verify(candidate=candidate) -> None:
            _run_if_it_fits(candidate)
            truth.judge(candidate.results, strict=True)
            functions[candidate.name] = candidate.run
            default[candidate.name] = candidate.default

        run_stage(context, candidate.name, verify, variant=candidate.name, **labels)
    if not functions:
        return
    context.stage("timing")
    timed = time_beside_ceiling(functions, made, direction)
    chosen = next((timed[name]["rate"] for name in functions if default[name]), None)
    for name in functions:
        relative = round(timed[name]["rate"] / chosen, 4) if chosen else None
        context.row("ok", variant=name, default=default[name], relative=relative, **timed[name], **labels)
