"""What a result file says, in a few lines of text."""

from __future__ import annotations

import statistics
from collections import Counter

from . import ablate

WRONG = ("fail", "error", "timeout", "crash")


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
    return [row for row in rows if row["status"] in WRONG and row.get("stage") not in peers]


def summary(content: dict, parts: list[str], characters: int = 9000) -> str:
    """Tables of the parts, failures first; within what a short log can hold."""
    rows = content["rows"]
    sections = [_status_lines(rows, parts)]
    if "bench" in parts:
        sections += _bench_tables([row for row in rows if row["part"] == "bench"])
    for part in ("tune", "ablate", "profile"):
        if part in parts:
            sections.append(_ranked([row for row in rows if row["part"] == part], part))
    text = "\n\n".join(section for section in sections if section)
    if content["ceilings"]:
        text += f"\n\nceilings: {content['ceilings']}"
    return text if len(text) <= characters else text[: characters - 20] + "\n... (cut)"


def _status_lines(rows: list[dict], parts: list[str], most: int = 14) -> str:
    lines = []
    for part in (*parts, "compile"):
        counts = Counter(row["status"] for row in rows if row["part"] == part)
        if counts:
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
    timed = [row for row in rows if row["status"] == "ok" and row["direction"] != "host"]
    names = ("fastattn", "fastattn_plain", "flash", "cudnn", "efficient", "flex", "naive")
    lines = [f"{'':44}" + "".join(f"{name[:9]:>10}" for name in names) + f"{'of ceil.':>10}"]
    groups: dict[tuple, dict] = {}
    for row in timed:
        groups.setdefault((row["task"].removeprefix("bench/"), row["direction"]), {})[row["contender"]] = row
    for (task, direction), group in groups.items():
        cells = "".join(f"{group[name]['rate']:10.0f}" if name in group else f"{'-':>10}" for name in names)
        ours = f"{group['fastattn']['of_ceiling']:10.3f}" if "fastattn" in group else f"{'-':>10}"
        lines.append(f"{task[:39]:39} {direction[:3]:4}{cells}{ours}")
    host = [row for row in rows if row["status"] == "ok" and row["direction"] == "host"]
    hosts = ", ".join(f"{row['contender']} {row['us']:.0f}" for row in host)
    return ["\n".join(lines) if timed else "", f"microseconds per call: {hosts}" if hosts else ""]


def _ranked(rows: list[dict], part: str, per_task: int = 4) -> str:
    """The best variants of each task of a part, fastest first."""
    tasks: dict[str, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok" and "ms" in row:
            tasks.setdefault(row["task"], []).append(row)
    lines = []
    for task, found in tasks.items():
        found.sort(key=lambda row: row["ms"])
        shown = found if part == "ablate" else found[:per_task]
        default = next((row for row in found if row.get("default")), None)
        if default is not None and default not in shown:
            shown = [*shown, default]
        lines.append(task)
        for row in shown:
            rate = f"{row['rate']:8.0f}" if "rate" in row else f"{row['ms'] * 1e3:8.1f} us"
            mark = " (default)" if row.get("default") else ""
            relative = f"{row['relative']:7.3f}" if row.get("relative") else ""
            predicted = ablate.prediction(row) if part == "ablate" else None
            expected = "" if predicted is None else f"  (predicted {predicted:.2f})"
            lines.append(f"  {rate}{relative}  {row['variant']}{mark}{expected}")
    return "\n".join(lines)
