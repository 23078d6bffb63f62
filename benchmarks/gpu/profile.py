"""Part ``profile``: where the time of a call goes, kernel by kernel.

Nsight Compute (ncu), where it is installed and may read the counters, gives a few metrics of the main kernels;
torch.profiler gives each kernel's time. The clocks are left alone. compute-sanitizer looks at a family that part
smoke found crashing or wrong.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import time

from . import watchdog
from .environment import ROOT
from .families import leave_out_dead
from .pool import Task

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
#: Warps that wait for each reason while one issues: a barrier, memory through L1, a fixed latency, the pipe itself, ...
STALLS = ("barrier", "long_scoreboard", "short_scoreboard", "wait", "math_pipe_throttle", "gmma", "membar", "sleeping")
SAFE_METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
}
METRICS = SAFE_METRICS | {
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "lts__t_bytes.sum": "l2_bytes",
    "dram__bytes.sum": "dram_bytes",
    "sm__cycles_active.avg": "cycles",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared_bytes",
    "smsp__inst_executed_op_local_ld.sum": "local_loads",
    **{STALLED.format(reason): f"stalled_{reason}" for reason in STALLS},
}
#: ncu takes these without listing them among a chip's counters.
LISTED_NOWHERE = "launch__"
CHIP = "gh100"
KERNELS = "regex:attention_forward|gradients"
NCU_SECONDS, QUERY_SECONDS = 25.0, 8.0
SANITIZER_SECONDS = 40.0
COUNTED = ((128, None, "forward"), (128, None, "backward"), (128, "upper_left", "forward"))
TIMED = ((128, None, "backward"), (64, None, "backward"))


def tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """ncu on the headline kernels, then torch.profiler on the backward's."""
    from .tune import setup_of

    if device == "cpu":
        return []
    wanted = []
    for tool, shapes, seconds in (("ncu", COUNTED[:2] if quick else COUNTED, 12.0), ("torch", TIMED, 4.0)):
        for head_dim, causal, direction in shapes:
            setup = setup_of(head_dim, causal, 8192)
            arguments = {"setup": setup | {"backend": backend}, "direction": direction}
            key = f"profile/{tool}_{direction}_d{head_dim}_{causal or 'full'}"
            limit = NCU_SECONDS + QUERY_SECONDS + 10.0 if tool == "ncu" else 30.0
            wanted.append(Task("profile", key, f".profile:run_{tool}", arguments, timeout=limit, estimate=seconds))
    return wanted


def sanitizer_tasks(dead: set[str]) -> list[Task]:
    """memcheck on a small call of the first dead family of ours, in the order of part smoke; to be run last."""
    from .smoke import FAMILIES

    found = [name for name in FAMILIES if name in dead and FAMILIES[name].engine != "torch"][:1]
    limit = SANITIZER_SECONDS + 10.0
    return [
        Task("profile", f"profile/memcheck/{name}", ".profile:run_memcheck", {"family": name}, limit, SANITIZER_SECONDS)
        for name in found
    ]


def run_torch(context, setup: dict, direction: str) -> None:
    """Microseconds of each kernel in one call, mean of ten."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    call, family = _call(setup, direction), _family(setup, direction)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    for event in recorded.key_averages():
        microseconds = event.self_device_time_total / 10
        if microseconds > 0.5:
            context.row(
                "ok",
                variant=event.key[:80],
                ms=round(microseconds / 1e3, 5),
                launches=event.count / 10,
                direction=direction,
                causal=setup["causal"],
                head_dim=setup["head_dim"],
                family=family,
            )


def run_ncu(context, setup: dict, direction: str) -> None:
    """A few metrics of each kernel of one call; unsupported where ncu is missing or may not count."""
    from .worker import run_stage

    labels = {"direction": direction, "causal": setup["causal"], "head_dim": setup["head_dim"]}

    def collect() -> None:
        kernels = count(setup, direction)
        labels["family"] = _family(setup, direction)
        for name, metrics in kernels:
            context.row("ok", variant=name[:80], metrics=metrics, **labels)

    run_stage(context, "ncu", collect, **labels)


def count(setup: dict, direction: str) -> list[tuple[str, dict]]:
    """(kernel, its metrics), in the order of launches; two safe metrics where ncu refuses the others."""
    from .worker import Unsupported

    ncu = watchdog.tool("ncu")
    if ncu is None:
        raise Unsupported("ncu is not installed")
    known = known_metrics(watchdog.run_for([ncu, "--query-metrics", "--chip", CHIP], QUERY_SECONDS))
    end = time.monotonic() + NCU_SECONDS
    said = []
    attempts = ((known, ["--kernel-name", KERNELS, "--launch-count", "3"]), (SAFE_METRICS, []))
    for metrics, filters in attempts:
        left = end - time.monotonic()
        if left < 5.0:
            break
        command = [ncu, "--csv", "--clock-control", "none", "--profile-from-start", "off", *filters]
        command += ["--metrics", ",".join(metrics), "--target-processes", "application-only"]
        command += [sys.executable, "-m", "benchmarks.gpu.profile"]
        command += [json.dumps({"setup": setup, "direction": direction})]
        printed = watchdog.run_for(command, left, cwd=ROOT)
        kernels = read_table(printed)
        if kernels:
            return kernels
        said.append(" ".join(printed.split())[-800:])
    raise Unsupported("ncu reported no kernel: " + " || ".join(said))


def known_metrics(listed: str) -> dict[str, str]:
    """METRICS without those that ncu's list of a chip's counters lacks; all if there is no list."""
    names = {line.split()[0] for line in listed.splitlines() if line.strip()}
    if not {metric.split(".")[0] for metric in SAFE_METRICS} <= names:
        return METRICS
    return {
        metric: name
        for metric, name in METRICS.items()
        if metric.startswith(LISTED_NOWHERE) or metric.split(".")[0] in names
    }


def read_table(printed: str) -> list[tuple[str, dict]]:
    """(kernel, its metrics) from what ``ncu --csv`` prints, among other lines."""
    kernels: dict[tuple[str, str], dict] = {}
    for entry in csv.DictReader([line for line in printed.splitlines() if line.startswith('"')]):
        metric = METRICS.get(entry.get("Metric Name") or "")
        if metric:
            kernel = kernels.setdefault((entry["ID"], entry["Kernel Name"]), {})
            with contextlib.suppress(ValueError):  # "n/a"
                kernel[metric] = float(entry["Metric Value"].replace(",", ""))
    return [(name, metrics) for (_, name), metrics in kernels.items()]


def run_memcheck(context, family: str) -> None:
    """What compute-sanitizer finds in a small call of a family; a note, whatever it is."""
    from .worker import Unsupported, run_stage

    def look() -> None:
        sanitizer = watchdog.tool("compute-sanitizer")
        if sanitizer is None:
            raise Unsupported("compute-sanitizer is not installed")
        command = [sanitizer, "--tool", "memcheck", "--print-limit", "10"]
        command += [sys.executable, "-m", "benchmarks.gpu.smoke", json.dumps({"family": family})]
        printed = watchdog.run_for(command, SANITIZER_SECONDS, cwd=ROOT)
        context.row("note", stage="memcheck", family=family, text=printed[:6000] or "it printed nothing")

    run_stage(context, "memcheck", look, family=family)


def _family(setup: dict, direction: str) -> str:
    """The family of a set-up's call."""
    from .candidates import problem_of
    from .contenders import Setup
    from .families import family_of

    return family_of(problem_of(Setup(**setup)), setup["backend"], direction)


def _call(setup: dict, direction: str):
    """The forward call, or the backward one of a kept graph."""
    from .bench import backward_of, without_graph
    from .contenders import Setup, fastattn_default

    made = Setup(**setup)
    forward = fastattn_default(made)
    return without_graph(forward) if direction == "forward" else backward_of(made, forward())


def _profiled(setup: dict, direction: str) -> None:
    """What ncu runs: a warm call, then one between profiler start and stop."""
    import torch

    call = _call(setup, direction)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    leave_out_dead()
    _profiled(**json.loads(sys.argv[1]))
