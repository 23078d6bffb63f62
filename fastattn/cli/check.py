"""``fastattn check``: every case of the table against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import typer
from rich.table import Table

from fastattn import dispatch
from fastattn.cli.console import DTYPES, console, parse_backend, parse_device, parse_dtype, progress_bar
from fastattn.testing import CASES, SMOKE_CASES, Case, judge, run_backend, run_reference


@dataclass
class Summary:
    """The worst of one result tensor over all cases of one dtype."""

    count: int = 0
    missed: int = 0
    worst_share: float = -1.0  # error / budget
    error: float = 0.0
    budget: float = 0.0
    case: str = ""

    def add(self, case: str, error: float, budget: float, passed: bool) -> None:
        self.count += 1
        self.missed += not passed
        share = error / budget if budget > 0.0 else float(not passed)
        if share > self.worst_share:
            self.worst_share, self.error, self.budget, self.case = share, error, budget, case


def check_case(case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> list | str:
    """The judgements of out, lse and gradients, or why the backend cannot take the case."""
    problem = case.make(device, dtype)
    reasons = dispatch.backend_reasons(backend, problem)
    if reasons:
        return "; ".join(reasons)
    grad_out = case.make_grad_out(device, dtype)
    grad_lse = case.make_grad_lse(device, problem.lse_dtype)
    actual = run_backend(dispatch.load(backend), problem, grad_out, grad_lse)
    exact = run_reference(problem, grad_out, grad_lse)
    naive = run_reference(problem, grad_out, grad_lse, dtype=None)
    return judge(actual, problem, exact, naive, grad_out, grad_lse)


def is_interpreted(backend: str, device: torch.device) -> bool:
    """Whether the backend interprets its kernels instead of compiling them, thousands of times slower."""
    module = dispatch.load(backend)
    may_be = device.type == "cpu" and hasattr(module, "interpreted") and module.unavailable() is None
    return may_be and module.interpreted()


def cases_for(backend: str, device: torch.device, match: str) -> list[Case]:
    """The cases whose name contains ``match``; where the kernels are interpreted and none is named, a few of all."""
    few = not match and is_interpreted(backend, device)
    return [case for case in (SMOKE_CASES if few else CASES) if match in case.name]


def run_check(backend: str, device_name: str, dtype_names: list[str] | None, match: str) -> bool:
    """Print the table of errors; True when every one is within its budget."""
    device = parse_device(device_name)
    dtypes = {name: parse_dtype(name) for name in dtype_names or DTYPES}
    if parse_backend(backend) == "auto":
        backend = dispatch.explain_problem(CASES[0].make(device, next(iter(dtypes.values())))).backend
    cases = cases_for(backend, device, match)
    if not cases:
        raise typer.BadParameter(f"no case's name contains {match!r}", param_hint="--match")
    if is_interpreted(backend, device):
        console.print(f"Triton's interpreter is slow: {len(cases)} of {len(CASES)} cases; --match NAME runs others")

    summaries: dict[tuple[str, str], Summary] = {}
    misses: list[str] = []
    refused: dict[str, list[str]] = {}
    with progress_bar() as progress:
        task = progress.add_task("checking", total=len(dtypes) * len(cases))
        for dtype_name, dtype in dtypes.items():
            for case in cases:
                result = check_case(case, backend, device, dtype)
                progress.advance(task)
                if isinstance(result, str):
                    refused.setdefault(result, []).append(f"{case.name} {dtype_name}")
                    continue
                for judgement in result:
                    summary = summaries.setdefault((dtype_name, judgement.name), Summary())
                    summary.add(case.name, judgement.error, judgement.budget, judgement.passed)
                    if not judgement.passed:
                        misses.append(
                            f"{case.name} {dtype_name} {judgement.name}: error {judgement.error:.2e}, "
                            f"budget {judgement.budget:.2e}"
                        )

    table = Table(title=f"backend {backend} on {device}: largest error against its budget")
    for heading in ("dtype", "result"):
        table.add_column(heading)
    for heading in ("cases", "missed", "error", "budget", "error / budget"):
        table.add_column(heading, justify="right")
    table.add_column("worst case")
    for (dtype_name, result_name), row in summaries.items():
        table.add_row(
            dtype_name,
            result_name,
            str(row.count),
            f"[bold red]{row.missed}[/]" if row.missed else "0",
            f"{row.error:.1e}",
            f"{row.budget:.1e}",
            f"{row.worst_share:.2f}",
            row.case,
        )
    console.print(table)
    for reason, names in refused.items():
        console.print(f"not taken by {backend}: {len(names)} cases ({names[0]}, ...): {reason}")
    for miss in misses:
        console.print(f"[red]missed[/] {miss}")
    if not summaries:
        console.print(f"[red]backend {backend} took none of the cases[/]")
    return bool(summaries) and not misses
