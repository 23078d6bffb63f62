"""Launches each family of kernels on a device that is not there, through Triton's own launchers.

    python -m tests.gpu_launches LIBRARY NAME...

One JSON line per name, of FAMILIES, BROKEN_MAPS or (after "additive", whose kernel they launch) BROKEN_LAUNCHES: with
what words it was refused, and of a family what was launched, how many tensor maps were encoded and kernels compiled.
CHECKS, which are to be the last, compile nothing: of each launch the grid and the tensor maps are looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch

from benchmarks.gpu import stub
from benchmarks.gpu.cache import count_compilations
from benchmarks.gpu.environment import use_checkout

use_checkout()

from fastattn.testing import Case, run_backend  # noqa: E402

BF16 = torch.bfloat16


def case(engine: str, dtype: torch.dtype = BF16, **sizes):
    """Forward and backward of one call by an engine of benchmarks/gpu/problems.py."""

    def run() -> None:
        from benchmarks.gpu.problems import load_engine

        made = Case("launched", **{"batch": 1, "heads": 2, "queries": 200} | sizes)
        grads = made.make_grad_out("cpu", dtype), made.make_grad_lse("cpu", torch.float32)
        run_backend(load_engine(engine), made.make("cpu", dtype), *grads)

    return run


def backward(**switches):
    """The fused backward at D = 128 with switches changed."""

    def run() -> None:
        from fastattn.kernels.hopper import configs, launch_backward

        problem = Case("launched", batch=1, heads=2, queries=200, head_dim=128).make("cpu", BF16)
        config = dataclasses.replace(configs.backward_config(128, False), **switches)
        like = [torch.empty_like(problem.query) for _ in range(5)]
        launch_backward.backward(problem, like[0], like[0][..., 0].float(), like[1], None, *like[2:], config)

    return run


def plain(dtype: torch.dtype, **sizes):
    """All passes of one call by the plain kernels, in tiles that compile fast."""

    def run() -> None:
        from fastattn.kernels import launch
        from fastattn.kernels.configs import Config

        problem = Case("launched", **{"batch": 1, "heads": 2, "queries": 33, "head_dim": 16} | sizes).make("cpu", dtype)
        tiles = Config(16, 16, num_warps=1, num_stages=2, tma=True)
        out, lse, grad_out = torch.empty_like(problem.query), torch.empty(1, 2, 33), torch.empty_like(problem.query)
        gradients = [torch.empty_like(tensor) for tensor in problem[:3]]
        grad_bias = None if problem.bias is None else torch.zeros(1, 1, *problem.bias.shape[2:])
        launch.forward(problem, out, lse, tiles)
        launch.backward(problem, out, lse, grad_out, lse, *gradients, grad_bias, tiles, tiles, tiles)

    return run


def masked(head_dim: int):
    """The forward's own tiles where all that is loaded ahead comes together: a mask, a bias, and loops for a band."""

    def run() -> None:
        from fastattn.kernels.launch import forward

        sizes = {"batch": 1, "heads": 2, "queries": 65, "keys": 130, "head_dim": head_dim}
        made = Case("launched", **sizes, mask="keys", bias="per_head", causal="upper_left", window=(20, None))
        problem = made.make("cpu", BF16)
        forward(problem, torch.empty_like(problem.query), torch.empty(1, 2, 65))

    return run


def decode() -> None:
    from fastattn.kernels.launch import forward

    problem = Case("launched", batch=1, heads=4, kv_heads=2, queries=1, keys=1024, head_dim=32).make("cpu", BF16)
    forward(problem, torch.empty_like(problem.query), torch.empty(1, 4, 1))


def weights() -> None:
    from fastattn.kernels.launch import weights

    problem = Case("launched", batch=1, heads=2, queries=70, head_dim=16).make("cpu", BF16)
    weights(problem, torch.empty(1, 2, 70), torch.empty(1, 70, 70, dtype=BF16), average=True)


def additive() -> None:
    from fastattn.backends.additive_triton import Call

    query, key, value = torch.empty(1, 9, 4), torch.empty(1, 17, 4), torch.empty(1, 17, 3)
    call = Call(query, key, value, torch.empty(4), None)
    out, lse = call.forward()
    call.backward(lse, torch.empty(1, 9), out)


def broadcast() -> None:
    """Keys that all heads share by a stride of zero, which the Hopper kernels' conditions keep from them."""
    from fastattn.kernels.hopper.launch import forward

    problem = Case("launched", batch=1, heads=2, queries=200, head_dim=128, layout="broadcast").make("cpu", BF16)
    forward(problem, torch.empty(problem.query.shape, dtype=BF16), torch.empty(1, 2, 200))


FAMILIES = {
    "hopper_d64": case("hopper", head_dim=64, heads=4, kv_heads=2, window=(70, 3)),
    "hopper_d128": case("hopper", head_dim=128, causal="lower_right", layout="transposed"),
    "hopper_d256": case("hopper", head_dim=256, batch=2, key_lengths=(200, 3)),
    "hopper_unordered": backward(ordered=False),
    "plain": plain(BF16, causal="upper_left"),
    "plain_mask_and_bias": plain(torch.float16, mask="keys", bias="shared"),
    "plain_dropout": plain(BF16, dropout_p=0.1),
    "masked_d64": masked(64),
    "masked_d256": masked(256),
    "decode": decode,
    "weights": weights,
    "additive": additive,
    "broadcast": broadcast,
}

#: What is changed of a good tensor map, by what is wrong with it then.
BROKEN_MAPS = {
    "none": {},
    "address": {"address": 8},
    "no_address": {"address": 0},
    "rank": {"rank": 6},
    "size": {"sizes": (0, 16, 4)},
    "stride": {"strides": (264, 4096)},
    "zero_stride": {"strides": (256, 0)},
    "wide_stride": {"strides": (256, 1 << 40)},
    "box": {"box": (64, 257, 1)},
    "empty_box": {"box": (64, 0, 1)},
    "narrow_box": {"box": (4, 64, 1)},
    "swizzle_128": {"box": (128, 64, 1)},
    "swizzle_64": {"swizzle": 2},
    "element_stride": {"element_strides": (1, 9, 1)},
    "nan_of_integers": {"data_type": 1, "fill": 1},
}

#: What is changed of a launch of the additive forward kernel that is good, by what is wrong with it then.
BROKEN_LAUNCHES = {
    "good": {},
    "no_grid": {"grid": (1, 0, 1)},
    "grid": {"grid": (1, 65536, 1)},
    "threads": {"threads": 1056},
    "registers": {"threads": 1024},
    "shared": {"shared": 48 * 1024 + 1},
    "opt_in": {"allowed": 227 * 1024 + 1},
    "opted_in": {"allowed": 227 * 1024, "shared": 227 * 1024},
}


#: CUtensorMapDataType as Triton's compiler numbers it, before its driver translates it to the host's numbers.
ELEMENT_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 10}
LARGEST_GRID = (2**31 - 1, 65535, 65535)
LARGEST_SIDE = 256  # of a box


def described(descriptor) -> dict:
    """What the compiler tells the launcher of a descriptor: a wide box is fetched in strips as wide as the swizzle."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    from fastattn.kernels.hopper.launch import GLUON_DTYPE

    dtype = descriptor.base.dtype
    layout = getattr(descriptor, "layout", None)
    if layout is None:
        layout = NVMMASharedLayout.get_default_for(descriptor.block_shape, GLUON_DTYPE[dtype])
    strip = layout.swizzle_byte_width // dtype.itemsize or LARGEST_SIDE
    block = [min(side, LARGEST_SIDE) for side in descriptor.block_shape]
    block[-1] = min(block[-1], strip)
    swizzle = {0: 0, 32: 1, 64: 2, 128: 3}[layout.swizzle_byte_width]
    types = {"elem_size": dtype.itemsize, "elem_type": ELEMENT_TYPES[dtype], "fp4_padded": False}
    return {"swizzle": swizzle, "block_size": block} | types


@contextlib.contextmanager
def uncompiled_launches():
    """Within, a launch encodes its tensor maps as the launcher of its kernel would; yields {kernel: launches}."""
    from triton.backends.nvidia.driver import make_tensordesc_arg
    from triton.runtime.jit import JITFunction

    counted, run = Counter(), JITFunction.run

    def launch(self, *arguments, grid, warmup, **named) -> None:
        sides = (*(grid(named) if callable(grid) else grid), 1, 1)[:3]
        if not all(1 <= side <= most for side, most in zip(sides, LARGEST_GRID, strict=True)):
            raise RuntimeError(f"the grid {sides} of {self.fn.__name__} is no grid")
        for argument in (*arguments, *named.values()):
            if hasattr(argument, "block_shape"):
                make_tensordesc_arg(argument, described(argument))
        counted[self.fn.__name__] += 1

    JITFunction.run = launch
    try:
        yield counted
    finally:
        JITFunction.run = run


def check_cases(library: ctypes.CDLL) -> dict:
    """Every task of part check: what is launched for it, which tasks launch nothing, and all that a rule refuses.

    In fp32 the plain kernels load through tensor maps here, although their tiles for it do not ask for that.
    """
    from benchmarks.gpu import check, launches
    from fastattn.kernels import launch

    choose = launch.choose
    counts, refused, idle, maps, kernels = Counter(), [], [], Counter(), Counter()
    for task in check.tasks("cuda", "triton", quick=False):
        before, calls = library.stub_tensor_maps(), 0
        by_tma = {"tma": True} if task.arguments["dtype"] == "fp32" else {}
        launch.choose = lambda *what, by_tma=by_tma: dataclasses.replace(choose(*what), **by_tma)
        with uncompiled_launches() as counted:
            for name, call in launches.calls_of(task):
                calls += 1
                try:
                    call()
                except Exception as error:
                    refused.append(f"{task.key} {name}: {type(error).__name__}: {error}")
        counts["tasks"] += 1
        counts["calls"] += calls
        counts["launches"] += counted.total()
        kernels += counted
        group = f"{task.arguments['dtype']} {task.arguments['engine']}"
        maps[group] += library.stub_tensor_maps() - before
        if not counted:
            idle.append(task.key)
    launch.choose = choose
    return {"counts": counts, "refused": refused, "idle": idle, "maps": maps, "kernels": kernels}


def broken_stride(library: ctypes.CDLL) -> dict:
    """The keys of "broadcast", in a case of the table otherwise."""
    with uncompiled_launches():
        broadcast()
    return {}


def broken_address(library: ctypes.CDLL) -> dict:
    """A descriptor of the Hopper kernels whose tensor then begins two bytes late."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    from fastattn.kernels.hopper.launch import tile_descriptor

    shape = (1, 2, 200, 128)
    descriptor = tile_descriptor(torch.empty(shape, dtype=BF16), 64)
    descriptor.base = torch.empty(math.prod(shape) + 1, dtype=BF16)[1:].view(shape)
    make_tensordesc_arg(descriptor, described(descriptor))
    return {}


def broken_grid(library: ctypes.CDLL) -> dict:
    """No program."""
    from triton.runtime.jit import JITFunction

    with uncompiled_launches():
        JITFunction(described)[(0,)]()
    return {}


CHECKS = {call.__name__: call for call in (check_cases, broken_stride, broken_address, broken_grid)}


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]  # fmt: skip


def launch(library: ctypes.CDLL, function: int, *, grid=(1, 1, 1), threads=128, shared=0, allowed=None) -> str | None:
    """The driver's words on a launch, after ``allowed`` bytes of dynamic shared memory are asked for; None if good."""
    code = 0
    if allowed is not None:
        code = library.cuFuncSetAttribute(ctypes.c_void_p(function), 8, allowed)
    if not code:
        config = LaunchConfig((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(threads, 1, 1), shared, None, None, 0)
        code = library.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), None, None)
    return words(library, code)


def encode(library: ctypes.CDLL, *, rank=3, sizes=(128, 16, 4), strides=(256, 4096), box=(64, 64, 1), swizzle=3,
           address=None, element_strides=(1, 1, 1), data_type=9, fill=0) -> str | None:  # fmt: skip
    """The driver's words on a map of bf16 [4, 16, 128] in boxes of 64 columns, or of what is said otherwise; None if
    it is good."""
    space = torch.empty(256, dtype=torch.uint8)
    target = space.data_ptr() + -space.data_ptr() % 64
    address = target + address if address else (target if address is None else 0)
    arrays = ((ctypes.c_uint64 * 8)(*sizes), (ctypes.c_uint64 * 8)(*strides), (ctypes.c_uint32 * 8)(*box))
    code = library.cuTensorMapEncodeTiled(
        ctypes.c_void_p(target), data_type, rank, ctypes.c_void_p(address), *arrays,
        (ctypes.c_uint32 * 8)(*element_strides), 0, swizzle, 2, fill,
    )  # fmt: skip
    return words(library, code)


def words(library: ctypes.CDLL, code: int) -> str | None:
    text = ctypes.c_char_p()
    library.cuGetErrorString(code, ctypes.byref(text))
    return text.value.decode() if code else None


def main(place: str, names: list[str]) -> None:
    library = stub.activate(Path(place))
    torch.set_num_threads(1)
    from triton import knobs
    from triton.runtime.errors import OutOfResources

    from fastattn import kernels

    launched: list[str] = []
    functions: dict[str, int] = {}

    def note(metadata) -> None:
        launched.append(metadata.get()["name"])

    knobs.runtime.kernel_load_end_hook.add(lambda module, function, name, *_: functions.update({name: function}))
    for name in names:
        result = {"name": name}
        if name in CHECKS:
            stub.without_values()
            try:
                result |= {"refused": None} | CHECKS[name](library)
            except RuntimeError as error:
                result["refused"] = str(error)
        elif name in BROKEN_MAPS:
            result["refused"] = encode(library, **BROKEN_MAPS[name])
        elif name in BROKEN_LAUNCHES:
            result["refused"] = launch(library, functions["additive_forward"], **BROKEN_LAUNCHES[name])
        else:
            launched.clear()
            knobs.runtime.launch_enter_hook.add(note)
            before = library.stub_launches(), library.stub_tensor_maps()
            with count_compilations() as counted:
                try:
                    FAMILIES[name]()
                    result["refused"] = None
                except (RuntimeError, OutOfResources) as error:
                    result["refused"] = str(error)
            result["hits"], result["compiled"] = counted.hits.total(), counted.misses.total()
            result["kernels"] = kernels.__file__
            result["launched"] = list(launched)
            result["launches"] = library.stub_launches() - before[0]
            result["maps"] = library.stub_tensor_maps() - before[1]
            if result["refused"] is None:
                knobs.runtime.launch_enter_hook.remove(note)
                FAMILIES[name]()
                FAMILIES[name]()  # unwatched, and the third of its kind: these launches are remembered ones
                result["again"] = [library.stub_launches() - before[0], library.stub_tensor_maps() - before[1]]
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
