"""Calls on a device that is not there, each launched the ordinary way and as it is remembered.

    python -m tests.remembered_launches LIBRARY

One JSON line per call of CALLS, and one per check of CHECKS.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import weakref
from pathlib import Path
from unittest import mock

import torch

from benchmarks.gpu import stub
from benchmarks.gpu.environment import use_checkout

use_checkout()

from fastattn.testing import Case  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Made:
    """The tensors of one call: a problem's, its results, and what its backward takes and gives."""

    def __init__(self, dtype: torch.dtype, offset: int = 0, **sizes):
        case = Case("remembered", **{"batch": 1, "heads": 2, "queries": 33, "head_dim": 16} | sizes)
        self.problem = case.make("cpu", dtype)
        if offset:
            self.problem = self.problem._replace(
                **{name: self.moved(getattr(self.problem, name), offset) for name in ("query", "key", "value")}
            )
        query, value = self.problem.query, self.problem.value
        self.out = query.new_empty(*query.shape[:3], value.shape[3])
        self.lse, self.grad_out = query.new_empty(query.shape[:3], dtype=FP32), torch.empty_like(self.out)
        self.gradients = [torch.empty_like(tensor) for tensor in self.problem[:3]]

    @staticmethod
    def moved(tensor: torch.Tensor, offset: int) -> torch.Tensor:
        """The same, ``offset`` elements behind a multiple of 64 bytes."""
        space = tensor.new_empty(tensor.numel() + offset)[offset:]
        return space.view(tensor.shape).copy_(tensor)

    def given(self) -> dict[int, str]:
        """The names of these tensors, by where their memory begins."""
        named = {name: of for name, of in self.problem._asdict().items() if isinstance(of, torch.Tensor)}
        named |= {"out": self.out, "lse": self.lse, "grad_out": self.grad_out}
        named |= {f"gradient {number}": of for number, of in enumerate(self.gradients)}
        return {tensor.untyped_storage().data_ptr(): name for name, tensor in named.items()}


def tiles():
    from fastattn.kernels.configs import Config

    return Config(16, 16, num_warps=1, num_stages=2, tma=True)


def plain(made: Made) -> None:
    from fastattn.kernels.launch import forward

    forward(made.problem, made.out, made.lse, tiles())


def decode(made: Made) -> None:
    from fastattn.kernels.launch import forward

    forward(made.problem, made.out, made.lse)


def backward(made: Made) -> None:
    from fastattn.kernels.launch import backward

    backward(made.problem, made.out, made.lse, made.grad_out, None, *made.gradients, None, tiles(), tiles())


def hopper_forward(made: Made) -> None:
    from fastattn.kernels.hopper.launch import forward

    forward(made.problem, made.out, made.lse)


def hopper(made: Made) -> None:
    from fastattn.kernels.hopper.launch_backward import backward

    hopper_forward(made)
    backward(made.problem, made.out, made.lse, made.grad_out, None, *made.gradients)


HOPPER = {"dtype": BF16, "queries": 200}
#: By name: what is called, and for which tensors. Some differ only in what Triton specialises on.
CALLS = {
    "plain": (plain, {"dtype": BF16}),
    "sixteens": (plain, {"dtype": BF16, "queries": 32}),
    "ones": (plain, {"dtype": BF16, "queries": 1, "heads": 1, "keys": 16}),
    "one key": (plain, {"dtype": BF16, "keys": 1}),
    "misaligned": (plain, {"dtype": BF16, "offset": 1}),
    "aligned to 8": (plain, {"dtype": BF16, "offset": 4}),
    "transposed": (plain, {"dtype": BF16, "layout": "transposed"}),
    "fp16": (plain, {"dtype": FP16}),
    "window, causal": (plain, {"dtype": BF16, "causal": "upper_left", "window": (16, None)}),
    "dropout": (plain, {"dtype": BF16, "dropout_p": 0.25}),
    "mask, bias, lengths": (plain, {"dtype": BF16, "mask": "keys", "bias": "shared", "key_lengths": (20,)}),
    "backward": (backward, {"dtype": BF16}),
    "decode": (decode, {"dtype": BF16, "heads": 4, "kv_heads": 2, "queries": 1, "keys": 1024, "head_dim": 32}),
    "hopper": (hopper, HOPPER | {"head_dim": 128, "causal": "lower_right", "layout": "transposed"}),
    "unseen keys": (hopper, HOPPER | {"head_dim": 64, "heads": 4, "kv_heads": 2, "window": (70, 3), "keys": 300}),
}


class Recorder:
    """All that reaches Triton's launchers, and how often Triton looked for a kernel on the way."""

    def __init__(self, library):
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.runtime import jit

        self.library, self.launches, self.searches = library, [], 0
        launch, search = CudaLauncher.__call__, jit.compute_cache_key

        def recorded(launcher, *arguments):
            self.launches.append(arguments)
            return launch(launcher, *arguments)

        def counted(*arguments):
            self.searches += 1
            return search(*arguments)

        CudaLauncher.__call__ = recorded
        jit.compute_cache_key = counted

    def of(self, call, made: Made) -> dict:
        """What a call launches, with names for addresses."""
        self.launches.clear()
        self.searches = 0
        before = self.library.stub_launches(), self.library.stub_tensor_maps()
        call(made)
        given = made.given()
        found = {
            "grids": [arguments[:3] for arguments in self.launches],
            "streams": [arguments[3] for arguments in self.launches],
            "kernels": [arguments[4] for arguments in self.launches],
            "metadata": [arguments[5] for arguments in self.launches],
            "arguments": [[told(value, given) for value in arguments[9:]] for arguments in self.launches],
            "counted": (self.library.stub_launches() - before[0], self.library.stub_tensor_maps() - before[1]),
        }
        return found | {"searches": self.searches}


def told(value, given: dict[int, str]):
    """An argument without what differs from call to call: whose memory it is, and where in it."""
    if isinstance(value, torch.Tensor):
        start, address = value.untyped_storage().data_ptr(), value.data_ptr()
        return [given.get(start, "made"), address - start, address % 16]
    if isinstance(value, tuple):
        return [told(each, given) for each in value]
    if hasattr(value, "base"):
        parts = (value.shape, value.strides, value.block_shape, getattr(value, "layout", None), value.padding)
        return [told(value.base, given), *map(repr, parts)]
    return repr(value)


def compared(recorder: Recorder, call, sizes: dict) -> dict:
    """How a call's first launches, remembered and ordinary ones differ: names of what does."""
    from fastattn.kernels import remembered

    first = recorder.of(call, Made(**sizes))
    second = recorder.of(call, Made(**sizes))
    made = Made(**sizes)
    again = recorder.of(call, made)
    with mock.patch.object(remembered, "cpu_stands_for_device", False):
        ordinary = recorder.of(call, made)
    searches = [each.pop("searches") for each in (first, second, again, ordinary)]
    return {
        "differs": [name for name in ordinary if not first[name] == second[name] == again[name] == ordinary[name]],
        "launches": len(ordinary["kernels"]),
        "kernels": ordinary["kernels"],
        "searches": searches,
    }


PLAIN = CALLS["plain"][1]


def searches(recorder: Recorder, made: Made | None = None) -> int:
    return recorder.of(plain, made or Made(**PLAIN))["searches"]


def check_what_keeps_from_it(recorder: Recorder) -> dict:
    """How often Triton looked for a kernel in a call that is known, under each circumstance."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from fastattn.kernels import launch, remembered

    names, found = [], {"known": searches(recorder)}
    for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        note = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
        hook.add(note)
        found["hooked"] = searches(recorder)
        hook.remove(note)
    found["names"] = names
    with mock.patch.object(knobs.runtime, "debug", True):
        found["debug"] = searches(recorder)
        for _ in range(2):
            searches(recorder, Made(**PLAIN | {"queries": 34}))
    found["known since debugging"] = searches(recorder, Made(**PLAIN | {"queries": 34}))
    hook = lambda *arguments, **named: names.append("before")  # noqa: E731
    launch.attention_forward.pre_run_hooks.append(hook)
    found["before the run"] = searches(recorder)
    launch.attention_forward.pre_run_hooks.clear()
    run = JITFunction.run
    with mock.patch.object(JITFunction, "run", lambda *arguments, **named: run(*arguments, **named)):
        found["replaced"] = searches(recorder)
    misplaced = Made(**PLAIN)
    misplaced = misplaced.problem, misplaced.out, Made.moved(misplaced.lse, 1)
    found["misplaced"] = recorder.of(lambda made: launch.forward(*misplaced, tiles()), Made(**PLAIN))["searches"]
    remembered.reason.cache_clear()
    with mock.patch.object(remembered, "CONVENTION", "unheard of"):
        found["unknown Triton"], found["why"] = searches(recorder), remembered.reason()
    remembered.reason.cache_clear()
    return found | {"after all": searches(recorder)}


def check_other_places(recorder: Recorder) -> dict:
    """The stream of a remembered launch is the one of its own call; those of other drivers are not taken."""
    from triton.runtime import driver

    active = driver.active
    with mock.patch.object(active, "get_current_stream", lambda device: 7):
        on_stream = recorder.of(plain, Made(**PLAIN))
    with mock.patch.object(driver, "_active", type(active)()):
        elsewhere = searches(recorder)
    return {"streams": on_stream["streams"], "searches": on_stream["searches"], "elsewhere": elsewhere}


def check_memory(recorder: Recorder) -> dict:
    """Whether tensors outlive their calls, and how many calls are remembered of many."""
    from fastattn.kernels import remembered

    made = Made(**PLAIN)
    for _ in range(3):
        plain(made)
    tensors = [weakref.ref(tensor) for tensor in (*made.problem[:3], made.out, made.lse)]
    recorder.launches.clear()
    del made
    gc.collect()
    with mock.patch.object(remembered, "MOST_CALLS", 2):
        for queries in (33, 34, 35, 36):
            plain(Made(**PLAIN | {"queries": queries}))
            kept = len(remembered._calls)
    return {"alive": sum(tensor() is not None for tensor in tensors), "kept": kept}


def check_threads(recorder: Recorder) -> dict:
    """Of launches from several threads at a time, how many took other tensors than their own call's."""
    mixed = []
    recorder.launches.clear()

    def many(made: Made) -> None:
        for _ in range(100):
            plain(made)

    made = [Made(**PLAIN | {"queries": queries}) for queries in (33, 33, 34, 34)]
    threads = [threading.Thread(target=many, args=(each,)) for each in made]
    previous = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(previous)
    owners = {tensor.data_ptr(): n for n, each in enumerate(made) for tensor in (*each.problem[:3], each.out, each.lse)}
    for arguments in recorder.launches:
        tensors = [value[0] if isinstance(value, tuple) else getattr(value, "base", value) for value in arguments[9:]]
        owner = {owners[tensor.data_ptr()] for tensor in tensors if isinstance(tensor, torch.Tensor)}
        mixed += [owner] if len(owner) != 1 else []
    return {"launches": len(recorder.launches), "mixed": len(mixed)}


def check_work(recorder: Recorder) -> dict:
    """How many functions, of Python and of C, a known call enters, remembered and not."""
    from fastattn.kernels import remembered

    entered = 0

    def count(frame, event: str, argument) -> None:
        nonlocal entered
        entered += event in ("call", "c_call")

    found = {}
    for name, call in {"hopper": hopper_forward, "plain": plain, "decode": decode}.items():
        made = Made(**CALLS[name][1])
        for way in ("remembered", "ordinary"):
            with mock.patch.object(remembered, "cpu_stands_for_device", way == "remembered"):
                call(made)
                call(made)
                entered = 0
                sys.setprofile(count)
                call(made)
                sys.setprofile(None)
            found[f"{name}, {way}"] = entered
    return found


CHECKS = {
    "what keeps from it": check_what_keeps_from_it,
    "other places": check_other_places,
    "memory": check_memory,
    "threads": check_threads,
    "work": check_work,
}


def main(place: str) -> None:
    recorder = Recorder(stub.activate(Path(place)))
    torch.set_num_threads(1)
    for name, (call, sizes) in CALLS.items():
        print(json.dumps({"name": name, **compared(recorder, call, sizes)}), flush=True)
    for name, check in CHECKS.items():
        print(json.dumps({"name": name, **check(recorder)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
