"""What is measured, in which part of the run, and what it should reach.

An entry is a workload with its peers (``benchmarks/peers.py``), further calls of fastattn that it is
compared with (``beside``), and targets. Targets are data: the report prints each with what was
reached. A peer that cannot run on this machine is left out, and the report says why.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from benchmarks.models import AdditiveWorkload, ModelWorkload
from benchmarks.workloads import ModuleWorkload, Workload

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

COMPARISONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Target:
    """What an entry should reach.

    ``quantity`` is "share" (of the ceiling), "ratio" (seconds of ``other`` over fastattn's), "time"
    (fastattn's seconds over those of ``other``) or "rate" (its FLOP/s over those of ``other``).
    ``needs`` names the instruction set for which the target holds.
    """

    quantity: str
    comparison: str
    value: float
    other: str = ""
    needs: str = ""

    def __str__(self) -> str:
        what = {
            "share": "share of the ceiling",
            "ratio": f"times as fast as {self.other}",
            "time": f"time of {self.other}",
            "rate": f"FLOP rate of {self.other}",
        }
        return what[self.quantity]

    def judge(self, measured: dict, isa: str) -> dict:
        """The target with what a measurement reached; ``met`` is None where it does not apply."""
        reached, met = None, None
        if isa.startswith(self.needs):  # avx512_bf16 includes avx512
            reached = self._reached(measured)
            met = None if reached is None else COMPARISONS[self.comparison](reached, self.value)
        return {
            "what": str(self),
            "comparison": self.comparison,
            "value": self.value,
            "reached": reached,
            "met": met,
            "needs": self.needs,
        }

    def _reached(self, measured: dict) -> float | None:
        if self.quantity == "share":
            return measured["share"]
        ratio = measured["ratio"].get(self.other)
        if ratio is None or self.quantity == "ratio":
            return ratio
        if self.quantity == "time":
            return 1.0 / ratio
        return ratio * measured["flops"] / measured["beside_flops"][self.other]


@dataclass(frozen=True)
class Entry:
    """One measured line. ``ceiling`` is "fma" or "read" (memory), ``seconds`` the time to spend on it."""

    group: str
    workload: Workload | ModuleWorkload | ModelWorkload | AdditiveWorkload
    peers: tuple[str, ...] = ()
    beside: dict[str, Workload | ModuleWorkload] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    ceiling: str = "fma"
    seconds: float = 1.0

    def __str__(self) -> str:
        return f"{self.group}: {self.workload}"


#: The instruction sets of the columns of RATES; on a machine without one, its target does not apply.
RATE_COLUMNS = ("avx512", "avx512_bf16", "avx2")
#: (B, H, L, D), causal, backward, and the share of the FMA rate to reach: fp32 AVX-512, bf16 dot, fp32 AVX2.
RATES = (
    ((2, 8, 512, 64), False, False, 0.87, 0.82, 0.86),
    ((2, 8, 2048, 64), False, False, 0.90, 0.86, 0.90),
    ((1, 8, 2048, 128), False, False, 0.92, 0.90, 0.92),
    ((8, 8, 128, 64), False, False, 0.80, 0.70, 0.83),
    ((2, 8, 2048, 64), True, False, 0.87, 0.82, 0.88),
    ((2, 8, 512, 64), True, False, 0.81, 0.76, 0.84),
    ((2, 8, 2048, 64), False, True, 0.89, 0.86, 0.91),
    ((2, 8, 2048, 64), True, True, 0.86, 0.82, 0.88),
)
#: Of these, the times faster than torch that (dtype, causal, backward) must reach at (2, 8, 2048, 64).
AGAINST_TORCH = {
    (FP32, False, False): 1.8,
    (FP32, True, False): 2.2,
    (BF16, False, False): 3.0,
    (FP16, False, True): 5.0,
    (FP16, True, True): 5.0,
}


def peers_for(workload: Workload) -> tuple[str, ...]:
    """torch and naive, but for naive float16, whose matmul takes minutes on a CPU, and large bfloat16."""
    limit = {FP32: float("inf"), BF16: 1e10, FP16: 4e8}[workload.dtype]
    return ("torch", "naive") if workload.flops <= limit else ("torch",)


#: Lengths of the documents that are packed into one sequence of 4096, 512 on average.
DOCUMENTS = (64, 1200, 300, 700, 128, 900, 37, 767)


def rate_entries(dtype: torch.dtype, column: int) -> Iterator[Entry]:
    """The table of rates for one dtype; 16-bit dtypes are also compared with fp32."""
    for row in RATES:
        shape, causal, backward = row[:3]
        workload = Workload(*shape, dtype=dtype, causal=causal, backward=backward)
        targets, beside = [], {}
        if dtype != FP16:
            targets.append(Target("share", ">=", row[3 + column], needs=RATE_COLUMNS[column]))
        if dtype != FP32:
            beside["float32"] = replace(workload, dtype=FP32)
            targets.append(Target("ratio", ">=", 0.9, "float32"))
        if shape == (2, 8, 2048, 64) and (dtype, causal, backward) in AGAINST_TORCH:
            targets.append(Target("ratio", ">=", AGAINST_TORCH[dtype, causal, backward], "torch"))
        peers = peers_for(workload)
        if dtype == FP32 and not backward:
            peers += ("onnxruntime",)
        if dtype != FP16 and not backward and shape == (2, 8, 2048, 64):
            peers += ("flex",)  # which compiles for seconds: at one size
        yield Entry("rate", workload, peers, beside, tuple(targets), seconds=5.0 if backward else 2.0)


def ingredient_entries() -> Iterator[Entry]:
    """What each ingredient costs or saves beside the plain call, and beside torch."""
    base = Workload(2, 8, 1024, 64)

    def entry(workload: Workload, *targets: Target, peers: tuple[str, ...] = (), **beside: Workload) -> Entry:
        beside = {"plain": workload.plain()} | beside
        return Entry("ingredients", workload, peers_for(workload) + peers, beside, targets)

    both = replace(base, backward=True)
    yield entry(replace(both, dropout=0.1), Target("time", "<=", 1.3, "plain"), Target("ratio", ">=", 4.0, "torch"))
    yield entry(
        replace(both, mask="bias_grad"), Target("time", "<=", 1.4, "plain"), Target("ratio", ">=", 2.0, "torch")
    )
    yield entry(replace(both, mask="bias"))
    yield entry(replace(base, mask="bool"), Target("time", "<=", 1.15, "plain"), peers=("flex",))
    yield entry(replace(both, mask="bool"), Target("time", "<=", 1.15, "plain"))
    for keep in (0.25, 0.5, 1.0):
        faster = (Target("ratio", ">=", 2.5, "plain"),) if keep == 0.25 else ()
        for workload in (base, both):
            peers = ("flex",) if faster and not workload.backward else ()
            yield entry(replace(workload, keep=keep), Target("time", "<=", 1.2 * keep, "plain"), *faster, peers=peers)
    yield entry(replace(base, kv_heads=2), Target("time", "<=", 1.0, "plain"))
    yield entry(replace(both, kv_heads=2), Target("time", "<=", 1.0, "plain"))
    wide = Workload(1, 2, 8192, 64, window=128)
    yield entry(wide, Target("ratio", ">=", 12.0, "plain"), peers=("flex",))
    # Bool masks that all sequences and heads share, and that hide whole tiles.
    packed = Workload(1, 8, 4096, 64, documents=DOCUMENTS)
    near = Target("time", "<=", 1.5, "loop")
    yield entry(packed, Target("ratio", ">=", 1.0, "flex"), near, peers=("flex", "loop"))
    yield entry(replace(packed, backward=True), near, peers=("loop",))
    triangle = Workload(2, 8, 2048, 64, mask="triangle")
    causal = replace(triangle, mask=None, causal=True)
    yield entry(triangle, Target("time", "<=", 1.3, "causal"), causal=causal)


def odd_size_entries() -> Iterator[Entry]:
    """Sizes between the tiles, beside the neighbour that fits them."""
    for backward in (False, True):
        for odd, neighbour in (
            ((2, 8, 1000, 64), (2, 8, 1024, 64)),
            ((2, 8, 1024, 80), (2, 8, 1024, 64)),
            ((2, 8, 1024, 96), (2, 8, 1024, 64)),
            ((2, 8, 1024, 40), (2, 8, 1024, 32)),
        ):
            workload = Workload(*odd, backward=backward)
            yield Entry(
                "odd sizes",
                workload,
                ("torch",),
                {"neighbour": Workload(*neighbour, backward=backward)},
                (Target("rate", ">=", 0.85, "neighbour"),),
            )


def decode_entries() -> Iterator[Entry]:
    """One query: the rate at which keys and values are read, from memory and from the caches."""
    for dtype in (FP32, BF16, FP16):
        for heads, keys in ((16, 8192), (16, 16384), (2, 65536)):
            workload = Workload(1, heads, 1, 128, dtype, keys=keys)
            yield Entry("decode", workload, ("torch",), {}, (Target("share", ">=", 0.8),), ceiling="read", seconds=1.0)
        for keys in (64, 256, 1024):
            workload = Workload(1, 16, 1, 128, dtype, keys=keys)
            yield Entry(
                "decode in cache",
                workload,
                ("torch", "naive"),
                {},
                (Target("ratio", ">=", 1.0, "torch"),),
                seconds=0.5,
            )


def module_entries() -> Iterator[Entry]:
    module = ModuleWorkload(4, 1024, 512, 8)
    both = replace(module, backward=True)
    yield Entry("module", both, ("torch",), {}, (Target("ratio", ">=", 1.5, "torch"),), seconds=3.0)
    yield Entry("module", module, ("torch",), seconds=2.0)
    yield Entry(
        "module",
        replace(module, need_weights=True),
        ("torch",),
        {"need_weights=False": module},
        (Target("time", "<=", 1.6, "need_weights=False"),),
        seconds=2.0,
    )
    yield Entry("module", replace(both, need_weights=True), ("torch",), seconds=3.0)


def small_entries() -> Iterator[Entry]:
    """What a call costs beside the arithmetic."""
    workload = Workload(1, 8, 16, 64)
    yield Entry("small", workload, ("torch", "naive"), {}, (Target("time", "<=", 20 / 15, "torch"),), seconds=0.5)
    yield Entry("small", replace(workload, backward=True), ("torch", "naive"), seconds=0.5)


#: Sequence lengths of the plots.
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
MEMORY_LENGTHS = (1024, 2048, 4096, 8192)
#: fastattn's memory at the longest, as a share of naive's, is below this.
MEMORY_TARGET = 0.05


def length_entries() -> Iterator[Entry]:
    """Throughput against sequence length."""
    for length in LENGTHS:
        for dtype, causal, backward in (
            (FP32, False, False),
            (FP32, True, False),
            (FP32, False, True),
            (BF16, False, False),
        ):
            workload = Workload(1, 8, length, 64, dtype, backward, causal)
            yield Entry("length", workload, peers_for(workload), seconds=1.0)


def on_two_threads(entry: Entry, targets: tuple[Target, ...], **changes: float) -> Entry:
    """The entry with these targets; FlexAttention compiles anew only where one of them names it."""
    others = {target.other for target in targets}
    peers = tuple(peer for peer in entry.peers if peer != "flex" or peer in others)
    return replace(entry, group="two threads", peers=peers, targets=targets, **changes)


def two_thread_entries() -> Iterator[Entry]:
    """How the rates scale from one thread to two, and the ratios to torch with two."""
    scales = (Target("ratio", ">=", 1.9, "one thread"),)
    for entry in rate_entries(FP32, 0):
        against_torch = tuple(target for target in entry.targets if target.other == "torch")
        yield on_two_threads(entry, scales + against_torch, seconds=1.5)
    for dtype, causal, backward in AGAINST_TORCH:
        if dtype != FP32:
            workload = Workload(2, 8, 2048, 64, dtype, backward, causal)
            targets = (Target("ratio", ">=", AGAINST_TORCH[dtype, causal, backward], "torch"),)
            yield Entry("two threads", workload, ("torch",), targets=targets)
    for entry in ingredient_entries():
        targets = tuple(target for target in entry.targets if target.quantity == "ratio")
        if targets:
            yield on_two_threads(entry, targets)


def one_thread_entries() -> Iterator[Entry]:
    yield from rate_entries(FP32, 0)
    yield from rate_entries(BF16, 1)
    yield from rate_entries(FP16, 0)
    yield from ingredient_entries()
    yield from odd_size_entries()
    yield from decode_entries()
    yield from module_entries()
    yield from small_entries()


def avx2_entries() -> Iterator[Entry]:
    for entry in rate_entries(FP32, 2):
        yield replace(entry, peers=(), targets=entry.targets[:1], seconds=1.0)


def model_entries() -> Iterator[Entry]:
    """Training steps of the models, and additive attention, with two threads."""
    for model in ("transformer", "classifier"):
        targets = (Target("ratio", ">=", 1.3, "torch"),)
        yield Entry("models", ModelWorkload(model, 4, 512), ("torch", "naive"), targets=targets, seconds=8.0)
    yield Entry("models", ModelWorkload("detector", 4, 24 * 24), ("torch", "naive"), seconds=8.0)
    for workload in (AdditiveWorkload(4, 128, 512, 64), AdditiveWorkload(32, 1, 512, 64)):
        yield Entry("models", workload, ("naive",), seconds=2.0)


#: A part is one process with its own threads and instruction set (see conftest.py).
PARTS = {
    "one thread": one_thread_entries,
    "avx2": avx2_entries,
    "two threads": lambda: (*two_thread_entries(), *length_entries()),
    "memory": tuple,
    "models": model_entries,
}


#: What `make bench` runs, in about twelve minutes, one and a half of which FlexAttention compiles.
PARTS_OF_THE_REPORT = ("one thread", "avx2", "two threads", "models", "memory")


def entries_of(part: str) -> tuple[Entry, ...]:
    return tuple(PARTS[part]())
