"""Part ``smoke``, the gate: does every family of kernels live, and is it right?

One task a family, in one process, the simplest first and the one that spins on other programs last. A family
is compiled and called, then called twice more; the results must agree bit for bit and with the float64 reference,
computed on the device. Keys and values that no query sees hold NaN. The backward starts from the exact forward, so
that no family is judged by another. What is dead changes what the rest of the run does: :func:`consequences`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import dataclass

from . import watchdog
from .families import DEAD, GRADIENTS
from .pool import Task

#: For compiling and calling one case, also where a launch waits on the host for a kernel that hangs: less than the
#: step has.
COMPILE_SECONDS = 40.0
#: For judging the cases of a family, and for a core dump where one hangs.
JUDGE_SECONDS = 15.0 + watchdog.DUMP_SECONDS + watchdog.READ_SECONDS
KEYS, QUERIES = ("grad_key", "grad_value"), ("grad_query",)


@dataclass(frozen=True)
class Family:
    """What launches a family: an engine ("torch", "plain", "hopper", or what is neither), what is asked for, changes
    to the configuration, and the cases (fields of testing.Case)."""

    engine: str
    cases: tuple[dict, ...]
    gradients: tuple[str, ...] = ()  # () is the forward
    changes: tuple[tuple[str, object], ...] = ()
    repeats: bool = True  # bit for bit


def _case(name: str, queries: int, keys: int, **fields) -> dict:
    return {"name": name, "batch": 2, "heads": 8, "queries": queries, "keys": keys} | fields


def _table() -> dict[str, Family]:
    """More than 132 tiles where a grid is persistent; lengths that no tile divides."""
    ragged = {"batch": 3, "kv_heads": 2, "causal": "lower_right"}
    two_sweeps, unordered = (("fused", False),), (("fused", True), ("ordered", False))
    ordered = (("fused", True), ("ordered", True))

    plain = (
        _case("ragged", 333, 457, key_lengths=(457, 0, 129), layout="transposed", head_dim=64, **ragged),
        _case("bias", 130, 197, bias="per_head", head_dim=128),
    )
    d64 = (
        _case("full", 1100, 1100, heads=16, kv_heads=8, head_dim=64),
        _case("lengths", 777, 900, key_lengths=(900, 0, 131), **ragged | {"kv_heads": 8}, head_dim=64),
    )
    d128 = (
        _case("causal", 1100, 1150, causal="lower_right", head_dim=128),
        _case("window", 300, 1000, window=(130, 3), head_dim=128),
    )
    d256 = (_case("causal", 600, 600, batch=4, kv_heads=8, causal="upper_left", head_dim=256),)
    return {
        "torch/matmul": Family("torch", (_case("matmul", 2048, 2048, batch=1, heads=1, head_dim=2048),)),
        "plain/forward": Family("plain", plain),
        "plain/grad_key_value": Family("plain", plain, KEYS),
        "plain/grad_query": Family("plain", plain, QUERIES),
        "plain/decode": Family(
            "plain", (_case("decode", 1, 5000, kv_heads=2, key_lengths=(5000, 1031), head_dim=128),)
        ),
        "additive": Family("additive", (_case("additive", 100, 131, heads=1, head_dim=64),), GRADIENTS),
        "hopper/statistics": Family("statistics", (_case("statistics", 333, 400, head_dim=128),)),
        "hopper/forward/d128": Family(
            "hopper",
            (
                _case("full", 1100, 1100, kv_heads=4, head_dim=128),
                _case("causal", 1100, 1200, causal="lower_right", layout="transposed", head_dim=128),
                _case("lengths", 777, 900, key_lengths=(900, 0, 131), **ragged, head_dim=128),
                _case("window", 300, 1000, window=(130, 3), head_dim=128),
            ),
        ),
        "hopper/forward/d64": Family("hopper", (d64[0] | {"queries": 1900}, d64[1] | {"queries": 1300})),
        "hopper/forward/d256": Family("hopper", (d256[0] | {"name": "full", "causal": None}, *d256)),
        "hopper/keys/d64": Family("hopper", d64, KEYS, two_sweeps),
        "hopper/queries/d64": Family("hopper", d64, QUERIES, two_sweeps),
        "hopper/keys/d256": Family("hopper", d256, KEYS, two_sweeps),
        "hopper/queries/d256": Family("hopper", d256, QUERIES, two_sweeps),
        "hopper/keys/d128": Family("hopper", d128, KEYS, two_sweeps),
        "hopper/queries/d128": Family("hopper", d128, QUERIES, two_sweeps),
        "hopper/padded/d96": Family("hopper", (_case("causal", 500, 400, causal="upper_left", head_dim=96),)),
        "hopper/fused_unordered/d128": Family("hopper", d128, GRADIENTS, unordered, repeats=False),
        "hopper/fused/d128": Family(
            "hopper",
            (
                *d128,
                _case("padded", 500, 400, causal="upper_left", head_dim=96),
                _case("many programs", 700, 2100, head_dim=128),  # 272 of them
                _case("many programs, causal", 1500, 2100, kv_heads=4, causal="lower_right", head_dim=128),
            ),
            GRADIENTS,
            ordered,
        ),
    }


FAMILIES = _table()


def tasks(device: str, backend: str, quick: bool = False, folder: str | None = None) -> list[Task]:
    """One task a family, to be run in this order by one worker alone; ``folder`` keeps what a debugger says."""
    arguments = {"device": device, "backend": backend, "folder": folder}
    return [
        Task("smoke", f"smoke/{name}", ".smoke:run", {"family": name} | arguments, timeout=60.0, estimate=1.0)
        for name in FAMILIES
    ]


def run(context, family: str, device: str, backend: str, folder: str | None = None) -> None:
    """Compile and call, then judge and call again: a row for each case, or one that says what is wrong."""
    from .check import assert_same
    from .worker import run_stage

    if device == "cuda":
        _start_cuda(context)
    labels = {"family": family}
    calls = {}

    def launch(call) -> dict:
        return watchdog.launch(
            context, family, lambda: launch_family(call, backend), device, folder, case=call.case.name
        )

    def compile_and_call() -> bool:
        for case in cases_of(family, device):
            context.stage(f"compile/{family}", COMPILE_SECONDS)
            call = Call(family, case, device)
            calls[call] = launch(call)
        return True

    def judge_and_call_again() -> None:
        for call, results in calls.items():
            row = call.judge(results)
            for nth in ("second", "third"):  # the third is a remembered launch, see kernels/remembered.py
                again = launch(call)
                if FAMILIES[family].repeats:
                    assert_same(results, again, f"{call.case.name}: a {nth} run")
                call.judge(again)
            context.row("ok", stage=family, case=call.case.name, **row, **labels)

    if run_stage(context, f"compile/{family}", compile_and_call, COMPILE_SECONDS, **labels):
        seconds = JUDGE_SECONDS + watchdog.LAUNCH_SECONDS * len(calls)
        run_stage(context, family, judge_and_call_again, seconds, **labels)


def _start_cuda(context) -> None:
    """Start CUDA so that it can be asked for a core dump; without, where that itself takes the process down."""
    import torch

    from .worker import run_stage

    def start() -> None:
        watchdog.arm()
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()

    if not torch.cuda.is_initialized():
        run_stage(context, "core_dump", start, 40.0)


def cases_of(family: str, device: str) -> list:
    """The cases of a family; on a CPU small ones with the same ingredients."""
    from fastattn.testing import Case

    cases = [Case(seed=index, **fields) for index, fields in enumerate(FAMILIES[family].cases)]
    return cases if device == "cuda" else [_tiny(case) for case in cases]


def _tiny(case):
    def small(length: int) -> int:
        return -(-length // 32)

    window = None if case.window is None else tuple(small(bound) for bound in case.window)
    lengths = None if case.key_lengths is None else tuple(map(small, case.key_lengths))
    sizes = {"queries": small(case.queries), "keys": small(case.keys), "head_dim": 8}
    return dataclasses.replace(case, window=window, key_lengths=lengths, **sizes)


class Call:
    """A case on a device: inputs whose unseen keys hold NaN, and what is right."""

    def __init__(self, family: str, case, device: str) -> None:
        import torch

        from fastattn import testing

        from .check import with_nan_in_unattended_rows

        self.family, self.case, self.device = FAMILIES[family], case, device
        dtype = torch.float32 if self.family.engine == "additive" else torch.bfloat16
        self.problem = case.make(device, dtype)
        self.grad_out = case.make_grad_out(device, dtype)
        self.grad_lse = case.make_grad_lse(device, torch.float32)
        if self.family.engine == "torch":
            return
        make_truth = _additive_truth if self.family.engine == "additive" else testing.run_reference
        inputs = (self.problem, self.grad_out, self.grad_lse)
        self.exact, self.naive = make_truth(*inputs), make_truth(*inputs, dtype=None)
        self.saved = (self.exact["out"].to(dtype), self.exact["lse"].float())
        if self.family.engine in ("plain", "hopper"):
            with_nan_in_unattended_rows(self.problem)
        if device == "cuda":
            torch.cuda.synchronize()

    def judge(self, results: dict) -> dict:
        """The worst result and its share of the budget; raises AssertionError if it is over."""
        import torch

        from fastattn import testing

        if self.family.engine == "torch":
            return _judge_by_norm(results, {"product": _product(self.problem, double=True)}, 4e-3)
        if self.family.engine == "statistics":
            for name, expected in (("lse_2 padding", torch.inf), ("delta padding", 0.0)):
                if name in results and not (results[name] == expected).all():
                    raise AssertionError(f"{name} is not {expected} everywhere")
            return _judge_by_norm(results, self.statistics(), 1e-5)
        judgements = testing.assert_within_budget(
            results, self.problem, self.exact, self.naive, self.grad_out, self.grad_lse
        )
        worst = max(judgements, key=lambda j: j.error / j.budget)
        return {"worst": worst.name, "of_budget": round(worst.error / worst.budget, 3)}

    def statistics(self) -> dict:
        """lse in base 2 and rowsum(dO * O) - dlse of the rows that there are."""
        out, lse = (tensor.double() for tensor in self.saved)
        delta = (self.grad_out.double() * out).sum(-1) - self.grad_lse.double()
        return {"lse_2": (lse / 0.6931471805599453).flatten(0, 1), "delta": delta.flatten(0, 1)}


def launch_family(call: Call, backend: str) -> dict:
    """The results of one call of a family, into buffers that were NaN."""
    import torch

    family, problem = call.family, call.problem
    if family.engine == "torch":
        return {"product": _product(problem)}
    if family.engine == "additive":
        return _additive(call)
    if family.engine == "statistics":
        return _statistics(call, backend)
    launch, config = _launcher(family, problem, backend)
    if not family.gradients:
        results = {
            name: torch.full_like(tensor, torch.nan) for name, tensor in zip(("out", "lse"), call.saved, strict=True)
        }
        launch.forward(problem, results["out"], results["lse"])
        return results
    sources = {"grad_query": problem.query, "grad_key": problem.key, "grad_value": problem.value}
    results = {
        name: torch.full(source.shape, torch.nan, dtype=source.dtype, device=source.device)
        for name, source in sources.items()
        if name in family.gradients
    }
    gradients = {name: results.get(name) for name in sources} | {"grad_bias": None}
    launch.backward(problem, *call.saved, call.grad_out, call.grad_lse, **gradients, **config)
    return results


def _launcher(family: Family, problem, backend: str) -> tuple[object, dict]:
    """What has forward() and backward(), and the configuration for it."""
    from .problems import load_engine

    if backend != "triton":
        return load_engine(backend), {}
    engine = load_engine(family.engine)
    if not family.changes:
        return engine, {}
    from fastattn.kernels.hopper.configs import BACKWARD_CANDIDATES, backward_config, tile_columns
    from fastattn.kernels.hopper.plan import band_of

    band = band_of(problem)
    head_dim = problem.query.shape[-1]
    chosen = backward_config(head_dim, band.has_left or band.has_right)
    if dict(family.changes).get("fused") and not chosen.fused:
        chosen = BACKWARD_CANDIDATES[tile_columns(head_dim)]["fused"]
    return engine, {"config": dataclasses.replace(chosen, **dict(family.changes))}


def _product(problem, double: bool = False):
    left, right = problem.query[0, 0], problem.key[0, 0]
    return (left.double() @ right.double().mT).float() if double else (left @ right.mT).float()


def _statistics(call: Call, backend: str) -> dict:
    """The rows that there are, and those that the kernel pads each head with."""
    out, lse = call.saved
    if backend != "triton":
        return {name: tensor.float() for name, tensor in call.statistics().items()}
    from fastattn.kernels.hopper.statistics import row_statistics
    from fastattn.kernels.remembered import Call as Launches

    rows = row_statistics(Launches(remembers=False), out, lse, call.grad_out, call.grad_lse)
    found = dict(zip(("lse_2", "delta"), rows, strict=True))
    length = lse.shape[2]
    padding = {f"{name} padding": tensor[:, length:] for name, tensor in found.items()}
    return {name: tensor[:, :length] for name, tensor in found.items()} | padding


def _judge_by_norm(results: dict, exact: dict, tolerance: float) -> dict:
    """By the relative Frobenius error, which bf16's rounding of a product keeps below 2^-8."""
    import torch

    worst, largest = "", -1.0
    for name, truth in exact.items():
        error = torch.linalg.vector_norm(results[name].double() - truth.double()).item()
        share = error / (tolerance * torch.linalg.vector_norm(truth.double()).item())
        if not share <= 1.0:
            raise AssertionError(f"{name}: {share:.2f} of the allowed relative error {tolerance}")
        if share > largest:
            worst, largest = name, share
    return {"worst": worst, "of_budget": round(largest, 3)}


def _additive_weight(problem):
    import torch

    return torch.linspace(-1.0, 1.0, problem.query.shape[-1], device=problem.query.device)


def _additive(call: Call) -> dict:
    """Additive attention of the first head, through autograd."""
    import torch

    from fastattn.additive import additive_attention

    inputs = [tensor[:, 0].clone().requires_grad_() for tensor in call.problem[:3]]
    out = additive_attention(*inputs, _additive_weight(call.problem))
    gradients = torch.autograd.grad(out, inputs, call.grad_out[:, 0])
    results = {"out": out.detach()} | dict(zip(GRADIENTS, gradients, strict=True))
    return {name: tensor[:, None] for name, tensor in results.items()}


def _additive_truth(problem, grad_out, grad_lse, dtype="float64") -> dict:
    """The same by its definition, in float64, or with None in the problem's own dtype; lse is not judged."""
    import torch

    def convert(tensor):
        return tensor.detach() if dtype is None else tensor.detach().double()

    inputs = [convert(tensor[:, 0]).requires_grad_() for tensor in problem[:3]]
    query, key, value = inputs
    scores = (query[:, :, None] + key[:, None]).tanh() @ convert(_additive_weight(problem))
    out = scores.softmax(-1) @ value
    gradients = torch.autograd.grad(out, inputs, convert(grad_out[:, 0]))
    results = {"out": out.detach()} | dict(zip(GRADIENTS, gradients, strict=True))
    return {name: tensor[:, None] for name, tensor in results.items()} | {"lse": scores.detach().logsumexp(-1)[:, None]}


WRONG = ("fail", "error", "hang", "timeout", "crash")


def dead_families(rows: list[dict]) -> set[str]:
    """The families whose rows of part smoke say that they hang, crash, raise or are wrong; or that they were running,
    compiled, when the time was up."""
    named = set()
    for row in rows:
        stage = row.get("stage") or ""
        if row["part"] == "smoke" and row["status"] in WRONG:
            named.add(row.get("family") or stage.removeprefix("compile/"))
        elif row["part"] == "smoke" and row["status"] == "skipped":
            named.add(stage)
    return {name for name in named if name in FAMILIES}


def consequences(dead: set[str]) -> dict:
    """What a run is to do without the dead families.

    ``gate``: "go"; "plain" where the Hopper kernels are dead, and only plain kernels and peers are worth measuring;
    "stop" where nothing of ours lives. ``environment``: variables for all following workers. ``drop``: a regular
    expression of the keys of tasks to leave out, "" for none.
    """
    hopper = {"hopper/statistics", "hopper/forward/d128"} & dead
    plain = "plain/forward" in dead
    if "torch/matmul" in dead or (hopper and plain):
        return {"gate": "stop", "environment": {}, "drop": "."}
    environment = {DEAD: ",".join(sorted(dead))} if dead else {}
    drop = [pattern for name, pattern in _DROPPED.items() if name in dead]
    for columns in (64, 128, 256):
        backward = {f"hopper/{kernel}/d{columns}" for kernel in ("keys", "queries")}
        fused = {f"hopper/{kernel}/d{columns}" for kernel in ("fused", "fused_unordered")} & FAMILIES.keys()
        if f"hopper/forward/d{columns}" in dead:
            drop.append(rf"^(tune|ablate|compile/(tune|ablate))/hopper\w*_d{columns}_|d{columns}_.*/hopper$")
        elif backward & dead and fused <= dead:
            drop.append(rf"^(tune|ablate|compile/(tune|ablate))/hopper\w*_backward_d{columns}_")
    if hopper:
        environment["FASTATTN_HOPPER"] = "0"
        drop.append("hopper")
    return {"gate": "plain" if hopper else "go", "environment": environment, "drop": "|".join(drop)}


#: What has no other kernel to run instead.
_DROPPED = {
    "plain/forward": r"/plain$|triton_|mask|bias|dropout",
    "plain/grad_key_value": r"/plain$|triton_grad_key_value|mask|bias|dropout",
    "plain/grad_query": r"/plain$|triton_grad_query|mask|bias|dropout",
    "plain/decode": r"decode|bench/\w*_l1x",
    "hopper/padded/d96": r"d96|d80",
}


def drops(found: dict, key: str) -> bool:
    """Do the consequences leave out the task with this key?"""
    return bool(found["drop"]) and re.search(found["drop"], key) is not None


def _small_call(family: str) -> None:
    """A small call of a family, once: what compute-sanitizer runs."""
    import torch

    first = cases_of(family, "cuda")[0]
    small = dataclasses.replace(_tiny(first), head_dim=first.head_dim)
    launch_family(Call(family, small, "cuda"), "triton")
    torch.cuda.synchronize()


if __name__ == "__main__":
    _small_call(**json.loads(sys.argv[1]))
