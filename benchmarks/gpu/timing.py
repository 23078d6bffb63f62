"""Times of several functions, interleaved, and the ceilings measured among them.

GPU clocks drift with temperature and power, so the functions that are to be compared take turns in
short rounds, and a matrix product takes its turn with them: each time comes with the ceiling of its
own moment. Each call finds a cold L2 cache, and the launch is hidden behind a sleeping kernel, so
that a time is the GPU's, without the host's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROUNDS = 4
ROUND_MS = 12.0  # how long one function's turn lasts
MATMUL_SIZE = 8192
COPY_BYTES = 2 << 30
SLEEP_CYCLES_PER_MS = 2_000_000  # at about 2 GHz


@dataclass(frozen=True)
class Timing:
    """Median time of a call, and the 20th and 80th percentile, in milliseconds."""

    ms: float
    low: float
    high: float
    calls: int

    def as_row(self) -> dict:
        return {"ms": round(self.ms, 5), "ms_p20": round(self.low, 5), "ms_p80": round(self.high, 5)}


def time_interleaved(
    functions: dict[str, Callable[[], object]],
    device: str,
    rounds: int = ROUNDS,
    round_ms: float = ROUND_MS,
) -> dict[str, Timing]:
    """Time functions that have run before, a few calls of each in turn."""
    timer = _time_calls_on_gpu if device == "cuda" else _time_calls_on_cpu
    flush = _cache_flusher(device)
    counts, host_ms = {}, {}
    for name, function in functions.items():
        start = time.perf_counter()
        first = timer(function, 2, 0.0, flush)
        host_ms[name] = (time.perf_counter() - start) * 500.0
        counts[name] = max(2, min(25, round(round_ms / max(min(first), 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            samples[name] += timer(function, counts[name], host_ms[name], flush)
    return {name: _summary(values) for name, values in samples.items()}


def time_beside_ceiling(functions: dict[str, Callable[[], object]], setup, direction: str) -> dict[str, dict]:
    """Row fields by name: times, the rate of useful work, and its fraction of the ceiling.

    The ceiling takes its turns under the name "matmul", or "copy" for a set-up with one query, whose
    work is to read the keys and values.
    """
    decodes = setup.queries == 1
    name, unit, scale = ("copy", "GB/s", 1e-6) if decodes else ("matmul", "TFLOP/s", 1e-9)
    ceiling, ceiling_work = (copy if decodes else matmul)(setup.device)
    ceiling()
    timings = time_interleaved({name: ceiling} | functions, setup.device)
    highest = ceiling_work / timings[name].ms
    work = float(setup.kv_bytes) if decodes else setup.flops(direction)
    rows = {}
    for label, timing in timings.items():
        rate = (ceiling_work if label == name else work) / timing.ms
        rows[label] = {"rate": round(rate * scale, 2), "unit": unit, "of_ceiling": round(rate / highest, 4)}
        rows[label] |= timing.as_row()
    return rows


def matmul(device: str) -> tuple[Callable[[], object], float]:
    """A bf16 matrix product on random data, and its floating-point operations."""
    size = MATMUL_SIZE if device == "cuda" else 64
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=torch.bfloat16)
    return (lambda: torch.mm(left, right, out=out)), 2.0 * size**3


def copy(device: str) -> tuple[Callable[[], object], float]:
    """A copy within device memory, and its bytes, read and written."""
    count = COPY_BYTES if device == "cuda" else 1 << 12
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 2.0 * count


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high, len(ordered))


def _cache_flusher(device: str) -> Callable[[], object]:
    if device != "cuda":
        return lambda: None
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer.zero_


def _time_calls_on_gpu(function, count: int, host_ms: float, flush) -> list[float]:
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    torch.cuda.synchronize()
    # While the GPU sleeps the host gets ahead; past some milliseconds the kernels themselves are long.
    torch.cuda._sleep(int(min(host_ms * count, 8.0) * SLEEP_CYCLES_PER_MS) + 1)
    for start, end in zip(starts, ends, strict=True):
        flush()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def _time_calls_on_cpu(function, count: int, host_ms: float, flush) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return times
