"""Part ``profile``: where the time of a call goes, kernel by kernel.

torch.profiler gives each kernel's time; Nsight Compute (ncu), where it is installed and may read the
counters, gives a few metrics of the main ones. The clocks are left alone.
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import subprocess
import sys

from .environment import ROOT
from .pool import Task

METRICS = {
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_percent",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "dram__bytes.sum": "dram_bytes",
    "launch__registers_per_thread": "registers",
    "launch__shared_mem_per_block": "shared_bytes",
    "smsp__inst_executed_op_local_ld.sum": "local_loads",
    "gpu__time_duration.sum": "nanoseconds",
}
SHAPES = ((128, None, "forward"), (128, None, "backward"), (128, "upper_left", "forward"), (64, None, "backward"))


def tasks(device: str, backend: str, quick: bool) -> list[Task]:
    """torch.profiler on each shape, then ncu on the first two."""
    from .tune import task_of

    if device == "cpu":
        return []
    wanted = []
    for tool in ("torch", "ncu"):
        for head_dim, causal, direction in SHAPES[:2] if tool == "ncu" or quick else SHAPES:
            setup = task_of("", "", "", head_dim, causal, 8192).arguments["setup"]
            arguments = {"setup": setup | {"backend": backend}, "direction": direction}
            key = f"profile/{tool}_{direction}_d{head_dim}_{causal or 'full'}"
            wanted.append(Task("profile", key, f".profile:run_{tool}", arguments, timeout=60.0, estimate=6.0))
    return wanted


def compile_tasks(timed: list[Task]) -> list[Task]:
    """None: the other parts have compiled what is profiled."""
    return []


def run_torch(context, setup: dict, direction: str) -> None:
    """Microseconds of each kernel in one call, mean of ten."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    call = _call(setup, direction)
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
            )


def run_ncu(context, setup: dict, direction: str) -> None:
    """A few metrics of each kernel of one call; unsupported where ncu is missing or may not count."""
    from .worker import Unsupported, run_stage

    def collect() -> None:
        ncu = shutil.which("ncu")
        if ncu is None:
            raise Unsupported("ncu is not installed")
        command = [ncu, "--csv", "--clock-control", "none", "--profile-from-start", "off"]
        command += ["--metrics", ",".join(METRICS), "--target-processes", "application-only"]
        command += [
            sys.executable,
            "-m",
            "benchmarks.gpu.profile",
            json.dumps({"setup": setup, "direction": direction}),
        ]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=50, cwd=ROOT)
        kernels: dict[tuple[str, str], dict] = {}
        table = [line for line in finished.stdout.splitlines() if line.startswith('"')]
        for entry in csv.DictReader(table):
            metric = METRICS.get(entry.get("Metric Name", ""))
            if metric:
                kernel = kernels.setdefault((entry["ID"], entry["Kernel Name"]), {})
                with contextlib.suppress(ValueError):  # "n/a"
                    kernel[metric] = float(entry["Metric Value"].replace(",", ""))
        if not kernels:
            text = " ".join((finished.stdout + finished.stderr).split())
            raise Unsupported(f"ncu reported no kernel: {text[-250:]}")
        for (_, name), metrics in kernels.items():
            context.row("ok", variant=name[:80], direction=direction, causal=setup["causal"], metrics=metrics)

    run_stage(context, "ncu", collect)


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
    _profiled(**json.loads(sys.argv[1]))
