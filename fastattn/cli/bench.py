"""``fastattn bench``: naive attention, torch's own and fastattn in turns, a minute in all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

import fastattn
from fastattn.cli.console import console, parse_backend, parse_device, parse_dtype, progress_bar

#: (batch, heads, length, head_dim), causal.
CALLS = (
    ((8, 8, 128, 64), False),
    ((2, 8, 512, 64), False),
    ((2, 8, 512, 64), True),
    ((1, 8, 2048, 64), False),
    ((1, 8, 2048, 64), True),
    ((1, 4, 2048, 128), False),
)


def naive_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V as anyone writes it first, with the whole score matrix in memory."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(dim=-1) @ value


def medians(functions: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of each function, run in turns until the time is used up (at least three turns)."""

    def timed(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for function in functions.values():
        timed(function)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 3:
        for name, function in functions.items():
            samples[name].append(timed(function))
    return {name: statistics.median(times) for name, times in samples.items()}


def run_bench(backend: str, device_name: str, dtype_name: str, threads: int | None, seconds: float) -> None:
    """Print the table of times and ratios."""
    device, dtype = parse_device(device_name), parse_dtype(dtype_name)
    parse_backend(backend)
    if threads is not None:
        torch.set_num_threads(threads)
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    table = Table(title=f"{dtype_name}, {where}: median milliseconds")
    table.add_column("(B, H, L, D)")
    table.add_column("pass")
    for heading in ("naive", "torch", "fastattn", "naive / fastattn", "torch / fastattn"):
        table.add_column(heading, justify="right")

    calls = {
        "naive": naive_attention,
        "torch": F.scaled_dot_product_attention,
        "fastattn": partial(fastattn.scaled_dot_product_attention, backend=backend),
    }
    seconds_per_score: dict[str, float] = {}
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=2 * len(CALLS))
        for shape, is_causal in CALLS:
            scores = shape[0] * shape[1] * shape[2] ** 2
            for backward in (False, True):
                # torch's half-precision matmul on a CPU is slow enough to wait minutes for.
                functions = {
                    name: _attention_pass(call, shape, is_causal, backward, device, dtype)
                    for name, call in calls.items()
                    if name == "fastattn" or scores * seconds_per_score.get(name, 0.0) < max(seconds, 1.0)
                }
                times = medians(functions, device, seconds)
                seconds_per_score |= {name: time / scores for name, time in times.items()}
                table.add_row(
                    f"{shape}" + (" causal" if is_causal else ""),
                    "forward+backward" if backward else "forward",
                    *(f"{1e3 * times[name]:.2f}" if name in times else "-" for name in calls),
                    *(
                        f"{times[name] / times['fastattn']:.2f}" if name in times else "-"
                        for name in ("naive", "torch")
                    ),
                )
                progress.advance(task)
    console.print(table)
    if device.type == "cpu":
        console.print("For pinned and bound threads and every group of cases, run `make bench`.")


def _attention_pass(
    call: Callable, shape: tuple, is_causal: bool, backward: bool, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """A function without arguments that runs the call, and its gradient with ``backward``."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    if not backward:
        return lambda: call(query, key, value, is_causal=is_causal)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    return lambda: torch.autograd.grad(call(*leaves, is_causal=is_causal), leaves, grad_out)
