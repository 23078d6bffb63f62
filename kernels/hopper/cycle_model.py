"""How many cycles a work tile takes, predicted from the machine code of its consumers.

A model of one of the four parts of a Hopper multiprocessor: one warp of every consumer warpgroup, in step with its
three siblings in the other parts.  Every cycle one warp, the one that has waited longest of those that can, issues its
next instruction: its operands must be there, and its pipe free.  Products queue for the tensor core in the order of
their issue.  Loads have always arrived and stages are always free: the producer is ahead.

The throughputs are those of the CUDA programming guide (per multiprocessor and cycle: 128 fp32 operations, 64
comparisons or conversions, 16 exponentials; of shared memory 128 bytes), of the tensor cores 4096 16-bit FLOP; the
latencies are rounded from published microbenchmarks.  What it does not know, contention for registers beside wgmma,
is one factor, CONTENTION.  README.md says how it was set, and what the rates of kernels come to.
"""

import re
from collections import Counter, deque
from dataclasses import dataclass, field

WARPGROUP = 128  # threads
#: Cycles from a barrier's last arrival until those who wait go on, through an mbarrier wait that is over, and from
#: the end of a product until a wait for it is over.
BARRIER, MBARRIER_WAIT, PRODUCT_DRAIN = 25, 20, 30

#: How much longer than on its own an instruction occupies its pipe while products run.
CONTENTION = 1.25

#: Bytes a second that an H100's L2 gives all its multiprocessors, of the 5.5 to 6 TB/s that are reported.
L2_BANDWIDTH = 5.5e12

#: opcode -> (pipe, cycles for which a warp's instruction occupies it, cycles until its result can be used).
UNITS = {
    **dict.fromkeys(("FFMA", "FADD", "FMUL", "IMAD"), ("fma", 1, 4)),
    "MUFU": ("exponential", 8, 20),
    "SHFL": ("memory", 4, 24),
    **dict.fromkeys(("LDS", "LDL"), ("memory", 4, 30)),
    **dict.fromkeys(("STS", "STSM", "STL"), ("memory", 8, 1)),
    "R2UR": ("alu", 2, 10),
    "S2R": ("alu", 2, 20),
    **dict.fromkeys(("SYNCS", "BRA", "WARPGROUP", "MEMBAR", "FENCE", "NOP", "EXIT"), ("none", 1, 1)),
}
UNIFORM, ALU = ("uniform", 1, 6), ("alu", 2, 5)
#: Instructions after which a warp cannot issue at once, and for how long.
STALLS = {"SYNCS.PHASECHK": MBARRIER_WAIT, "MEMBAR": MBARRIER_WAIT, "BRA": 2}
NOTHING_WRITTEN = ("STS", "STSM", "STL", "STG", "SYNCS", "BRA", "WARPGROUP", "MEMBAR", "FENCE")


@dataclass(frozen=True)
class Instruction:
    """One instruction as the model sees it; ``kind``: "plain", "product", "wait" (for products) or "barrier"."""

    kind: str
    unit: tuple[str, int, int] = ("none", 1, 1)
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    stall: int = 1
    cycles: float = 0.0  # of a product
    ends_group: bool = False  # of a product
    left: int = 0  # groups that a wait leaves in flight
    name: str = ""  # of a barrier
    warps: int = 0  # that meet at a barrier
    waits: bool = False  # at a barrier


def product_cycles(text: str) -> float:
    """Of a 64 x N x 16 product: N / 2 on the tensor cores, or what its operands take out of shared memory."""
    columns = int(re.match(r"HGMMA\.64x(\d+)x16", text)[1])
    left_in_registers = re.match(r"\S+ R\d+, R\d+", text)
    return max(columns / 2, (32 * columns + (0 if left_in_registers else 2048)) / 128)


def l2_bound(rows: int) -> float:
    """The 16-bit FLOP/s of a forward with tiles of ``rows`` queries that L2 can feed: 4 N D bytes of keys and values
    for 4 rows N D FLOP.  A bound of its own, not part of the cycles."""
    return L2_BANDWIDTH * rows


def decode(text: str) -> Instruction:
    """An instruction of a disassembly, without its predicate."""
    opcode, _, rest = text.partition(" ")
    name = opcode.split(".")[0]
    if name == "HGMMA":
        return Instruction("product", cycles=product_cycles(text), ends_group="gsb0" in text)
    wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", text)
    if wait:
        return Instruction("wait", left=int(wait[1], 16))
    meeting = re.match(r"BAR\.(SYNC|ARV)\S* 0x([0-9a-f]+), 0x([0-9a-f]+)", text)
    if meeting:
        warps = int(meeting[3], 16) // WARPGROUP
        return Instruction("barrier", name=meeting[2], warps=warps, waits=meeting[1] == "SYNC")
    operands = [re.findall(r"\bU?[RP]\d+\b", operand) for operand in rest.split(",")]
    written = 0
    if name not in NOTHING_WRITTEN:
        predicates = (i for i, operand in enumerate(rest.split(",")) if not re.match(r"\s*U?P(T|\d)", operand))
        written = next(predicates, 0) + 1
    writes = [register for operand in operands[:written] for register in operand]
    if written and ".64" in opcode and writes and writes[-1].startswith("R"):
        writes.append(f"R{int(writes[-1][1:]) + 1}")
    reads = [register for operand in operands[written:] for register in operand]
    unit = UNITS.get(name) or (UNIFORM if name.startswith("U") else ALU)
    stall = next((cycles for start, cycles in STALLS.items() if text.startswith(start)), 1)
    return Instruction("plain", unit, tuple(reads), tuple(writes), stall)


@dataclass
class Warp:
    """A warp on its way through its instructions."""

    instructions: list[Instruction]
    at: int = 0
    free: float = 0.0  # when it can issue again
    issued: float = -1.0
    ready: dict[str, float] = field(default_factory=dict)  # by register
    groups: deque = field(default_factory=deque)  # when each group of products in flight is over
    generation: int | None = None  # of the barrier that it waits at


@dataclass
class Barrier:
    """A named barrier: warps that arrived, how often it was full, and when last."""

    arrived: int = 0
    generation: int = 0
    full_at: float = 0.0


class Part:
    """A part of a multiprocessor that runs some warps to their ends."""

    def __init__(self, streams: list[list[Instruction]]):
        self.warps = [Warp(stream) for stream in streams]
        self.pipes: dict[str, float] = {}
        self.tensor_free = 0.0
        self.barriers: dict[str, Barrier] = {}
        handed_over = {i.name for stream in streams for i in stream if i.kind == "barrier" and not i.waits}
        if handed_over:  # turns are passed: the first is passed before the first tile
            self.barriers[min(handed_over, key=lambda name: int(name, 16))] = Barrier(arrived=1)

    def run(self, marks: list[list[int]]) -> list[list[float]]:
        """When each warp had issued as many instructions as its marks say."""
        found: list[list[float]] = [[] for _ in self.warps]
        cycle = 0.0
        while True:
            waiting = [(index, warp) for index, warp in enumerate(self.warps) if warp.at < len(warp.instructions)]
            if not waiting:
                return found
            soonest = float("inf")
            for index, warp in sorted(waiting, key=lambda waiting: waiting[1].issued):
                when = self.when(warp, cycle)
                if when <= cycle:
                    self.issue(warp, cycle)
                    if warp.generation is None and warp.at in marks[index]:
                        found[index].append(cycle)
                    soonest = cycle + 1
                    break
                soonest = min(soonest, when)
            if soonest == float("inf"):
                raise ValueError("the consumers wait for each other")
            cycle = max(cycle + 1, -(-soonest // 1))

    def when(self, warp: Warp, cycle: float) -> float:
        """The first cycle in which a warp can issue its next instruction, as far as is known in this one."""
        instruction = warp.instructions[warp.at]
        if instruction.kind == "plain":
            pipe = self.pipes.get(instruction.unit[0], 0.0)
            registers = instruction.reads + instruction.writes
            return max(warp.free, pipe, max((warp.ready.get(r, 0.0) for r in registers), default=0.0))
        if instruction.kind == "wait":
            while warp.groups and warp.groups[0] <= cycle:
                warp.groups.popleft()
            late = len(warp.groups) - instruction.left
            return max(warp.free, warp.groups[late - 1] if late > 0 else 0.0)
        if instruction.kind == "barrier" and warp.generation is not None:
            barrier = self.barriers[instruction.name]
            return barrier.full_at + BARRIER if barrier.generation > warp.generation else float("inf")
        return warp.free

    def issue(self, warp: Warp, cycle: float) -> None:
        instruction = warp.instructions[warp.at]
        warp.issued, warp.free = cycle, cycle + instruction.stall
        if instruction.kind == "plain":
            pipe, occupied, latency = instruction.unit
            if pipe != "none":
                free = self.pipes.get(pipe, 0.0)
                began = free if free > cycle - 1 else cycle  # in the course of the last cycle, if it was waited for
                self.pipes[pipe] = began + CONTENTION * occupied
            for register in instruction.writes:
                warp.ready[register] = cycle + max(occupied, latency)
        elif instruction.kind == "product":
            self.tensor_free = max(self.tensor_free, cycle) + instruction.cycles
            if instruction.ends_group:
                warp.groups.append(self.tensor_free + PRODUCT_DRAIN)
        elif instruction.kind == "barrier":
            if instruction.warps <= 1:
                warp.free = cycle + BARRIER
            elif warp.generation is not None:
                warp.generation = None  # it has waited
            else:
                barrier = self.barriers.setdefault(instruction.name, Barrier())
                generation = barrier.generation
                barrier.arrived += 1
                if barrier.arrived == instruction.warps:
                    barrier.arrived, barrier.generation, barrier.full_at = 0, generation + 1, cycle
                if instruction.waits:
                    warp.generation = generation
                    return
        warp.at += 1


@dataclass(frozen=True)
class TileCycles:
    """A work tile takes ``fixed`` cycles and ``turn`` for each turn of the main loop, of which the tensor cores need
    ``products``."""

    fixed: float
    turn: float
    products: float

    def tensor_share(self, turns: float, products: float) -> float:
        """The share of a work tile's time in which the tensor cores multiply, where it multiplies for ``products``
        cycles in all."""
        return products / (self.fixed + turns * self.turn)


def without_strays(pieces: list[list[Instruction]]) -> list[list[Instruction]]:
    """The consumers' versions of a piece of code without the barriers at which they would wait for ever.

    Those stand under a condition, and the compiler has not laid out every version in the same way.
    """
    arrivals = Counter((i.name, i.warps) for piece in pieces for i in piece if i.kind == "barrier")
    met = {name for (name, warps), number in arrivals.items() if number % warps == 0}
    return [[i for i in piece if i.kind != "barrier" or i.name in met] for piece in pieces]


def tile_cycles(consumers: list[tuple[list[str], list[str], list[str]]], few: int = 4, many: int = 12) -> TileCycles:
    """Of the consumers' code for a work tile (before, a turn, after), run ``few`` and ``many`` turns long."""
    pieces = [
        without_strays([[decode(text) for text in piece] for piece in same]) for same in zip(*consumers, strict=True)
    ]
    decoded = list(zip(*pieces, strict=True))
    per_tile = []
    for turns in (few, many):
        streams = [(before + turns * turn + after) * 3 for before, turn, after in decoded]
        marks = [[len(stream) // 3, len(stream)] for stream in streams]
        ends = Part(streams).run(marks)
        per_tile.append(sum(last - first for first, last in ends) / 2 / len(ends))
    turn = (per_tile[1] - per_tile[0]) / (many - few)
    products = sum(i.cycles for _, body, _ in decoded for i in body)
    return TileCycles(per_tile[0] - few * turn, turn, products)
