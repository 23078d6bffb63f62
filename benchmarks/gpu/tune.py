"""The candidates of kernels/configs.py and kernels/hopper/configs.py, ranked: what configs.py should choose.

Each candidate's result is verified before it is timed; the ones of a task take turns, so that their order is not the
order of the clock. :mod:`.predictions` says what was expected of each. ``best`` measures the winners once more beside
the peers.
"""

from __future__ import annotations

import math

from . import watchdog
from .bench import GROUPS
from .families import is_dead
from .pool import Task

TOKENS, WIDTH = 16384, 2048
#: Seconds that a stage may take: a candidate may have to be compiled, a launch takes milliseconds.
VERIFY_SECONDS = 20.0
#: How much faster than the chosen configuration a winner must be.
WORTHWHILE = 1.005
PEERS = ("cudnn", "flash")


def order_tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """The backward at D = 128: which sweep, and in which order dQ is added, at each length."""
    if device == "cpu":
        return []
    shapes = [(length, causal, {}) for length in (8192, 1024, 2048, 16384) for causal in ("upper_left", None)]
    shapes[2:2] = [(8192, "upper_left", GROUPS)]
    shapes = shapes[: 1 if quick else None]
    return [task_of("hopper", "backward", 128, causal, length, **changes) for length, causal, changes in shapes]


def switch_tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """The forward at D = 128: each switch and each tile."""
    if device == "cpu":
        return []
    shapes = [(8192, None), (8192, "upper_left"), (1024, None), (1024, "upper_left")]
    return [task_of("hopper", "forward", 128, causal, length) for length, causal in shapes[: 1 if quick else None]]


def tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """What the other two do not rank; on a CPU the reference, in two ways."""
    if device == "cpu":
        return [task_of("reference", direction, 16, None, 32, **_tiny()) for direction in ("forward", "backward")]
    wanted = [
        task_of("hopper", direction, head_dim, causal, 8192)
        for head_dim, causals in ((64, (None, "upper_left")), (256, (None,)))
        for direction in ("forward", "backward")
        for causal in causals
    ]
    wanted.append(task_of("triton", "decode", 128, None, 8192, batch=16, heads=32, kv_heads=8, queries=1))
    wanted.append(task_of("triton", "decode", 128, None, 65536, batch=1, heads=16, kv_heads=16, queries=1))
    for head_dim in (128, 64):
        for direction in ("forward", "grad_key_value", "grad_query"):
            wanted.append(task_of("triton", direction, head_dim, None, 8192))
    return wanted[:1] if quick else wanted


def task_of(engine: str, direction: str, head_dim: int, causal: str | None, length: int, **changes) -> Task:
    """A task on one shape; ``changes`` are fields of :class:`contenders.Setup`."""
    setup = setup_of(head_dim, causal, length, **changes)
    heads, kv_heads = setup["heads"], setup["kv_heads"]
    groups = f"_h{heads}kv{kv_heads}" if heads != kv_heads else ""
    return Task(
        part="tune",
        key=f"tune/{engine}_{direction}_d{head_dim}_l{length}_{causal or 'full'}{groups}",
        handler=".tune:run",
        arguments={
            "engine": engine,
            "direction": direction,
            "setup": setup,
        },
        timeout=VERIFY_SECONDS,
        estimate=3.0,
    )


def setup_of(head_dim: int, causal: str | None, length: int, **changes) -> dict:
    """The fields of a set-up of constant tokens and width, in bf16."""
    return {
        "batch": max(1, TOKENS // length),
        "heads": WIDTH // head_dim,
        "kv_heads": WIDTH // head_dim,
        "queries": length,
        "keys": length,
        "head_dim": head_dim,
        "dtype": "bf16",
        "causal": causal,
    } | changes


def _tiny() -> dict:
    return {"batch": 8, "heads": 2, "kv_heads": 2, "dtype": "fp32", "device": "cpu", "backend": "reference"}


#: Engines whose winners are measured again.
WINNING = ("hopper", "reference")


def winners(rows: list[dict]) -> dict[tuple, dict]:
    """{(direction, head_dim, causal): the row of the variant that is fastest over the lengths measured}.

    One that every length has, that gives the same bits from run to run, and that is worth a change; none otherwise.
    """
    ranked: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        is_ranked = row["status"] == "ok" and row.get("engine") in WINNING and "config" in row
        if row["part"] == "tune" and is_ranked and row.get("relative"):  # none where the chosen one was not timed
            key = (row["direction"], row["head_dim"], row["causal"])
            ranked.setdefault(key, {}).setdefault(row["variant"], []).append(row)
    found = {}
    for key, named in ranked.items():
        lengths = max(len(entries) for entries in named.values())
        means = {
            name: math.exp(sum(math.log(row["relative"]) for row in entries) / lengths)
            for name, entries in named.items()
            if len(entries) == lengths and _repeats_itself(entries[0]["config"])
        }
        best = max(means, key=means.get, default=None)
        if best is not None and means[best] > WORTHWHILE and not named[best][0]["default"]:
            found[key] = named[best][0] | {"relative": round(means[best], 4)}
    return found


def _repeats_itself(config: dict) -> bool:
    return config.get("ordered", True) or not config.get("fused")


def config_lines(rows: list[dict]) -> list[str]:
    """The winners as lines of kernels/hopper/configs.py."""
    lines = []
    for (direction, head_dim, causal), row in sorted(winners(rows).items(), key=str):
        kind = "ForwardConfig" if direction == "forward" else "BackwardConfig"
        values = ", ".join(f"{name}={value!r}" for name, value in row["config"].items())
        table = f"{direction.upper()}[{head_dim}, {causal is not None}]"
        lines.append(f"{table} = {kind}({values})  # {row['variant']}: {row['relative']:.3f}")
    return lines


def best_tasks(rows: list[dict], device: str, backend: str, quick: bool) -> list[Task]:
    """The winners beside the chosen configuration and the peers, at 8k."""
    return [
        Task(
            part="best",
            key=f"best/{direction}_d{head_dim}_{causal or 'full'}",
            handler=".tune:run",
            arguments={
                "engine": row["engine"],
                "direction": direction,
                "setup": setup_of(head_dim, causal, 32, **_tiny())
                if device == "cpu"
                else setup_of(head_dim, causal, 8192),
                "only": [row["variant"]],
                "peers": list(PEERS),
            },
            timeout=VERIFY_SECONDS,
            estimate=2.0,
        )
        for (direction, head_dim, causal), row in winners(rows).items()
    ]


def run(
    context, engine: str, direction: str, setup: dict, only: list[str] | None = None, peers: tuple[str, ...] = ()
) -> None:
    """Verify candidates (the default, and those named, or all) against the float64 reference, then time them in turns
    beside a matrix product and the peers; one row per candidate and peer."""
    from .bench import time_each
    from .candidates import ENGINES
    from .contenders import Setup
    from .verify import Truth
    from .worker import run_stage

    family = f"{engine}/{direction}/d{setup['head_dim']}"
    if (engine, direction) not in ENGINES:
        context.row("unsupported", stage="list", error=f"the {engine} engine has no {direction} candidates")
        return
    made = Setup(**setup)
    labels = {"engine": engine, "direction": direction}
    labels |= {k: v for k, v in setup.items() if k not in ("device", "backend")}
    candidates = run_stage(context, f"{family}/list", lambda: ENGINES[engine, direction](made), VERIFY_SECONDS) or []
    candidates = [candidate for candidate in candidates if _lives(context, candidate, family, labels)]
    if only is not None:
        candidates = [candidate for candidate in candidates if candidate.default or candidate.name in only]
    if not candidates:
        return
    truth = Truth(made, with_gradients=direction != "forward")
    functions, own = {}, {}
    for candidate in candidates:

        def verify(candidate=candidate) -> None:
            watchdog.launch(context, family, lambda: _run_if_it_fits(candidate), made.device, **labels)
            of_budget = truth.judge(candidate.results, strict=True)
            functions[candidate.name] = candidate.run
            own[candidate.name] = {"default": candidate.default, "of_budget": of_budget, "config": _as_dict(candidate)}

        run_stage(context, f"{family}/{candidate.name}", verify, VERIFY_SECONDS, variant=candidate.name, **labels)
    for name in peers:
        run_stage(
            context, name, lambda name=name: functions.update({name: _peer(name, made, direction)}), VERIFY_SECONDS
        )
    if not functions:
        return

    def fields(name: str) -> dict:
        return {"variant": name} | own.get(name, {"default": False})

    time_each(context, functions, made, direction, fields, labels, family, relative_to=_default(own))


def _lives(context, candidate, family: str, labels: dict) -> bool:
    """False, and a row, where the fused kernel that a candidate runs is dead: each would cost a process."""
    if not getattr(candidate.config, "fused", False):
        return True
    kernel = "fused" if candidate.config.ordered else "fused_unordered"
    name = family.replace("/backward/", f"/{kernel}/")
    if not is_dead(name):
        return True
    stage = f"{family}/{candidate.name}"
    context.row("skipped", stage=stage, error=f"{name} is dead", variant=candidate.name, **labels)
    return False


def _default(own: dict) -> str | None:
    return next((name for name, values in own.items() if values["default"]), None)


def _as_dict(candidate) -> dict:
    import dataclasses

    return dataclasses.asdict(candidate.config)


def _peer(name: str, made, direction: str):
    """A peer's call, made once."""
    from .bench import backward_of, without_graph
    from .contenders import CONTENDERS

    forward = CONTENDERS[name](made)
    call = without_graph(forward) if direction == "forward" else backward_of(made, forward(), name)
    call()
    return call


def _run_if_it_fits(candidate) -> None:
    """A tile that takes more shared memory or registers than there are is no failure, only no candidate."""
    from .worker import Unsupported

    try:
        candidate.run()
    except Exception as error:
        if type(error).__name__ != "OutOfResources":  # of Triton, which may not be there
            raise
        raise Unsupported(str(error)) from None
