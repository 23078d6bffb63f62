"""Everything that needs a GPU, in one program: correctness, speed beside the peers, tuning.

    python -m benchmarks.gpu                   all steps, in under nine minutes
    python -m benchmarks.gpu smoke headline    some steps
    python -m benchmarks.gpu --dry-run         the steps and their estimated times, without a GPU
    python -m benchmarks.gpu --resume          go on where an interrupted run stopped
    python -m benchmarks.gpu report RESULT.json  all tables of a result
    python -m benchmarks.gpu plot RESULT.json    its plots

It needs PyTorch, Triton and this checkout: nothing is installed beforehand. The first step, smoke, runs each family of
kernels once; what hangs, crashes or is wrong there is left out of the others. Work runs in processes of its own with
time limits, so that a kernel that hangs costs seconds; the result file is whole at any moment. What is timed runs
alone, one thing at a time. docs/gpu-run.md says how to read what comes back.
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

from .environment import ROOT, commit, source_digest, source_of
from .gate import Gate
from .plan import TIME_LIMIT, Step, machine_task, steps, table
from .pool import Pool, Task
from .result import ResultFile

DEFAULT_OUT = Path("gpu-result.json")
#: Exit statuses: all right; something wrong; no device, or bad arguments; a dead engine, so that little was measured.
RIGHT, WRONG, UNUSABLE, DEAD = range(4)


def main(argv: list[str]) -> int:
    if argv[:1] == ["plot"]:
        from . import plot

        return plot.main(argv[1:])
    if argv[:1] == ["report"]:
        from . import report

        return report.main(argv[1:])
    options = parse(argv)
    logs = options.logs and str(options.logs)
    chosen = choose(steps(options.device, options.backend, options.quick, logs), options)
    workers = options.workers or max(1, min(14, len(os.sched_getaffinity(0)) - 1))
    if options.dry_run:
        print(table(chosen, workers, options.time_limit))
        return RIGHT
    missing = _missing_device(options.device)
    if missing:
        print(missing, file=sys.stderr)
        return UNUSABLE
    return run(chosen, options, workers)


def parse(argv: list[str]) -> argparse.Namespace:
    names = [step.name for step in steps("cpu", "reference")]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(names)}, or all (default)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"result file (default {DEFAULT_OUT})")
    parser.add_argument(
        "--logs", type=Path, help="folder that keeps what the processes print (default: a temporary one)"
    )
    parser.add_argument(
        "--cache", type=Path, help="a packed cache of compiled kernels (make gpu-cache) to unpack first"
    )
    parser.add_argument(
        "--warm",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="without a cache: compile side by side for so long first",
    )
    parser.add_argument("--resume", action="store_true", help="keep the tasks that --out has from these sources")
    parser.add_argument("--quick", action="store_true", help="a few tasks of each step")
    parser.add_argument("--only", default="", help="only tasks whose key matches this regular expression")
    parser.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT, help=f"seconds for the whole run (default {TIME_LIMIT:.0f})"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the steps and their estimated times")
    parser.add_argument("--workers", type=int, default=0, help="processes that work side by side (default: by cores)")
    parser.add_argument("--commit", default=None, help="the commit to record, where the checkout has no history")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, to try the program"
    )
    parser.add_argument("--preload", action="append", default=[], help=argparse.SUPPRESS)  # modules of every worker
    options = parser.parse_args(argv)
    unknown = [name for name in options.steps if name not in (*names, "all")]
    if unknown:
        parser.error(f"unknown step {', '.join(unknown)}: the steps are {', '.join(names)} and all")
    if not options.steps or "all" in options.steps:
        options.steps = names
    options.backend = "triton" if options.device == "cuda" else "reference"
    return options


def choose(every: list[Step], options: argparse.Namespace) -> list[Step]:
    """The steps asked for, with the tasks asked for, in the order of the plan."""
    wanted = re.compile(options.only)
    chosen = [step for step in every if step.name in options.steps]
    for step in chosen:
        step.tasks = [task for task in step.tasks if wanted.search(task.key)]
        step.meanwhile = [task for task in step.meanwhile if wanted.search(task.key)]
    return chosen


def run(chosen: list[Step], options: argparse.Namespace, workers: int) -> int:
    """Run the steps; see the exit statuses above."""
    from . import profile, report

    start = time.monotonic()
    end = start + options.time_limit
    result = ResultFile(options.out, options.resume)
    head = {"commit": options.commit or commit(), "source": source_digest(), "command": sys.argv[1:]}
    result.set("head", head | {"cache": _prepare(options, [step.name for step in chosen], workers)})
    print(f"cache: {result.content['head']['cache']}", flush=True)
    gate = Gate()
    with ExitStack() as stack:
        logs = options.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastattn-gpu-")))
        progress = _progress(start)

        def pool(name: str, count: int = 1, **environment: str) -> Pool:
            preload = ("torch", *options.preload)
            made = Pool(result, source_of, logs, count, 3, preload, environment, progress, name)
            return stack.enter_context(made)

        # The smoke step's process is ready to dump its GPU's state: what is timed runs in another.
        one_compiler = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no processes of torch's own beside what is timed
        first, timed = pool("smoke"), pool("timed", **one_compiler)
        beside = pool("beside", workers, **one_compiler)
        if any(step.side_by_side or step.meanwhile for step in chosen):
            beside.start()
        ends = start
        chosen[0].meanwhile.insert(0, machine_task(options.device))
        for step in chosen:
            began = time.monotonic()
            ends = min(ends + step.seconds, end)
            tasks = _admitted(step, gate, result)
            timed.task_environment = beside.task_environment = gate.environment
            if step.name == "smoke":
                first.start()
                timed.start()
            other = Thread(target=beside.run, args=(step.meanwhile, ends, options.resume))
            other.start()
            if not step.side_by_side:
                (first if step.name == "smoke" else timed).run(tasks, ends, options.resume)
            other.join()
            if step.side_by_side:
                beside.run(tasks, ends, options.resume)
            seconds = round(time.monotonic() - began, 1)
            kernels = first.compilations + timed.compilations + beside.compilations
            result.set("steps", {step.name: {"seconds": seconds, "kernels": dict(kernels)}})
            progress(
                f"== {step.name}: {seconds} s of {step.seconds:.0f}; kernels so far: {dict(kernels)}", important=True
            )
            if step.name == "smoke":
                first.close()
                gate = Gate(result.rows)
                progress(f"== gate: {gate.describe()}", important=True)
        if gate.dead:
            timed.run(profile.sanitizer_tasks(gate.dead), min(time.monotonic() + 50.0, end), options.resume)
    result.set("head", report.machine_of(result.rows) | {"seconds": round(time.monotonic() - start, 1)})
    result.set("ceilings", report.ceilings(result.rows))
    result.close()
    with _shown():
        print(report.summary(result.content))
    print(f"{options.out}: {len(result.rows)} rows in {time.monotonic() - start:.0f} s")
    if gate.is_shut:
        return DEAD
    return WRONG if report.wrong_rows(result.rows) else RIGHT


@contextmanager
def _shown() -> Iterator[None]:
    """What goes wrong within is printed, and what was measured stands."""
    try:
        yield
    except Exception:
        traceback.print_exc()


def _admitted(step: Step, gate: Gate, result: ResultFile) -> list[Task]:
    """The step's tasks that the gate lets through; of the others a row says so."""
    tasks = step.tasks
    if step.choose:
        tasks = []
        with _shown():
            tasks = step.choose(result.rows)
    admitted = [task for task in tasks if gate.admits(step.name, task)]
    for task in tasks:
        if task not in admitted:
            result.leave_out(task.part, task.key, source_of(task.key), "left out by the gate")
    return admitted


def _prepare(options: argparse.Namespace, names: list[str], workers: int) -> str | None:
    """Put compiled kernels where every process that follows finds them; says what was done.

    They come from a packed cache, or are compiled here, side by side: what a step lacks it compiles itself, alone.
    """
    if options.cache is None and not options.warm:
        return None
    from . import cache

    start = time.monotonic()
    os.environ["TRITON_CACHE_DIR"] = str(cache.FOLDER)
    if options.cache is not None:
        try:
            count = cache.unpack(options.cache, cache.FOLDER)
        except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
            return f"{options.cache} cannot be unpacked: {error}"
        return f"{count} kernels unpacked in {time.monotonic() - start:.1f} s"
    command = [sys.executable, "-m", "benchmarks.gpu.cache", "--out", str(cache.FOLDER), "--workers", str(workers)]
    process = subprocess.Popen([*command, "--steps", *names], cwd=ROOT, start_new_session=True)
    try:
        process.wait(options.warm)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    count = cache.kernels_in(cache.FOLDER).total()
    return f"{count} kernels after {time.monotonic() - start:.1f} s of compiling"


def _missing_device(device: str) -> str | None:
    if device != "cuda":
        return None
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device: --dry-run lists what would run, --device cpu tries the program on tiny shapes"
    return None


def _progress(start: float):
    """Prints a line now and then, failures and what is important at once."""
    last = [0.0]

    def show(text: str, important: bool = False) -> None:
        if important or time.monotonic() - last[0] > 15.0 or not text.endswith((": done", ": error")):
            last[0] = time.monotonic()
            print(f"{time.monotonic() - start:5.0f} s  {text}", flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
