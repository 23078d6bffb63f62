"""Stand-ins for the Gluon modules that the Hopper kernels import, on the machine of gluon_emulator.py.

:func:`load_kernels` executes kernel source files with these in place of ``triton.experimental.gluon``, optionally
with edits (injected faults); :meth:`Kernels.launch` runs a kernel over a grid.
"""

from __future__ import annotations

import contextlib
import re
import sys
import types
from pathlib import Path

import torch

from gluon_emulator import EmulationError, Machine, MBarrier, NamedBarrier, Product, SharedTile


def as_tensor(value) -> torch.Tensor:
    if isinstance(value, Product):
        value._early()
    return torch.as_tensor(value)


def _numeric(of_numbers, of_tensors):
    """One function for index arithmetic (Python numbers stay numbers) and for tensors."""

    def apply(a, b):
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return of_tensors(as_tensor(a), as_tensor(b))
        return of_numbers(a, b)

    return apply


def _where(condition, a, b):
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    a, b = as_tensor(a), as_tensor(b)
    dtype = a.dtype if a.dim() else b.dtype
    return torch.where(condition, a.to(dtype), b.to(dtype))


def _maximum_along(value, axis):
    """The maximum of what is no NaN, NaN where all are: so the hardware's instruction does."""
    value = as_tensor(value)
    largest = value.masked_fill(value.isnan(), -torch.inf).amax(axis)
    return largest.masked_fill(value.isnan().all(axis), torch.nan)


class MBarriers:
    """An array of mbarriers in shared memory."""

    def __init__(self, count: int):
        self.barriers = [MBarrier() for _ in range(count)]

    def index(self, i) -> MBarrier:
        return self.barriers[int(i)]


class MBarrierLayout:
    """Marks an allocation as mbarriers."""


class Kernels:
    """The kernels of some source files, runnable on the CPU."""

    def __init__(self):
        self.machine: Machine | None = None
        self.program, self.programs = 0, 1
        self.gathered: list | None = None  # the partitions of programs that are to run together
        self.modules = self._stand_ins()
        self.functions: dict = {}

    def launch(
        self, name: str, programs: int, arguments: dict, seed: int, warps: int = 4, together: bool = False
    ) -> None:
        """Run every program of a one-dimensional grid, one after the other, each under its own random schedule, or
        all ``together`` under one."""
        self.programs, self.warps = programs, warps
        self.gathered = [] if together else None
        for self.program in range(programs):
            if self.program == 0 or not together:
                self.machine = Machine(2 * (7919 * seed + self.program) + seed % 2)
            self.functions[name](**arguments)
        if together:
            self.machine.run(self.gathered)

    def _program_id(self, axis: int) -> int:
        partition = self.machine.current
        return (partition.program if partition else self.program) if axis == 0 else 0

    # -- instructions -------------------------------------------------------------------------------

    def _inline_asm(self, source, constraints, arguments, dtype=None, is_pure=True, pack=1):
        """The assembly in use: named barriers, the wait for TMA stores to be in global memory, and a shift."""
        machine = self.machine
        partition = machine.current
        found = re.findall(r"bar\.(sync|arrive) (\d+), (\d+)", source)
        if source == "shr.u32 $0, $1, 31;":
            return arguments[0] >> 31
        if "cp.async.bulk.wait_group 0" in source:
            machine.pause("a wait for TMA stores", lambda: partition.stores == 0)
        elif not found:
            raise EmulationError(f"unknown assembly: {source}")
        for action, name, threads in found:
            barrier = machine.named.setdefault((partition.program, name), NamedBarrier())
            generation = barrier.arrive(name, machine.current.threads, int(threads))
            waits = action == "sync"
            machine.pause(f"bar.{action} {name}", lambda b=barrier, g=generation, w=waits: not w or b.generation > g)
        return arguments[0]

    def _allocate(self, dtype, shape, layout, value=None):
        if isinstance(layout, MBarrierLayout):
            return MBarriers(int(shape[0]))
        data = torch.full([int(size) for size in shape], float("nan"), dtype=dtype)
        tile = SharedTile(self.machine, data, f"shared{len(self.machine.memories)}")
        self.machine.memories.append(tile)
        return tile

    def _fence_async_shared(self, cluster=False):
        partition = self.machine.current
        for memory in self.machine.memories if partition else ():
            unfenced = memory.uses["unfenced"]
            unfenced[unfenced == 1 + partition.number] = 0

    def _tma_load(self, descriptor, coordinates, barrier, tile, pred=True):
        if not pred:
            return
        tile.require_free("a TMA load into", "product", "storing", "loading", "unfenced")
        descriptor.check_tile(tile)
        outer, inner = descriptor.box(coordinates)
        tile.uses["loading"].fill_(1)
        tile.data.fill_(float("nan"))

        def land():
            tile.data.zero_()
            tile.data[inner] = descriptor.tensor[outer]
            tile.uses["loading"].zero_()
            barrier.land(descriptor.nbytes)

        self.machine.copies.append(land)
        self.machine.pause("a TMA load")

    def _tma_store(self, descriptor, coordinates, tile, add=False):
        tile.require_free("a TMA store of", "unfenced", "loading")
        descriptor.check_tile(tile)
        outer, inner = descriptor.box(coordinates)
        partition = self.machine.current
        tile.uses["storing"] += 1
        partition.stores += 1

        def land():
            if add:
                descriptor.tensor[outer] += tile.data[inner]
            else:
                descriptor.tensor[outer] = tile.data[inner]
            tile.uses["storing"] -= 1
            partition.stores -= 1

        self.machine.copies.append(land)
        self.machine.pause("a TMA store")

    def _store_wait(self, pendings):
        partition = self.machine.current
        self.machine.pause("tma.store_wait", lambda: partition.stores <= pendings)

    def _warpgroup_mma(
        self, a, b, accumulator, *, use_acc=True, precision=None, max_num_imprecise_acc=None, is_async=False
    ):
        product = Product(a, b, accumulator, bool(use_acc))
        product.issue()
        self.machine.current.products.append(product)
        self.machine.pause("wgmma")
        return product if is_async else self._warpgroup_mma_wait(0, [product])

    def _warpgroup_mma_wait(self, num_outstanding=0, deps=None):
        products = self.machine.current.products
        while len(products) > num_outstanding:
            products.pop(0).complete()
        self.machine.pause("warpgroup_mma_wait")
        results = [d.value if isinstance(d, Product) and d not in products else d for d in deps]
        return results[0] if len(results) == 1 else tuple(results)

    def _mbarrier_expect(self, barrier, bytes, pred=True):
        if pred:
            barrier.bytes += int(bytes)
            barrier.arrive(1)
            self.machine.pause("mbarrier.expect")

    def _mbarrier_arrive(self, barrier, *, count=1, pred=True):
        if pred:
            barrier.arrive(count)
            self.machine.pause("mbarrier.arrive")

    def _mbarrier_wait(self, barrier, phase, pred=True, deps=()):
        if pred:
            caller = sys._getframe(1)
            self.machine.pause(
                f"mbarrier.wait in {caller.f_code.co_name}:{caller.f_lineno}", lambda: barrier.phase != int(phase)
            )

    def _load(self, pointer, mask=None, other=0.0):
        offsets = pointer.elements(mask)
        values = pointer.tensor[offsets.clamp(0, pointer.tensor.numel() - 1)]
        return values if mask is None else torch.where(mask, values, torch.as_tensor(other, dtype=values.dtype))

    def _store(self, pointer, value, mask=None):
        offsets = pointer.elements(mask)
        value = as_tensor(value).expand(offsets.shape)
        if mask is not None:
            offsets, value = offsets[mask], value[mask]
        pointer.tensor[offsets] = value.to(pointer.tensor.dtype)

    def _atomic_add(self, pointer, value, mask=None, sem=None, scope=None):
        old = self._load(pointer, mask)
        self._store(pointer, old + value, mask)
        self.machine.pause("an atomic addition")
        return old

    def _warp_specialize(self, functions_and_args, worker_num_warps, worker_num_regs=None):
        warps = [self.warps, *worker_num_warps]
        partitions = [(f, a, w, self.program) for (f, a), w in zip(functions_and_args, warps, strict=True)]
        if self.gathered is None:
            self.machine.run(partitions)
        else:
            self.gathered += partitions

    # -- modules ------------------------------------------------------------------------------------

    def _language(self) -> types.ModuleType:
        gl = types.ModuleType("triton.experimental.gluon.language")
        gl.constexpr = lambda value=None: value
        gl.static_range, gl.static_assert = range, lambda condition, message="": None
        gl.float32, gl.bfloat16, gl.float16 = torch.float32, torch.bfloat16, torch.float16
        gl.int32, gl.int64 = torch.int32, torch.int64
        for layout in (
            "BlockedLayout",
            "DistributedLinearLayout",
            "DotOperandLayout",
            "NVMMADistributedLayout",
            "NVMMASharedLayout",
            "SliceLayout",
            "SwizzledSharedLayout",
        ):
            setattr(gl, layout, lambda *args, **kwargs: None)
        gl.arange = lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32)
        gl.full = lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype)
        gl.zeros = lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype)
        gl.convert_layout = lambda value, layout, assert_trivial=False: as_tensor(value)
        gl.to_tensor = lambda value: value
        gl.expand_dims = lambda value, axis: value.unsqueeze(axis)
        gl.maximum, gl.minimum = _numeric(max, torch.fmax), _numeric(min, torch.fmin)
        gl.max = _maximum_along
        gl.sum = lambda value, axis: as_tensor(value).sum(axis)
        gl.where, gl.cdiv = _where, lambda a, b: -(-a // b)
        gl.exp2, gl.log2 = torch.exp2, torch.log2
        gl.load, gl.store, gl.atomic_add = self._load, self._store, self._atomic_add
        gl.inline_asm_elementwise, gl.allocate_shared_memory = self._inline_asm, self._allocate
        gl.program_id, gl.num_programs = self._program_id, lambda axis: self.programs if axis == 0 else 1
        gl.warp_specialize = self._warp_specialize
        return gl

    def _stand_ins(self) -> dict[str, types.ModuleType]:
        name = "triton.experimental.gluon"
        gluon, hopper = types.ModuleType(name), types.ModuleType(f"{name}.language.nvidia.hopper")
        gluon.language = self._language()
        gluon.jit = lambda function=None, **options: function or (lambda f: f)
        gluon.constexpr_function = lambda function: function
        hopper.tma = types.SimpleNamespace(
            async_load=self._tma_load,
            async_store=self._tma_store,
            store_wait=self._store_wait,
            async_atomic_add=lambda *arguments: self._tma_store(*arguments, add=True),
        )
        hopper.mbarrier = types.SimpleNamespace(
            MBarrierLayout=MBarrierLayout,
            init=lambda barrier, count: barrier.init(count),
            expect=self._mbarrier_expect,
            arrive=self._mbarrier_arrive,
            wait=self._mbarrier_wait,
        )
        hopper.fence_async_shared = self._fence_async_shared
        hopper.warpgroup_mma, hopper.warpgroup_mma_wait = self._warpgroup_mma, self._warpgroup_mma_wait
        hopper.warpgroup_mma_init = Product.finished
        experimental = types.ModuleType("triton.experimental")
        experimental.gluon = gluon
        return {
            "triton": types.ModuleType("triton"),
            "triton.experimental": experimental,
            name: gluon,
            f"{name}.language": gluon.language,
            f"{name}.language.nvidia": types.ModuleType("nvidia"),
            f"{name}.language.nvidia.hopper": hopper,
        }


@contextlib.contextmanager
def _modules(stand_ins: dict):
    saved = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_kernels(directory: Path, names: list[str], edits: list[tuple[str, str, str]] = ()) -> Kernels:
    """Execute the modules ``names`` of a package directory, in this order, on the emulator.

    ``edits`` are (module, old, new) replacements in their source: faults that the emulator should catch.
    """
    kernels = Kernels()
    package = types.ModuleType("emulated_kernels")
    package.__path__ = []
    loaded = {package.__name__: package}
    sources = {name: (directory / f"{name}.py").read_text() for name in names}
    for name, old, new in edits:
        if old not in sources[name]:
            raise ValueError(f"{name}.py has no {old!r} to replace")
        sources[name] = sources[name].replace(old, new)
    for name, source in sources.items():
        module = types.ModuleType(f"{package.__name__}.{name}")
        loaded[module.__name__] = module
        with _modules({**kernels.modules, **loaded}):
            exec(compile(source, f"{name}.py", "exec"), module.__dict__)
        kernels.functions.update({k: v for k, v in vars(module).items() if isinstance(v, types.FunctionType)})
    return kernels
