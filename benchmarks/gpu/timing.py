"""Times of several functions, interleaved, and the ceilings measured among them.

GPU clocks drift with temperature and power, so the functions that are to be compared take turns in
short rounds, and a matrix product takes its turn with them: each time comes with the ceiling of its
own moment. Each call finds a cold L2 cache, and the launch is hidden behind a sleeping kernel, so
that a time is the GPU's, without the host's.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

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
    host_ms: float = 0.0
    sensors: dict = field(default_factory=dict)

    def as_row(self) -> dict:
        """The times, what the sensors said meanwhile, and what a call took on the host (launches, no waiting)."""
        times = {"ms": round(self.ms, 5), "ms_p20": round(self.low, 5), "ms_p80": round(self.high, 5)}
        return times | {"calls": self.calls, "host_ms": round(self.host_ms, 4)} | self.sensors


class Sensors:
    """The GPU's clock, power and reasons to throttle, read while kernels run; nothing where NVML is not there."""

    def __init__(self, device: str) -> None:
        self._readings: dict[str, list[tuple]] = {}
        self._handle = None
        if device == "cuda":
            with contextlib.suppress(Exception):
                import pynvml

                pynvml.nvmlInit()
                self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())

    def read(self, name: str) -> None:
        if self._handle is None:
            return
        with contextlib.suppress(Exception):
            nvml = self._nvml
            clock = nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)
            watts = nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000.0
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
            celsius = nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU)
            self._readings.setdefault(name, []).append((clock, watts, reasons, celsius))

    def of(self, name: str) -> dict:
        """Medians of a function's turns, and every reason to throttle that was seen, as NVML's bits."""
        readings = self._readings.get(name)
        if not readings:
            return {}
        clocks, watts, reasons, celsius = zip(*readings, strict=True)
        seen = 0
        for bits in reasons:
            seen |= bits
        return {
            "sm_mhz": statistics.median(clocks),
            "watts": round(statistics.median(watts)),
            "celsius": max(celsius),
            "throttle": seen,
        }


def time_interleaved(
    functions: dict[str, Callable[[], object]],
    device: str,
    rounds: int = ROUNDS,
    round_ms: float = ROUND_MS,
    enter: Callable[[str], bool] = lambda name: True,
) -> dict[str, Timing]:
    """Time functions that have run before, a few calls of each in turn.

    ``enter(name)`` is asked before each turn: False leaves the function out.
    """
    sensors = Sensors(device)
    functions = {name: function for name, function in functions.items() if enter(name)}
    timer = _time_calls_on_gpu if device == "cuda" else _time_calls_on_cpu
    flush = _cache_flusher(device)
    counts, ahead_ms = {}, {}
    for name, function in functions.items():
        enter(name)
        start = time.perf_counter()
        first, _ = timer(function, 2, 0.0, flush, lambda: None)
        ahead_ms[name] = (time.perf_counter() - start) * 500.0
        counts[name] = max(2, min(25, round(round_ms / max(min(first), 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    host_ms: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            enter(name)
            arguments = counts[name], ahead_ms[name], flush, lambda name=name: sensors.read(name)
            times, host = timer(function, *arguments)
            samples[name] += times
            host_ms[name].append(host)
    return {name: _summary(samples[name], min(host_ms[name]), sensors.of(name)) for name in functions}


def time_beside_ceiling(
    functions: dict[str, Callable[[], object]], setup, direction: str, enter: Callable[[str], bool] = lambda name: True
) -> dict[str, dict]:
    """Row fields by name: times, the rate of useful work, and its fraction of the ceiling.

    The ceiling takes its turns under the name "matmul", or "copy" for a set-up with one query, whose
    work is to read the keys and values.
    """
    decodes = setup.queries == 1
    name, unit, scale = ("copy", "GB/s", 1e-6) if decodes else ("matmul", "TFLOP/s", 1e-9)
    ceiling, ceiling_work = (copy if decodes else matmul)(setup.device)
    ceiling()
    timings = time_interleaved({name: ceiling} | functions, setup.device, enter=enter)
    highest = ceiling_work / timings[name].ms if name in timings else None
    work = float(setup.kv_bytes) if decodes else setup.flops(direction)
    rows = {}
    for label, timing in timings.items():
        rate = (ceiling_work if label == name else work) / timing.ms
        of_ceiling = round(rate / highest, 4) if highest else None
        rows[label] = {"rate": round(rate * scale, 2), "unit": unit, "of_ceiling": of_ceiling} | timing.as_row()
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


def _summary(values: list[float], host_ms: float, sensors: dict) -> Timing:
    ordered = sorted(values)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return Timing(statistics.median(ordered), low, high, len(ordered), host_ms, sensors)


def _cache_flusher(device: str) -> Callable[[], object]:
    if device != "cuda":
        return lambda: None
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer.zero_


def _time_calls_on_gpu(function, count: int, ahead_ms: float, flush, while_running) -> tuple[list[float], float]:
    """Milliseconds of each call on the GPU, and of the mean call on the host."""
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    torch.cuda.synchronize()
    # While the GPU sleeps the host gets ahead; past some milliseconds the kernels themselves are long.
    torch.cuda._sleep(int(min(ahead_ms * count, 8.0) * SLEEP_CYCLES_PER_MS) + 1)
    host = 0.0
    for start, end in zip(starts, ends, strict=True):
        flush()
        start.record()
        began = time.perf_counter()
        function()
        host += time.perf_counter() - began
        end.record()
    ends[count // 2].synchronize()
    while_running()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)], host / count * 1e3


def _time_calls_on_cpu(function, count: int, ahead_ms: float, flush, while_running) -> tuple[list[float], float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return times, statistics.mean(times)
