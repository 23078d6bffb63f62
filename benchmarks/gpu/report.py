"""What a result file says, in a few lines of text."""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

from . import tune
from .predictions import prediction

WRONG = ("fail", "error", "timeout", "hang", "crash")


def machine(context, device: str) -> None:
    """The task that describes the machine, in a process that may touch the GPU."""
    from .environment import describe_machine

    context.row("ok", described=describe_machine(device))


def machine_of(rows: list[dict]) -> dict:
    return next((row["described"] for row in reversed(rows) if "described" in row), {})


def ceilings(rows: list[dict]) -> dict:
    """Medians of the matrix products and copies that were timed among the contenders."""
    result = {}
    for name, key in (("matmul", "matmul_tflops"), ("copy", "copy_gb_per_s")):
        rates = [row["rate"] for row in rows if row.get("contender") == name]
        if rates:
            result[key] = round(statistics.median(rates), 1)
            result[key + "_range"] = [min(rates), max(rates)]
    return result


def wrong_rows(rows: list[dict]) -> list[dict]:
    """Rows that tell of a fault of ours: a peer's fault is its own."""
    from .contenders import CONTENDERS, OURS

    peers = set(CONTENDERS) - set(OURS)
    return [row for row in rows if row["status"] in WRONG and (row.get("stage") or "").split("/")[-1] not in peers]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu report", description="All tables of a result.")
    parser.add_argument("result", type=Path, help="a result file of this program")
    options = parser.parse_args(argv)
    print(summary(json.loads(options.result.read_text()), characters=10**6))
    return 0


#: (what, contender or contenders' ratio, shape, direction, goal): the targets that the project set itself.
TARGETS = (
    ("bench/d128_l8192_b2h16_bf16", "forward", "cudnn", 1.05),
    ("bench/d128_l8192_b2h16_bf16_upper_left", "forward", "cudnn", 1.03),
    ("bench/d64_l8192_b2h32_bf16", "forward", "cudnn", 1.10),
    ("bench/d128_l8192_b2h16_bf16", "backward", "cudnn", 1.00),
    ("bench/d128_l8192_b2h16_bf16_upper_left", "backward", "cudnn", 1.00),
    ("bench/d128_l1x8192_b16h32kv8_bf16", "forward", None, 0.80),
)


def summary(content: dict, characters: int = 9000) -> str:
    """Failures, tables of the steps, and the targets last; within what a short log can hold."""
    rows = content["rows"]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    sections = [_status_lines(rows, parts)]
    sections += _bench_tables([row for row in rows if row["part"] == "bench"])
    for part in ("profile", "tune", "best"):
        sections.append(_ranked([row for row in rows if row["part"] == part], part))
    text = "\n\n".join(section for section in sections if section)
    last = [f"ceilings: {content['ceilings']}"] if content["ceilings"] else []
    last += [*tune.config_lines(rows), *target_lines(rows)]
    end = "\n".join(last)
    room = characters - len(end) - 20
    return (text if len(text) <= room else text[:room] + "\n... (cut)") + "\n\n" + end


def target_lines(rows: list[dict]) -> list[str]:
    """Each target that was measured: what was reached, and the goal."""
    timed = {(row["task"], row["direction"], row["contender"]): row for row in rows if _is_timed(row)}
    lines = []
    for task, direction, peer, goal in TARGETS:
        ours, other = timed.get((task, direction, "fastattn")), timed.get((task, direction, peer))
        if ours is None or (peer is not None and other is None):
            continue
        share = ours["of_ceiling"] or 0.0  # none where the ceiling was not timed
        reached = share if peer is None else ours["rate"] / other["rate"]
        beside = "of the copy" if peer is None else f"of {peer}'s rate, {share:.3f} of matmul"
        lines.append(f"{task.removeprefix('bench/')} {direction}: {reached:.3f} {beside} (target {goal:.2f})")
    slower = []
    for (task, direction, contender), row in timed.items():
        ours = timed.get((task, direction, "fastattn"))
        if contender in TORCH and ours is not None and row["rate"] > ours["rate"]:
            slower.append(
                f"{task.removeprefix('bench/')} {direction[:3]} {contender} {row['rate'] / ours['rate']:.2f}x"
            )
    if slower:
        lines.append("torch is faster in: " + "; ".join(slower))
    return lines


#: The backends that torch chooses among.
TORCH = ("cudnn", "flash", "efficient")


def _is_timed(row: dict) -> bool:
    return row["part"] == "bench" and row["status"] == "ok" and row.get("direction") not in (None, "host")


def _status_lines(rows: list[dict], parts: list[str], most: int = 14) -> str:
    lines = []
    for part in parts:
        counts = Counter(row["status"] for row in rows if row["part"] == part)
        lines.append(f"{part}: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    wrong = wrong_rows(rows)
    for row in wrong[:most]:
        text = " ".join(str(row.get("error", "")).split())
        lines.append(f"  {row['status']} {row['task']} [{row.get('stage')}]: {text[:170]}")
    if len(wrong) > most:
        lines.append(f"  ... and {len(wrong) - most} more")
        common = Counter((row["status"], row.get("stage"), str(row.get("error", ""))[:70]) for row in wrong)
        lines += [f"  {count} x {' '.join(map(str, key))}" for key, count in common.most_common(6)]
    return "\n".join(lines)


def _bench_tables(rows: list[dict]) -> list[str]:
    """One line per shape and direction: the contenders' rates, ours as a fraction of the ceiling."""
    names = {
        "fastattn": "ours",
        "fastattn_unordered": "unord",
        "fastattn_plain": "plain",
        "cudnn": "cudnn",
        "flash": "flash",
        "efficient": "effic",
        "flex": "flex",
        "naive": "naive",
    }
    lines = [f"{'':42}" + "".join(f"{short:>6}" for short in names.values()) + f"{'of c.':>7}{'us host':>9}"]
    groups: dict[tuple, dict] = {}
    for row in filter(_is_timed, rows):
        groups.setdefault((row["task"].removeprefix("bench/"), row["direction"]), {})[row["contender"]] = row
    for (task, direction), group in groups.items():
        cells = "".join(f"{group[name]['rate']:6.0f}" if name in group else f"{'-':>6}" for name in names)
        ours = f"{'-':>7}"
        if "fastattn" in group:
            ours = f"{group['fastattn']['of_ceiling'] or 0:7.3f}{group['fastattn']['host_ms'] * 1e3:9.0f}"
        lines.append(f"{task[:37]:37} {direction[:3]:4}{cells}{ours}")
    host = [row for row in rows if row["status"] == "ok" and row.get("direction") == "host"]
    hosts = ", ".join(f"{row['contender']} {row['us']:.0f}" for row in host)
    return ["\n".join(lines) if groups else "", f"microseconds per call: {hosts}" if hosts else ""]


def _ranked(rows: list[dict], part: str) -> str:
    """The variants of each task of a part, fastest first."""
    tasks: dict[str, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok" and ("ms" in row or "metrics" in row):
            tasks.setdefault(row["task"], []).append(row)
    lines = []
    for task, found in tasks.items():
        found.sort(key=lambda row: row.get("ms", 0.0))
        lines.append(task)
        for row in found:
            rate = f"{row['rate']:8.0f}" if "rate" in row else f"{row.get('ms', 0.0) * 1e3:8.1f} us"
            mark = " (default)" if row.get("default") else ""
            relative = f"{row['relative']:7.3f}" if row.get("relative") else ""
            predicted = prediction(row) if part == "tune" else None
            expected = "" if predicted is None else f"  (predicted {predicted:.2f})"
            metrics = f"  {row['metrics']}" if "metrics" in row else ""
            lines.append(f"  {rate}{relative}  {row['variant'][:60]}{mark}{expected}{metrics}")
    return "\n".join(lines)
