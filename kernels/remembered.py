"""Calls alike share their work: what the first works out of shapes, and the compiled kernels that it launches.

Before a kernel lie its plan, its arguments, and Triton's JITFunction.run, which looks at every argument to find what
was compiled for such: 50 to 150 us of Python. All of that follows from the key of :func:`remembered`. So the first two
calls alike go the ordinary way (two, as remembering costs, and many a kind of call comes once), and later ones call
the compiled kernel's launcher as triton.compiler.CompiledKernel does, with their own tensors in those places.

A launch goes the ordinary way nevertheless while a hook or a compiler setting of Triton's knobs is set, while
JITFunction.run is replaced (offline.py), from tensors on the CPU (the interpreter), of a tensor that lies on 16 bytes
otherwise than the first, and always with FASTATTN_REMEMBERED_LAUNCHES=0, which is read once. No tensor is kept.
"""

import functools
import inspect
import os
from collections.abc import Callable, Hashable
from typing import Literal

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: Triton specialises on whether an address is a multiple of this many bytes.
ALIGNMENT = 16
#: Kinds of calls that are remembered; then all are forgotten.
MOST_CALLS = 1024
#: How CompiledKernel calls its launcher in Triton 3.6 to 3.9, and how :class:`Launch` does.
CONVENTION = (
    "self.run(grid[0], grid[1], grid[2], stream, self.function, self.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *args)"
)
#: Set where CPU tensors stand for a device's (benchmarks/gpu/stub.py).
cpu_stands_for_device = False

_run = JITFunction.run
_calls: dict[tuple, "Call"] = {}


@functools.cache
def reason() -> str | None:
    """Why no launch is remembered in this process, or None."""
    if os.environ.get("FASTATTN_REMEMBERED_LAUNCHES") == "0":
        return "FASTATTN_REMEMBERED_LAUNCHES=0"
    if _run.__module__ != JITFunction.__module__:
        return "JITFunction.run was replaced before the kernels were imported"
    try:
        source = inspect.getsource(CompiledKernel.__getitem__)
    except (OSError, AttributeError) as error:
        return f"how Triton {triton.__version__} calls a launcher cannot be read: {error}"
    if CONVENTION not in " ".join(source.split()):
        return f"Triton {triton.__version__} calls a launcher in another way"
    return None


def ordinary() -> bool:
    """Whether Triton compiles as it does by itself: nothing of its knobs, and nobody's JITFunction.run, is in a key."""
    runtime, compilation = knobs.runtime, knobs.compilation
    return JITFunction.run is _run and not (
        runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)
        or compilation.instrumentation_mode
        or getattr(compilation, "fpsan_homomorphic_casts", None)
    )


def watched() -> bool:
    """Whether a hook wants to hear of launches. Chains of hooks are always there; an empty one does nothing."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def forget() -> None:
    """Forget all calls: for who changes a table of configurations."""
    _calls.clear()


def descriptors_like(descriptor) -> type:
    """A class of what a launcher takes for TensorDescriptors: of any tensor, else like this one."""

    class Like:
        __slots__ = ("base",)

        def __init__(self, base: Tensor):
            self.base = base

    for name, value in vars(descriptor).items():
        if name != "base":
            setattr(Like, name, value)
    return Like


class Launch:
    """A compiled kernel and its arguments but the tensors, each with its place and what lies around it there."""

    def __init__(self, kernel: JITFunction, compiled: CompiledKernel, programs: int, given: dict, tensors: dict):
        self.compiled, self.programs, self.hooks = compiled, programs, kernel.pre_run_hooks
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.driver, self.device = driver.active, driver.active.get_current_device()
        self.values, self.places = [], []
        for index, parameter in enumerate(kernel.params):
            name = parameter.name
            value = given.get(name, parameter.default)
            rest: object = None
            if hasattr(value, "base") and not isinstance(value, Tensor):
                rest, value = descriptors_like(value), value.base
            elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                rest, value = value[1:], value[0]
            if isinstance(value, Tensor):
                if value.data_ptr() != tensors[name].data_ptr():
                    raise ValueError(f"the tensor of {name} is not the one that later launches would take")
                self.places.append((index, name, value.data_ptr() % ALIGNMENT, rest))
                value = None
            self.values.append(value)

    def again(self, tensors: dict) -> bool:
        """Launch with these tensors, or do nothing and return False where the kernel might not be theirs."""
        active = driver.active
        if watched() or self.hooks or active is not self.driver or not ordinary():
            return False
        values = self.values.copy()
        for index, name, offset, rest in self.places:
            tensor = tensors[name]
            if tensor.data_ptr() % ALIGNMENT != offset:
                return False
            if rest is None:
                values[index] = tensor
            else:
                values[index] = (tensor, *rest) if type(rest) is tuple else rest(tensor)
        stream = active.get_current_stream(self.device)
        self.run(self.programs, 1, 1, stream, self.function, self.metadata, None, None, None, *values)
        return True


class Call:
    """What is remembered of calls alike."""

    def __init__(self, remembers: bool):
        self.remembers = remembers
        self.worked_out: dict[Hashable, object] = {}
        self.launches: dict[int, Launch | Literal[False]] = {}

    def once(self, name: Hashable, work: Callable, *arguments):
        """``work(*arguments)``, of the first of the calls alike. It holds no tensor."""
        if name not in self.worked_out:
            self.worked_out[name] = work(*arguments)
        return self.worked_out[name]

    def launch(self, kernel, tensors: dict[str, Tensor | None], arguments: Callable[[], tuple[int, dict]]) -> None:
        """Launch as many programs of a kernel, with the named arguments, as ``arguments()`` says.

        A later launch takes from ``tensors``, by the names of the kernel's parameters, all that is new to it.
        """
        known = self.launches.get(id(kernel))
        if known and known.again(tensors):
            return
        programs, given = arguments()
        compiled = kernel[(programs,)](**given)
        if self.remembers and not known and ordinary() and isinstance(compiled, CompiledKernel):
            met = known is False
            self.launches[id(kernel)] = met and Launch(kernel, compiled, programs, given, tensors)


def remembered(work: Callable, problem, tensors: tuple[Tensor | None, ...], *options) -> Call:
    """The calls of ``work`` that are like this one: same options, and tensors alike in all but values and place."""
    query, key, value, scale, causal, left, right, key_lengths, mask, bias, dropout_p, rng_state = problem
    if not (query.is_cuda or cpu_stands_for_device) or reason():
        return Call(remembers=False)
    alike = (
        *(work, options, query.get_device(), type(scale), scale, causal, left, right, dropout_p),
        *[
            None if each is None else (each.shape, each.stride(), each.dtype, each.data_ptr() % ALIGNMENT)
            for each in (query, key, value, key_lengths, mask, bias, rng_state, *tensors)
        ],
    )
    call = _calls.get(alike)
    if call is None:
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        call = _calls[alike] = Call(remembers=True)
    return call
