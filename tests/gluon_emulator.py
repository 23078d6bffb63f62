"""A CPU emulator of the part of Gluon that the Hopper kernels use.

Triton has no interpreter for Gluon.  This one runs the unchanged kernel source on torch CPU tensors, with the
machine's asynchrony made explicit and hostile:

* every warp-specialised partition is a thread; only one runs at a time, and at every instruction that another
  partition could observe a seeded scheduler decides who goes on;
* TMA copies and wgmma are queued and complete at any later moment that the scheduler picks (wgmma in order within
  its partition, or at its wait at the latest);
* a tile of shared memory knows, per element, who still uses it: reading a tile whose TMA has not landed,
  refilling one that a wgmma in flight reads, handing generic stores to wgmma or TMA without a proxy fence, and
  storing over a tile that TMA is still storing out are errors;
* programs run one after the other, so that none may wait for a later one, or together, so that each may meet the
  others in any order in global memory;
* mbarriers count arrivals and bytes; too many of either is an error, and so is a program that ends with anything
  in flight.  When nobody can go on, the error tells where each partition waits.

What it does not model: layouts (the compiler checks those), registers (test_hopper_offline.py reads in the machine
code whether those of a wgmma in flight are overwritten), threads of one partition that run ahead of each other, and
speed.

:class:`Machine` is what runs; gluon_emulator_language.py holds the stand-ins for Triton's modules, and
:meth:`Kernels.launch`, which runs a grid.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


class EmulationError(AssertionError):
    """The kernel did what the hardware does not allow, or never finished."""


class _Abandoned(Exception):
    """Unwinds the other partitions once one has failed."""


@dataclass
class Partition:
    """A warp-specialised partition, and what it has in flight."""

    number: int
    name: str
    threads: int
    program: int
    products: list = field(default_factory=list)  # wgmma in flight, oldest first
    stores: int = 0  # TMA stores whose shared memory is still being read
    ready: Callable[[], bool] = lambda: True
    where: str = "its start"
    done: bool = False
    wake: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class Machine:
    """One program (CTA), or several at a time: partitions, copies in flight, barriers, and the scheduler.

    Seeds alternate between two kinds of schedule: a uniformly random one, and one where random priorities hold
    for a while, so that one actor runs as far ahead of the others as the barriers allow.
    """

    LIMIT = 20_000

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.with_priorities = bool(seed & 1)
        self.priorities: dict = {}
        self.partitions: list[Partition] = []
        self.copies: list[Callable[[], None]] = []
        self.memories: list[SharedTile] = []
        self.named: dict[tuple[int, str], NamedBarrier] = {}  # by program and name
        self.error: BaseException | None = None
        self.steps = 0
        self.local = threading.local()

    @property
    def current(self) -> Partition | None:
        """The partition that is executing; None before the partitions start."""
        return getattr(self.local, "partition", None)

    # -- scheduling ---------------------------------------------------------------------------------

    def _choose(self) -> Partition | None:
        """Complete asynchronous work at will, then name the partition that goes on."""
        while True:
            self.steps += 1
            if self.steps > self.LIMIT * (1 + self.partitions[-1].program - self.partitions[0].program):
                raise EmulationError("no end in sight: livelock")
            actors = [("run", p) for p in self.partitions if not p.done and p.ready()]
            actors += [("product", p) for p in self.partitions if p.products]
            actors += [("copy", None)] if self.copies else []
            if not actors:
                waiting = [f"{p.name} at {p.where}" for p in self.partitions if not p.done]
                if waiting:
                    raise EmulationError("deadlock: " + "; ".join(waiting))
                return None
            kind, partition = self._pick(actors)
            if kind == "copy":
                self.copies.pop(self.random.randrange(len(self.copies)))()
            elif kind == "product":
                partition.products.pop(0).complete()
            else:
                return partition

    def _pick(self, actors):
        if not self.with_priorities:
            return self.random.choice(actors)
        if self.random.random() < 0.02:
            self.priorities.clear()
        return max(
            actors,
            key=lambda actor: self.priorities.setdefault(
                (actor[0], actor[1] and actor[1].number), self.random.random()
            ),
        )

    def pause(self, where: str, ready: Callable[[], bool] = lambda: True) -> None:
        """A point where others may run; the partition goes on once ``ready()``."""
        partition = self.current
        if partition is None:
            return
        partition.ready, partition.where = ready, where
        following = self._choose()
        if following is not partition:
            following.wake.release()
            partition.wake.acquire()
            if self.error:
                raise _Abandoned

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        for partition in self.partitions:
            partition.wake.release()

    def _body(self, partition: Partition, function: Callable, arguments: tuple) -> None:
        self.local.partition = partition
        partition.wake.acquire()
        try:
            if self.error:
                return
            function(*arguments)
            if partition.products:
                raise EmulationError(f"{partition.name} ends with {len(partition.products)} wgmma in flight")
            if partition.stores:
                raise EmulationError(f"{partition.name} ends with {partition.stores} TMA stores in flight")
            partition.done = True
            following = self._choose()
            if following:
                following.wake.release()
        except _Abandoned:
            pass
        except BaseException as error:
            self._fail(error)

    def run(self, functions: list[tuple[Callable, tuple, int, int]]) -> None:
        """Run (function, arguments, warps, program) as concurrent partitions to their end."""
        self.partitions = [
            Partition(i, f"{i}:{f.__name__}", 32 * warps, program) for i, (f, _, warps, program) in enumerate(functions)
        ]
        threads = [
            threading.Thread(target=self._body, args=(p, f, a), daemon=True)
            for p, (f, a, _, _) in zip(self.partitions, functions, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._choose().wake.release()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error
        for (_, name), barrier in self.named.items():
            if barrier.arrived:
                raise EmulationError(f"named barrier {name} ends with {barrier.arrived} threads waiting")


@dataclass
class NamedBarrier:
    """A hardware barrier: threads that arrived in this generation."""

    arrived: int = 0
    generation: int = 0

    def arrive(self, name: str, threads: int, expected: int) -> int:
        """Count a partition in; returns the generation it belongs to."""
        generation = self.generation
        self.arrived += threads
        if self.arrived > expected:
            raise EmulationError(f"named barrier {name}: more than {expected} threads")
        if self.arrived == expected:
            self.arrived, self.generation = 0, self.generation + 1
        return generation


class MBarrier:
    """A transaction barrier in shared memory."""

    def __init__(self):
        self.expected = None

    def init(self, count: int) -> None:
        self.expected = self.missing = int(count)
        self.bytes, self.phase = 0, 0

    def arrive(self, count: int) -> None:
        self.missing -= count
        if self.missing < 0:
            raise EmulationError("an mbarrier got more arrivals than it was initialised for")
        self._turn()

    def land(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise EmulationError("TMA delivered more bytes than an mbarrier expects")
        self._turn()

    def _turn(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.expected, self.phase ^ 1


#: Per-element uses of shared memory that forbid others, and how an error names them.
USES = {
    "product": "a wgmma in flight reads it",
    "storing": "a TMA store still reads it",
    "loading": "a TMA load has not landed",
    "unfenced": "generic stores to it are not fenced for the async proxy",
}


class SharedTile:
    """Shared memory or a view of it: data, and per element who uses it."""

    def __init__(self, machine: Machine, data: torch.Tensor, name: str, uses: dict | None = None):
        self.machine, self.data, self.name, self.dtype = machine, data, name, data.dtype
        self.uses = uses or {use: torch.zeros(data.shape, dtype=torch.int8) for use in USES}
        self.shape = list(data.shape)

    def _view(self, change: Callable, suffix: str = "") -> SharedTile:
        return SharedTile(
            self.machine, change(self.data), self.name + suffix, {k: change(v) for k, v in self.uses.items()}
        )

    def require_free(self, action: str, *uses: str) -> None:
        for use in uses:
            if self.uses[use].any():
                raise EmulationError(f"{action} {self.name} while {USES[use]}")

    def index(self, i) -> SharedTile:
        i = int(i)
        if not 0 <= i < self.shape[0]:
            raise EmulationError(f"index {i} outside the {self.shape[0]} tiles of {self.name}")
        return self._view(lambda t: t[i], f"[{i}]")

    def slice(self, start, length, dim=0) -> SharedTile:
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise EmulationError(f"slice [{start}, {start + length}) outside {self.name}")
        return self._view(lambda t: t.narrow(dim, start, length), f"[{start}:{start + length}]")

    def permute(self, order) -> SharedTile:
        return self._view(lambda t: t.permute(*order))

    def reshape(self, shape) -> SharedTile:
        return self._view(lambda t: t.view(*[int(size) for size in shape]))

    def load(self, layout=None) -> torch.Tensor:
        self.require_free("a generic load of", "loading")
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        self.require_free("a generic store to", "product", "storing", "loading")
        if list(value.shape) != self.shape or value.dtype != self.dtype:
            raise EmulationError(f"{value.dtype} {list(value.shape)} stored to {self.name}, {self.dtype} {self.shape}")
        self.data.copy_(value)
        self.uses["unfenced"].fill_(1 + self.machine.current.number)
        self.machine.pause(f"a store to {self.name}")


class Product:
    """A wgmma in flight; its value exists for the program only after a wait."""

    def __init__(self, a, b, accumulator, use_accumulator: bool):
        self.a, self.b, self.accumulator, self.use_accumulator = a, b, accumulator, use_accumulator
        self.value = None

    @classmethod
    def finished(cls, value) -> Product:
        product = cls(None, None, None, False)
        product.value = value
        return product

    def operands(self) -> list[SharedTile]:
        return [operand for operand in (self.a, self.b) if isinstance(operand, SharedTile)]

    def issue(self) -> None:
        for tile in self.operands():
            tile.require_free("wgmma reads", "loading", "unfenced")
        for tile in self.operands():
            tile.uses["product"] += 1

    def complete(self) -> None:
        a = self.a.data if isinstance(self.a, SharedTile) else self.a
        result = a.float() @ self.b.data.float()
        if self.use_accumulator:
            accumulator = self.accumulator
            result = result + (accumulator.value if isinstance(accumulator, Product) else accumulator)
        for tile in self.operands():
            tile.uses["product"] -= 1
        self.value = result

    def _early(self, *_):
        raise EmulationError("the result of a wgmma is used before warpgroup_mma_wait")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __truediv__ = __getitem__ = to = reshape = _early
    shape = property(_early)


class Descriptor:
    """A TMA descriptor: a box of ``block`` elements anywhere over a tensor; outside it loads give zeros and
    stores do nothing."""

    def __init__(self, tensor: torch.Tensor, block: list[int]):
        self.tensor, self.block_shape, self.dtype, self.layout = tensor, list(block), tensor.dtype, None
        self.block_type = self
        self.nbytes = tensor.element_size() * torch.Size(block).numel()

    def box(self, coordinates) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(where in the tensor, where in the tile) for the part that lies inside the tensor."""
        if len(coordinates) != self.tensor.dim():
            raise EmulationError(f"{len(coordinates)} coordinates for a rank-{self.tensor.dim()} descriptor")
        outer, inner = [], []
        for start, length, size in zip(map(int, coordinates), self.block_shape, self.tensor.shape, strict=True):
            first, last = min(max(start, 0), size), max(min(start + length, size), 0)
            last = max(first, last)
            outer.append(slice(first, last))
            inner.append(slice(first - start, last - start) if last > first else slice(0, 0))
        return tuple(outer), tuple(inner)

    def check_tile(self, tile: SharedTile) -> None:
        if tile.shape != self.block_shape or tile.dtype != self.dtype:
            raise EmulationError(f"TMA box {self.dtype} {self.block_shape} against tile {tile.dtype} {tile.shape}")


class Pointer:
    """A pointer into a contiguous tensor, plus an offset or a tensor of offsets."""

    def __init__(self, tensor: torch.Tensor, offset=0):
        self.tensor, self.offset = tensor.view(-1), offset

    def __add__(self, offset) -> Pointer:
        return Pointer(self.tensor, self.offset + offset)

    def elements(self, mask) -> torch.Tensor:
        """The addressed elements' indices; every one that the mask keeps lies inside."""
        offsets = torch.as_tensor(self.offset)
        kept = offsets if mask is None else offsets[mask.expand(offsets.shape)]
        if kept.numel() and (kept.min() < 0 or kept.max() >= self.tensor.numel()):
            raise EmulationError("a global access out of range")
        return offsets
