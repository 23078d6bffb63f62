"""Runs the parts of the suite, each in a pytest process of its own, and condenses them into one result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.progress import Progress

ROOT = Path(__file__).parents[1]
SCHEMA = 1
#: What pytest prints for each finished test with -v.
OUTCOME = re.compile(r"(\S.*) (PASSED|FAILED|ERROR|SKIPPED)(?: \(.*\))?\s+\[ *\d+%\]")
COLLECTED = re.compile(r"collected (\d+) items?(?: / (\d+) deselected)?")
#: What an entry of the result keeps of a benchmark's record.
KEPT = (
    *("workload", "fields", "flops", "seconds", "ratio", "rounds", "repeats", "ceiling", "share", "targets"),
    "left_out",
)


@dataclass
class Outcome:
    """The condensed result of the parts that ran, and the tests that failed in them."""

    result: dict
    failed: list[str] = field(default_factory=list)
    output: str = ""


def run_parts(parts: tuple[str, ...], seconds_scale: float, select: str, progress: Progress) -> Outcome:
    """Run the parts one after the other.

    Args:
        seconds_scale: factor on the time spent on each measurement.
        select: a pytest -k expression; "" runs everything.
    """
    outcome = Outcome({"schema": SCHEMA, "parts": {}, "lines": [], "memory": []})
    for part in parts:
        task = progress.add_task(part, total=None)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "benchmark.json"
            command = [sys.executable, "-m", "pytest", "benchmarks", "-v", "--color=no", "-p", "no:cacheprovider"]
            command += [f"--part={part}", f"--seconds-scale={seconds_scale}", f"--benchmark-json={record}"]
            command += ["-k", select] if select else []
            for line in _lines_of(command):
                outcome.output += line
                if counted := COLLECTED.search(line):
                    progress.update(task, total=int(counted[1]) - int(counted[2] or 0))
                if finished := OUTCOME.search(line):
                    progress.advance(task)
                    if finished[2] in ("FAILED", "ERROR"):
                        outcome.failed.append(finished[1])
            progress.update(task, total=progress.tasks[task].completed)
            if not record.exists() or not record.stat().st_size:
                outcome.failed.append(f"{part}: no benchmark finished")
                continue
            _condense(json.loads(record.read_text()), part, outcome.result)
            outcome.result["parts"][part]["minutes"] = round((time.monotonic() - start) / 60, 1)
    return outcome


def _lines_of(command: list[str]) -> Iterator[str]:
    """The process's output as it comes. The process does not outlive this generator."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    environment.pop("PYTEST_XDIST_WORKER", None)  # it is alone, also where one of many test processes starts it
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield from process.stdout
    finally:
        process.kill()
        process.wait()


def _condense(record: dict, part: str, result: dict) -> None:
    """Add a part's benchmark record to the result."""
    about = record["fastattn"]
    result |= {key: about[key] for key in ("machine", "date", "versions")}
    result["parts"][part] = {"isa": about["isa"], "ceilings": about["ceilings"]}
    for benchmark in record["benchmarks"]:
        info = benchmark["extra_info"]
        if "peaks" in info:
            kept = ("model", "implementation", "peaks", "seconds", "longest")
            result.setdefault("model_memory", []).append({key: info[key] for key in kept})
        elif "bytes" in info:
            result["memory"].append({key: info[key] for key in ("implementation", "length", "bytes")})
        else:
            kept = {key: info[key] for key in KEPT if key in info}
            result["lines"].append({"part": part, "group": benchmark["group"]} | kept)


def merged(before: dict, result: dict) -> dict:
    """A result of some parts or lines, completed by an earlier result's others.

    Only where both are of one machine, with the same versions, on the same day: else the new one alone.
    """
    if any(before.get(key) != result[key] for key in ("schema", "machine", "versions", "date")):
        return result

    def key(line: dict) -> tuple[str, str, str]:
        return line["part"], line["group"], line["workload"]

    new = {key(line): line for line in result["lines"]}
    lines = [new.pop(key(line), line) for line in before["lines"]] + list(new.values())
    joined = before | result | {"parts": before["parts"] | result["parts"], "lines": lines}
    return joined | {"memory": result["memory"] or before["memory"]}
