"""What this machine is and what it can reach: its ceilings, measured, and its description for results."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

import fastattn
from fastattn import _C

#: Rounds of a multiply-add probe, a few milliseconds; bytes of a memory probe, beyond any cache.
PROBE_ROUNDS = 1_000_000
PROBE_BYTES = 2**28
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def isa() -> str:
    """The instruction set that the engine runs in."""
    return _C.isa()


def fma_rate(dtype: torch.dtype) -> float:
    """FLOP/s of independent multiply-adds on registers, all threads together, in the engine's instruction set."""
    start = time.perf_counter()
    operations = _C.probe_multiply_add(DTYPE_NAMES[dtype], torch.get_num_threads(), PROBE_ROUNDS)
    return operations / (time.perf_counter() - start)


def fma_probe(dtype: torch.dtype) -> Callable[[], float]:
    return functools.partial(fma_rate, dtype)


@functools.cache
def _probe_memory() -> torch.Tensor:
    return torch.ones(PROBE_BYTES // 4)


def read_rate() -> float:
    """Bytes per second of reading memory, all threads together."""
    memory = _probe_memory()
    start = time.perf_counter()
    _C.probe_read(memory, torch.get_num_threads())
    return PROBE_BYTES / (time.perf_counter() - start)


def copy_rate() -> float:
    """Bytes per second read and written by torch's copy, its threads together."""
    source = _probe_memory()
    target = torch.empty_like(source)
    target.copy_(source)  # its pages are there from now on
    start = time.perf_counter()
    target.copy_(source)
    return 2 * PROBE_BYTES / (time.perf_counter() - start)


def ceilings() -> dict[str, float]:
    """Medians of five probes: FLOP/s by dtype, bytes per second of reading and copying."""
    probes: dict[str, Callable[[], float]] = {
        f"fma {name}": fma_probe(dtype) for dtype, name in DTYPE_NAMES.items() if dtype != torch.float16
    }
    probes |= {"read": read_rate, "copy": copy_rate}
    return {name: statistics.median(probe() for _ in range(5)) for name, probe in probes.items()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE)
        if names:
            return re.sub(r"\s+", " ", names[0].replace("(R)", "").replace("(TM)", "")).strip()
    return platform.processor() or platform.machine()


def description() -> dict:
    """The machine, the date and the versions that a result belongs to."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    packages = ("numpy", "onnxruntime", "pytest-benchmark")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "fastattn": fastattn.__version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory / 2**30),
            "instruction_sets": list(_C.available_isas()),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions,
    }


def has_cores(count: int) -> bool:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return cores >= count
