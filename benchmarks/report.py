"""The benchmark report.

``python -m benchmarks.report run`` measures everything (``make bench``), ``show`` prints a result
again, and ``readme`` writes the tables of README.md and docs/performance.md from the committed results.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import tables
from benchmarks.model_memory import COMPARED, LIMIT
from benchmarks.runner import ROOT, merged, run_parts
from benchmarks.suite import PARTS, PARTS_OF_THE_REPORT
from fastattn.backends import cpu
from fastattn.needs import require_or_exit

RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console(width=None if Console().is_terminal else 160)


@app.command()
def run(
    name: Annotated[str, typer.Option(help="The result's name; default: from the processor's.")] = "",
    part: Annotated[
        list[str] | None, typer.Option(help="Only this part; repeatable. The result keeps its other lines.")
    ] = None,
    select: Annotated[str, typer.Option("-k", help="Only what matches this pytest expression.")] = "",
    seconds_scale: Annotated[float, typer.Option(min=0.01, help="Factor on the time of each measurement.")] = 1.0,
    results: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS,
    plots: Annotated[Path, typer.Option(help="Where the pictures go.")] = DOCS,
) -> None:
    """Measure, print, and write the result and its plots. Exit status 1 when a check failed."""
    require_or_exit("python -m benchmarks.report run")
    if (missing := cpu.unavailable()) is not None:
        reason = " ".join(missing.split())
        sys.exit(f"error: python -m benchmarks.report run needs the C++ engine: {reason}")
    from benchmarks import machine
    from benchmarks.plots import plot_memory, plot_throughput

    chosen = tuple(part or PARTS_OF_THE_REPORT)
    unknown = [given for given in chosen if given not in PARTS]
    if unknown:
        raise typer.BadParameter(f"must be one of {', '.join(PARTS)}, got {unknown[0]!r}", param_hint="--part")
    if not machine.has_cores(2) and "two threads" in chosen:
        console.print("One core only: the part with two threads is left out.")
        chosen = tuple(given for given in chosen if given != "two threads")
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        outcome = run_parts(chosen, seconds_scale, select, progress)
    result = outcome.result
    if "machine" not in result:
        console.print(outcome.output, markup=False)
        raise typer.Exit(1)
    print_result(result)

    result["name"] = slug = name or "cpu-" + re.sub(r"[^a-z0-9.]+", "-", result["machine"]["cpu"].lower()).strip("-")
    results.mkdir(parents=True, exist_ok=True)
    plots.mkdir(parents=True, exist_ok=True)
    path = results / f"{slug}.json"
    if (part or select) and path.exists():
        result = merged(json.loads(path.read_text()), result)
    path.write_text(json.dumps(result, indent=1) + "\n")
    written = [path]
    if any(line["group"] == "length" for line in result["lines"]):
        written.append(plots / f"{slug}-throughput.png")
        plot_throughput(result, written[-1])
    if result["memory"]:
        written.append(plots / f"{slug}-memory.png")
        plot_memory(result, written[-1])
    minutes = sum(about["minutes"] for about in result["parts"].values())
    console.print(f"{minutes:.1f} minutes; wrote", ", ".join(str(p) for p in written))
    if outcome.failed:
        console.print(outcome.output, markup=False)
        console.print("[red]failed:[/] " + ", ".join(outcome.failed))
        raise typer.Exit(1)


@app.command()
def show(path: Annotated[Path, typer.Argument(help="A result's JSON.")]) -> None:
    """Print a result's tables again."""
    print_result(json.loads(path.read_text()))


@app.command()
def readme() -> None:
    """Write the generated blocks of README.md and docs/performance.md from the committed results."""
    from benchmarks.readme import FILES, update

    changed = update(ROOT, RESULTS)
    for name in FILES:
        console.print(name, "is", "rewritten" if name in changed else "up to date")


def print_result(result: dict) -> None:
    machine, versions = result["machine"], result["versions"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {result['date']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
    figures = ("fp32 GFLOP/s", "bf16 GFLOP/s", "read GB/s", "copy GB/s")
    console.print(tables.table("Ceilings", ("part", "instruction set"), figures, tables.ceiling_rows(result)))
    for part in result["parts"]:
        lines = [line for line in result["lines"] if line["part"] == part]
        peers = tables.peer_columns(lines)
        right = ("fastattn ms", *peers.values(), "GFLOP/s", "of ceiling")
        if lines:
            console.print(tables.table(part, ("group", "workload"), right, tables.line_rows(lines, peers)))
    if result["memory"]:
        rows = tables.memory_rows(result)
        console.print(
            tables.table("Peak memory, forward+backward, MiB", ("length",), ("naive", "torch", "fastattn"), rows)
        )
    rows = tables.model_memory_rows(result)
    if rows:
        right = (f"longest in {LIMIT >> 20} MiB", "seconds", f"MiB at {COMPARED}")
        console.print(tables.table("Memory of a training step", ("model", "implementation"), right, rows))
    rows = tables.target_rows(result)
    styles = {"met": "[green]met[/]", "missed": "[red]missed[/]"}
    rows = [[*row[:-1], styles.get(row[-1], row[-1])] for row in rows]
    console.print(tables.table("Targets", ("part", "workload", "quantity"), ("target", "reached", ""), rows))
    slower = tables.slower_rows(result)
    if slower:
        console.print(tables.table("Slower than a peer", ("part", "workload", "peer"), ("ratio",), slower))
    else:
        console.print("Never slower than a peer.")
    left_out = tables.left_out_rows(result)
    if left_out:
        console.print(tables.table("Left out", ("peer", "because"), ("lines",), left_out))


if __name__ == "__main__":
    app()
