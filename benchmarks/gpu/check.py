"""Part ``check``: is every result right on this device?

Each case of :mod:`fastattn.testing`, and more that are shaped for a GPU's tiles and persistent grids,
runs forward and backward in each dtype. The truth is the float64 reference on the CPU; the budget is
twice naive attention's error in the same dtype, on the same device. Each case runs twice and must be
bitwise equal, and once more with NaN in every key and value that no query may attend to, which must
change nothing. Dropout is judged by the same budget: one weight dropped differently would break it.
"""

from __future__ import annotations

from dataclasses import asdict

from .pool import Task

#: By dtype the head dimensions whose tiles' edges are looked at: dtypes differ in little else.
SHAPED = {"bf16": (64, 96, 128, 192, 256), "fp32": (64, 128), "fp16": (128,)}
#: Fewer queries the backend may give to the kernels that split the keys.
FEW_QUERIES = 128


def tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """One task per case and dtype: a run that is cut short has seen every case in bf16.

    What is shaped for the Hopper kernels is also run without them, and, where the backend may choose others on
    Hopper too, by them alone.
    """
    from fastattn.testing import CASES, SMOKE_CASES

    every = device_cases(quick, tiny=device == "cpu")
    found = []
    for dtype, head_dims in SHAPED.items():
        shaped = every if device == "cpu" else [case for case in every if case.head_dim in head_dims]
        for case in (*shaped, *(SMOKE_CASES if quick else CASES)):
            found.append(_task(case, dtype, device, backend))
        if quick:
            break
        if dtype == "bf16" and device == "cuda":
            found += [_task(case, dtype, device, "plain", "/plain") for case in shaped]
            few = [case for case in shaped if case.queries < FEW_QUERIES and case.head_dim in (64, 128)]
            found += [_task(case, dtype, device, "hopper", "/hopper") for case in few]
    return found


def _task(case, dtype: str, device: str, engine: str, suffix: str = "") -> Task:
    return Task(
        part="check",
        key=f"check/{dtype}/{case.name}{suffix}",
        handler=".check:run_case",
        arguments={"case": asdict(case), "dtype": dtype, "device": device, "engine": engine},
        timeout=60.0,
        estimate=5.0 if max(case.head_dim, case.value_dim or 0) > 128 else 2.5,
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
    """Forward and backward of one case, judged; one row per direction.

    ``engine``: a backend, or "plain" or "hopper" for the one or the other half of the GPU's.
    """
    import torch

    from fastattn import testing

    from .problems import DTYPES as torch_dtypes
    from .problems import fresh_results, load_engine
    from .worker import run_stage

    case = testing.Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in case.items()})
    engine = load_engine(engine)
    torch_dtype = torch_dtypes[dtype]
    problem = case.make(device, torch_dtype)
    labels = {"case": case.name, "dtype": dtype}
    refusals = engine.reasons(problem)
    if refusals:
        context.row("unsupported", stage="reasons", error="; ".join(refusals), **labels)
        return
    on_cpu = case.make("cpu", torch_dtype)
    grad_out = case.make_grad_out(device, torch_dtype)
    grad_lse = case.make_grad_lse(device, problem.lse_dtype)
    # The truth starts from the same rounded inputs. It is computed once and serves both directions.
    exact = testing.run_reference(on_cpu, grad_out.cpu(), grad_lse.cpu())
    naive = testing.run_reference(problem, grad_out, grad_lse, dtype=None)

    def check(results, judged_problem, gradient) -> None:
        judgements = testing.judge(results, judged_problem, exact, naive, gradient)
        worst = max(judgements, key=lambda j: j.error / j.budget if j.budget else float(j.error > 0))
        testing.assert_within_budget(results, judged_problem, exact, naive, gradient)
        ratio = worst.error / worst.budget if worst.budget else 0.0
        context.row("ok", stage=context.current, worst=worst.name, of_budget=round(ratio, 3), **labels)

    def forward() -> None:
        results = fresh_results(engine, problem)
        check(results, problem, None)
        _assert_same(results, fresh_results(engine, problem), "a second forward")

    def backward() -> None:
        results = fresh_results(engine, problem, grad_out, grad_lse)
        check(results, problem, grad_out)
        _assert_same(results, fresh_results(engine, problem, grad_out, grad_lse), "a second run")
        poisoned = _with_nan_in_unattended_rows(case.make(device, torch_dtype))
        if poisoned is not None:
            _assert_same(results, fresh_results(engine, poisoned, grad_out, grad_lse), "NaN in padding")
            context.row("ok", stage="padding", **labels)

    run_stage(context, "forward", forward, **labels)
    run_stage(context, "backward", backward, **labels)
    if device == "cuda":
        torch.cuda.synchronize()


def _assert_same(first: dict, second: dict, what: str) -> None:
    """Bitwise equality of two runs (the results are never NaN: they have been judged)."""
    import torch

    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            differing = (tensor != second[name]).sum().item()
            raise AssertionError(f"{what} changes {differing} of {tensor.numel()} elements of {name}")


def _with_nan_in_unattended_rows(problem):
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
