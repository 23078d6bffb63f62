"""Part ``check``: is every result right on this device?

Each case of :mod:`fastattn.testing`, and more that are shaped for a GPU's tiles and persistent grids,
runs forward and backward in each dtype. The truth is the float64 reference on the CPU; the budget is
twice naive attention's error in the same dtype, on the same device. Each family of kernels that a case
runs is a stage of its own, named by it (families.py), after a stage that compiles it: it runs twice and
must be bitwise equal, and once more with NaN in every key and value that no query may attend to, which
must change nothing. Dropout is judged by the same budget: one weight dropped differently would break it.
"""

from __future__ import annotations

from dataclasses import asdict

from . import watchdog
from .families import families_of, family_of
from .pool import Task

__all__ = ["device_cases", "family_of", "run_case", "tasks"]

#: By dtype the head dimensions whose tiles' edges are looked at: dtypes differ in little else.
SHAPED = {"bf16": (64, 96, 128, 192, 256), "fp16": (128,), "fp32": (64, 128)}
#: Fewer queries the backend may give to the kernels that split the keys.
FEW_QUERIES = 128
#: What a family's first call may take, with the compiler; afterwards each launch has watchdog.LAUNCH_SECONDS.
COMPILE_SECONDS = 60.0
LAUNCHES = 3  # of a compiled family: twice, and once with NaN


def tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """One task per case and dtype, the most telling first: a run that is cut short has seen every case in bf16.

    First what the Hopper kernels take, in bf16; then the rest in bf16, where what is shaped for the Hopper kernels is
    also run without them, and, where the backend may choose others on Hopper too, by them alone; then fp16 and fp32.
    """
    from fastattn.testing import CASES, SMOKE_CASES

    every = device_cases(quick, tiny=device == "cpu")
    first, found = [], []
    for dtype, head_dims in SHAPED.items():
        shaped = every if device == "cpu" else [case for case in every if case.head_dim in head_dims]
        for case in (*shaped, *(SMOKE_CASES if quick else CASES)):
            hopper = dtype == "bf16" and _suits_hopper(case)
            (first if hopper else found).append(_task(case, dtype, device, backend))
        if quick:
            break
        if dtype == "bf16" and device == "cuda":
            few = [case for case in shaped if case.queries < FEW_QUERIES and case.head_dim in (64, 128)]
            first += [_task(case, dtype, device, "hopper", "/hopper") for case in few]
            found += [_task(case, dtype, device, "plain", "/plain") for case in shaped]
    return first + found


def _suits_hopper(case) -> bool:
    """Roughly what the Hopper kernels take: it decides the order alone."""
    plain_weights = case.mask is None and case.bias is None and not case.dropout_p
    return plain_weights and 40 <= case.head_dim <= 256 and case.value_dim in (None, case.head_dim)


def _task(case, dtype: str, device: str, engine: str, suffix: str = "") -> Task:
    return Task(
        part="check",
        key=f"check/{dtype}/{case.name}{suffix}",
        handler=".check:run_case",
        arguments={"case": asdict(case), "dtype": dtype, "device": device, "engine": engine},
        timeout=60.0,
        estimate=3.0 if max(case.head_dim, case.value_dim or 0) > 128 else 1.5,  # with a warm compile cache
    )


def device_cases(quick: bool, tiny: bool) -> list:
    """Cases at the edges of GPU tiles: heads and lengths that a persistent grid deals unevenly."""
    from fastattn.testing import Case

    if tiny:
        return [Case("tile_smallest", batch=1, heads=1, queries=5, head_dim=16)]
    cases = []
    for head_dim in (64, 128) if quick else (64, 96, 128, 192, 256):
        common = {"head_dim": head_dim, "seed": head_dim}
        name = f"tile_d{head_dim}"
        cases += [
            Case(f"{name}_1024", batch=1, queries=1024, **common),
            Case(f"{name}_1024_causal", batch=1, queries=1024, causal="upper_left", **common),
            Case(
                f"{name}_ragged_gqa",
                batch=3,
                heads=6,
                kv_heads=2,
                queries=333,
                keys=457,
                key_lengths=(457, 0, 129),
                causal="lower_right",
                layout="transposed",
                **common,
            ),
        ]
        if quick:
            continue
        cases += [
            Case(f"{name}_keys_past_causal", queries=65, keys=300, causal="upper_left", **common),
            Case(f"{name}_keys_past_window", queries=65, keys=300, window=(9, 3), **common),
            Case(f"{name}_127", queries=127, keys=129, **common),
            Case(f"{name}_129_causal", queries=129, keys=127, causal="upper_left", **common),
            Case(f"{name}_191_lower_right", queries=191, keys=385, causal="lower_right", **common),
            Case(f"{name}_long_queries", queries=700, keys=130, causal="lower_right", **common),
            Case(f"{name}_window", queries=600, window=(130, 3), layout="packed", **common),
            Case(f"{name}_window_causal", queries=600, causal="upper_left", window=(200, None), **common),
            Case(f"{name}_lengths", batch=4, queries=260, key_lengths=(1, 64, 128, 260), **common),
            Case(f"{name}_many_heads", batch=7, heads=23, queries=193, causal="upper_left", **common),
        ]
    decode = {"heads": 8, "kv_heads": 2, "queries": 1, "head_dim": 128}
    cases += [
        Case("decode_4096", keys=4096, **decode),
        Case("decode_ragged", batch=3, keys=5000, key_lengths=(5000, 0, 1031), **decode),
        Case("decode_window", keys=4096, causal="lower_right", window=(511, None), **decode),
    ]
    return cases


def run_case(context, case: dict, dtype: str, device: str, engine: str) -> None:
    """One case, judged: a row for each family that computes some of it, and one more if NaN could be hidden.

    ``engine``: a backend, or "plain" or "hopper" for the one or the other half of the GPU's.
    """
    from fastattn import testing

    from .problems import DTYPES, load_engine

    case = testing.Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in case.items()})
    labels = {"case": case.name, "dtype": dtype}
    loaded = load_engine(engine)
    problem = case.make(device, DTYPES[dtype])
    refusals = loaded.reasons(problem)
    if refusals:
        context.row("unsupported", stage="reasons", error="; ".join(refusals), **labels)
        return
    call = Call(case, DTYPES[dtype], device, loaded)
    for direction in ("forward", "backward"):
        for family, names in families_of(problem, engine, direction).items():
            run_family(context, family, call, names, **labels)


class Call:
    """A case on a device: its inputs, what is right, and what an engine makes of it."""

    def __init__(self, case, dtype, device: str, engine) -> None:
        from fastattn import testing

        self.device, self.engine = device, engine
        self.problem = case.make(device, dtype)
        self.grad_out = case.make_grad_out(device, dtype)
        self.grad_lse = case.make_grad_lse(device, self.problem.lse_dtype)
        # The truth starts from the same rounded inputs. It is computed once and serves both directions.
        self.exact = testing.run_reference(case.make("cpu", dtype), self.grad_out.cpu(), self.grad_lse.cpu())
        self.naive = testing.run_reference(self.problem, self.grad_out, self.grad_lse, dtype=None)
        #: out and lse that the backward starts from: the engine's own once they are right.
        self.saved = {
            "out": self.exact["out"].to(device, dtype),
            "lse": self.exact["lse"].to(device, self.problem.lse_dtype),
        }
        self.poisoned = with_nan_in_unattended_rows(case.make(device, dtype))

    def run(self, problem, names: tuple[str, ...]) -> dict:
        """The results ``names``, into buffers that were NaN."""
        import torch

        from fastattn.problem import bias_gradient_shape

        def poisoned(like):
            return torch.full(like.shape, torch.nan, dtype=like.dtype, device=like.device)

        if "out" in names:
            results = {name: poisoned(tensor) for name, tensor in self.saved.items()}
            self.engine.forward(problem, results["out"], results["lse"])
            return results
        sources = {"grad_query": problem.query, "grad_key": problem.key, "grad_value": problem.value}
        results = {name: poisoned(source) for name, source in sources.items() if name in names}
        if "grad_bias" in names:
            shape = bias_gradient_shape(problem.bias)
            results["grad_bias"] = torch.zeros(shape, dtype=problem.lse_dtype, device=self.device)
        gradients = {name: results.get(name) for name in (*sources, "grad_bias")}
        self.engine.backward(problem, self.saved["out"], self.saved["lse"], self.grad_out, self.grad_lse, **gradients)
        return results

    def judge(self, results: dict) -> dict:
        """The worst result and its share of the error budget, as in a row; raises AssertionError if over."""
        from fastattn import testing

        gradients = (None, None) if "out" in results else (self.grad_out, self.grad_lse)
        judgements = testing.assert_within_budget(results, self.problem, self.exact, self.naive, *gradients)
        worst = max(judgements, key=lambda j: j.error / j.budget if j.budget else 0.0)
        return {"worst": worst.name, "of_budget": round(worst.error / worst.budget if worst.budget else 0.0, 3)}


def run_family(context, family: str, call: Call, names: tuple[str, ...], **labels) -> None:
    """Compile and run one family, each as a stage."""
    from .worker import run_stage

    labels = labels | {"family": family}

    def launch(problem) -> dict:
        return watchdog.launch(context, call=lambda: call.run(problem, names), device=call.device, **labels)

    def run() -> None:
        results = launch(call.problem)
        row = call.judge(results)
        context.row("ok", stage=family, **row, **labels)
        assert_same(results, launch(call.problem), "a second run")
        if call.poisoned is not None:
            assert_same(results, launch(call.poisoned), "NaN in padding")
            context.row("ok", stage=family, padding=True, **labels)
        if "out" in results:
            call.saved = results

    if run_stage(context, f"compile/{family}", lambda: launch(call.problem), COMPILE_SECONDS, **labels) is not None:
        run_stage(context, family, run, LAUNCHES * watchdog.LAUNCH_SECONDS, **labels)


def assert_same(first: dict, second: dict, what: str) -> None:
    """Bitwise equality of two runs (the results are never NaN: they have been judged)."""
    import torch

    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            differing = (tensor != second[name]).sum().item()
            raise AssertionError(f"{what} changes {differing} of {tensor.numel()} elements of {name}")


def with_nan_in_unattended_rows(problem):
    """The problem with NaN in the keys and values that no query attends to; None without such rows."""
    import torch

    from fastattn import reference

    batch, kv_heads, keys, _ = problem.key.shape
    if problem.key.numel() == 0 or problem.query.numel() == 0:
        return None
    attended = reference.allowed(problem).any(dim=-2)  # [B or 1, Hq or 1, Lk]
    attended = attended.expand(batch, problem.query.shape[1], keys)
    unattended = ~attended.unflatten(1, (kv_heads, -1)).any(dim=2)  # [B, Hkv, Lk]
    shared = any(0 in (tensor.stride(0), tensor.stride(1)) for tensor in (problem.key, problem.value))
    if not unattended.any() or shared:
        return None
    for rows in (problem.key, problem.value):
        rows.masked_fill_(unattended.unsqueeze(-1), torch.nan)
    return problem
