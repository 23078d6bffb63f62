"""The tables of a result: for the terminal, and in Markdown for the README."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.table import Table

from benchmarks.model_memory import COMPARED
from benchmarks.peers import TITLES
from benchmarks.suite import MEMORY_TARGET


def table(title: str, left: Iterable[str], right: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table with columns of words, aligned left, and of figures, aligned right."""
    result = Table(title=title, title_justify="left")
    for heading in left:
        result.add_column(heading)
    for heading in right:
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(*row)
    return result


def markdown(left: Iterable[str], right: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    left, right = list(left), list(right)
    lines = [f"| {' | '.join(left + right)} |", f"|{'---|' * len(left)}{'---:|' * len(right)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def peer_columns(lines: Iterable[dict]) -> dict[str, str]:
    """The peers that were measured in any of the lines, in order, and the headings of their columns."""
    measured = {peer for line in lines for peer in line["ratio"]}
    return {peer: f"x {title}" for peer, title in TITLES.items() if peer in measured}


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def ceiling_rows(result: dict) -> list[list[str]]:
    """part, instruction set, fp32 and bf16 GFLOP/s, read and copy GB/s."""
    rows = []
    for part, about in result["parts"].items():
        if not about["ceilings"]:
            continue
        figures = [about["ceilings"][name] / 1e9 for name in ("fma float32", "fma bfloat16", "read", "copy")]
        rows.append([part, about["isa"], *(f"{figure:.0f}" for figure in figures)])
    return rows


def target_rows(result: dict) -> list[list[str]]:
    """part, workload, what, target, reached, verdict: every target of the suite, then of memory."""
    rows = []
    for line in result["lines"]:
        for target in line["targets"]:
            if target["met"] is None:
                reached, verdict = "", f"needs {target['needs']}" if target["needs"] else "not measured"
            else:
                reached, verdict = f"{target['reached']:.2f}", "met" if target["met"] else "missed"
            wanted = f"{target['comparison']} {target['value']:.2f}"
            rows.append([line["part"], line["workload"], target["what"], wanted, reached, verdict])
    share = memory_share(result)
    if share is not None:
        length, value = share
        verdict = "met" if value < MEMORY_TARGET else "missed"
        wanted = f"< {MEMORY_TARGET:.2f}"
        rows.append(["memory", f"length {length}", "memory of naive", wanted, f"{value:.3f}", verdict])
    return rows


def line_rows(lines: Iterable[dict], peers: Iterable[str]) -> list[list[str]]:
    """group, workload, milliseconds of fastattn, ratios of peers, GFLOP/s, share of the ceiling."""
    rows = []
    for line in lines:
        seconds, ratio = line["seconds"], line["ratio"]
        rows.append(
            [
                line["group"],
                line["workload"],
                f"{1e3 * seconds['fastattn']:.3g}",
                *(times(ratio.get(peer)) for peer in peers),
                f"{line['flops'] / seconds['fastattn'] / 1e9:.0f}",
                f"{line['share']:.2f}",
            ]
        )
    return rows


def slower_rows(result: dict) -> list[list[str]]:
    """part, workload, peer, ratio: wherever a peer was faster."""
    return [
        [line["part"], line["workload"], TITLES[peer], times(line["ratio"][peer])]
        for line in result["lines"]
        for peer in TITLES
        if line["ratio"].get(peer, 1.0) < 1.0
    ]


def left_out_rows(result: dict) -> list[list[str]]:
    """peer, why it was not timed, in how many lines."""
    reasons = Counter(item for line in result["lines"] for item in line.get("left_out", {}).items())
    return [[TITLES[peer], reason, str(count)] for (peer, reason), count in reasons.items()]


def memory_rows(result: dict) -> list[list[str]]:
    """length, then MiB of naive, torch and fastattn."""
    table: dict[int, dict[str, int]] = {}
    for entry in result["memory"]:
        table.setdefault(entry["length"], {})[entry["implementation"]] = entry["bytes"]
    return [
        [str(length), *(f"{row[name] / 2**20:.0f}" if name in row else "" for name in ("naive", "torch", "fastattn"))]
        for length, row in sorted(table.items())
    ]


def model_memory_rows(result: dict) -> list[list[str]]:
    """model, implementation, the longest sequence whose training step fits, its seconds, MiB at COMPARED."""
    return [
        [
            entry["model"],
            entry["implementation"],
            str(entry["longest"]),
            f"{entry['seconds'].get(str(entry['longest']), 0):.2f}",
            _mebibytes(entry["peaks"].get(str(COMPARED))),
        ]
        for entry in result.get("model_memory", [])
    ]


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def memory_share(result: dict) -> tuple[int, float] | None:
    """The longest length at which both were measured, and fastattn's memory there as a share of naive's."""
    sizes = {(entry["implementation"], entry["length"]): entry["bytes"] for entry in result["memory"]}
    both = [length for name, length in sizes if name == "naive" and ("fastattn", length) in sizes]
    if not both:
        return None
    length = max(both)
    return length, sizes["fastattn", length] / sizes["naive", length]
