"""Everything that needs a GPU, in one script: correctness, speed beside the peers, tuning.

    python -m benchmarks.gpu                   all parts, under nine minutes
    python -m benchmarks.gpu check bench       some parts
    python -m benchmarks.gpu --dry-run         the parts and their estimated times, without a GPU
    python -m benchmarks.gpu --resume          go on where an interrupted run stopped
    python -m benchmarks.gpu plot RESULT.json  plots of a result, without a GPU

It needs PyTorch, Triton and this checkout: nothing is installed or compiled beforehand. Work runs in
processes of its own with time limits, so that a kernel that hangs or crashes costs seconds and is
recorded; the result file is whole after every row. Correctness checks and compilation run in parallel
first; then everything that is timed runs alone, one thing at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .environment import commit, source_digest
from .pool import Pool, Task
from .result import ResultFile

#: Seconds that each part may take: in the parallel phase, and timed alone.
BUDGETS = {"check": (130, 0), "bench": (32, 198), "tune": (30, 60), "ablate": (10, 30), "profile": (0, 25)}
PARTS = tuple(BUDGETS)
SLOW_SECONDS = 8.0
DEFAULT_OUT = Path("gpu-result.json")


@dataclass
class Plan:
    """The tasks of one part: those that may run side by side, then those that are timed alone."""

    part: str
    parallel: list[Task] = field(default_factory=list)
    alone: list[Task] = field(default_factory=list)


def plan(part: str, device: str, backend: str, quick: bool) -> Plan:
    """What a part will do. Needs no GPU."""
    from . import ablate, bench, check, devices, profile, tune

    arguments = (device, backend, quick)
    if part == "check":
        return Plan(part, parallel=[*devices.tasks(*arguments), *check.tasks(*arguments)])
    if part == "bench":
        groups = bench.tasks(*arguments)
        return Plan(part, parallel=bench.compile_tasks(groups), alone=groups)
    module = {"tune": tune, "ablate": ablate, "profile": profile}[part]
    alone = module.tasks(*arguments)
    return Plan(part, parallel=module.compile_tasks(alone), alone=alone)


def main(argv: list[str]) -> int:
    if argv[:1] == ["plot"]:
        from . import plot

        return plot.main(argv[1:])
    options = parse(argv)
    plans = [_filtered(plan(part, options.device, options.backend, options.quick), options) for part in options.parts]
    workers = options.workers or max(1, min(14, len(os.sched_getaffinity(0)) - 1))
    if options.dry_run:
        print(estimates(plans, workers, options.device))
        return 0
    missing = _missing_device(options.device)
    if missing:
        print(missing, file=sys.stderr)
        return 2
    return run(plans, options, workers)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or all (default)")
    parser.add_argument("--parts", dest="listed", default="", help="the same, separated by commas")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"result file (default {DEFAULT_OUT})")
    parser.add_argument("--resume", action="store_true", help="keep the tasks that --out has from these sources")
    parser.add_argument("--quick", action="store_true", help="a few tasks of each part")
    parser.add_argument("--only", default="", help="only tasks whose key matches this regular expression")
    parser.add_argument("--time-limit", type=float, default=530.0, help="seconds for the whole run (default 530)")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and their estimated times")
    parser.add_argument("--workers", type=int, default=0, help="processes of the parallel phase (default: by cores)")
    parser.add_argument("--commit", default=None, help="the commit to record, where the checkout has no history")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, to try the script")
    options = parser.parse_args(argv)
    chosen = options.parts + [name for name in options.listed.split(",") if name]
    unknown = [name for name in chosen if name not in (*PARTS, "all")]
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}: the parts are {', '.join(PARTS)} and all")
    options.parts = list(PARTS) if not chosen or "all" in chosen else [name for name in PARTS if name in chosen]
    options.backend = "triton" if options.device == "cuda" else "reference"
    return options


def run(plans: list[Plan], options: argparse.Namespace, workers: int) -> int:
    """Run the plans; 0 if every result is right, 1 if any is not."""
    from . import report

    start = time.monotonic()
    end = start + options.time_limit
    result = ResultFile(options.out, options.resume)
    source = source_digest()
    result.set("head", {"commit": options.commit or commit(), "source": source, "command": sys.argv[1:]})
    with tempfile.TemporaryDirectory(prefix="fastattn-gpu-") as logs:

        def pool(deadline: float, count: int, environment: dict[str, str] | None = None) -> Pool:
            deadline = min(deadline, end)
            return Pool(result, source, deadline, Path(logs), count, environment=environment, progress=_progress())

        alone_budget = sum(BUDGETS[p.part][1] for p in plans)
        parallel_budget = sum(BUDGETS[p.part][0] for p in plans)
        parallel_end = start + max(parallel_budget, options.time_limit - alone_budget)
        machine = Task("machine", "machine", ".report:machine", {"device": options.device}, timeout=60.0)
        side_by_side = [task for p in plans for task in p.parallel]
        # The slowest first, so that no process is left alone with one at the end.
        side_by_side.sort(key=lambda task: task.estimate < SLOW_SECONDS)
        one_compiler = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        pool(parallel_end, workers, one_compiler).run([machine, *side_by_side], options.resume)
        for index, p in enumerate(plans):
            if not p.alone:
                continue
            later = sum(BUDGETS[q.part][1] for q in plans[index + 1 :])
            began = time.monotonic()
            _leave_out_dead_stages(p.alone, result.rows)
            pool(max(end - later, began + BUDGETS[p.part][1]), 1).run(p.alone, options.resume)
            result.set("parts", {p.part: {"seconds": round(time.monotonic() - began, 1), "source": source}})
    result.set("head", report.machine_of(result.rows) | {"seconds": round(time.monotonic() - start, 1)})
    result.set("ceilings", report.ceilings(result.rows))
    print(report.summary(result.content, [p.part for p in plans]))
    print(f"{options.out}: {len(result.rows)} rows in {time.monotonic() - start:.0f} s")
    return 1 if report.wrong_rows(result.rows) else 0


def estimates(plans: list[Plan], workers: int, device: str) -> str:
    """The table of --dry-run."""
    start_seconds = 12.0 if device == "cuda" else 3.0
    lines = [f"{'part':10}{'parallel tasks':>16}{'timed tasks':>14}{'estimate s':>12}{'at most s':>12}"]
    total = 0.0
    for p in plans:
        seconds = sum(task.estimate for task in p.parallel) / workers + sum(task.estimate for task in p.alone)
        seconds += start_seconds * (bool(p.parallel) + bool(p.alone))
        limit = sum(BUDGETS[p.part])
        total += min(seconds, limit)
        lines.append(f"{p.part:10}{len(p.parallel):16}{len(p.alone):14}{seconds:12.0f}{limit:12}")
    lines.append(f"{'in all':10}{'':30}{total:12.0f}{sum(sum(BUDGETS[p.part]) for p in plans):12}")
    lines.append(f"({workers} processes in the parallel phase)")
    return "\n".join(lines)


def _filtered(p: Plan, options: argparse.Namespace) -> Plan:
    chosen = re.compile(options.only)
    p.parallel = [task for task in p.parallel if chosen.search(task.key)]
    p.alone = [task for task in p.alone if chosen.search(task.key)]
    return p


def _leave_out_dead_stages(tasks: list[Task], rows: list[dict]) -> None:
    """What hung or crashed when it was compiled would do so again when it is timed."""
    for task in tasks:
        dead = {
            row["stage"]
            for row in rows
            if row["task"] == f"compile/{task.key}" and row["status"] in ("timeout", "crash") and row["stage"]
        }
        task.skip = tuple(sorted(dead))


def _missing_device(device: str) -> str | None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device: --dry-run lists what would run, --device cpu tries the script on tiny shapes"
    return None


def _progress():
    """Prints a line now and then, failures at once."""
    last = [0.0]

    def show(text: str) -> None:
        if time.monotonic() - last[0] > 15.0 or not text.endswith((": done", ": error")):
            last[0] = time.monotonic()
            print(text, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
