"""A remembered launch is the very one that Triton would make, with the same arguments, on the stand-in device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import stub_device

triton = stub_device.needed()

from benchmarks.gpu import stub  # noqa: E402
from fastattn.kernels import remembered  # noqa: E402
from fastattn.problem import Problem  # noqa: E402
from tests.remembered_launches import CALLS  # noqa: E402

ROOT = Path(__file__).parents[1]


def run(library: Path, **environment: str) -> dict[str, dict]:
    command = [sys.executable, "-m", "tests.remembered_launches", str(library)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return {result["name"]: result for result in map(json.loads, finished.stdout.splitlines())}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    return run(stub.build(tmp_path_factory.mktemp("libcuda")))


@pytest.mark.parametrize("name", CALLS)
def test_the_same_reaches_the_launcher(results, name):
    """Kernel, grid, stream and every argument, and from the third time on nobody looks for the kernel."""
    result = results[name]
    assert not result["differs"]
    number = result["launches"]
    assert number == len(result["kernels"]) > 0
    assert result["searches"] == [number, number, 0, number]


def test_calls_that_differ_in_little_have_kernels_of_their_own(results):
    """What differs is what Triton specialises on: divisibility by 16, ones, addresses, types, what is absent."""
    alike = {"aligned to 8": "misaligned", "transposed": "plain"}  # for Triton; the ordinary way for them is compared
    names = [name for name, (call, _) in CALLS.items() if call.__name__ == "plain" and name not in alike]
    kernels = [results[name]["kernels"][-1] for name in names]
    assert len(set(kernels)) == len(names) > 8
    assert all(results[one]["kernels"] == results[other]["kernels"] for one, other in alike.items())


ASKED = "hooked", "debug", "before the run", "replaced", "misplaced", "unknown Triton", "known since debugging"


@pytest.mark.parametrize("circumstance", [*ASKED, "known", "after all"])
def test_triton_is_asked_where_more_than_the_call_decides(results, circumstance):
    """While hooks are set, Triton compiles otherwise, or a result lies elsewhere; then it is remembered as before."""
    found = results["what keeps from it"]
    assert found[circumstance] == (circumstance in ASKED)
    assert found["names"] == ["attention_forward", "attention_forward", "before"]
    assert "calls a launcher in another way" in found["why"]


def test_the_stream_is_that_of_the_call(results):
    found = results["other places"]
    assert (found["streams"], found["searches"], found["elsewhere"]) == ([7], 0, 1)


def test_no_tensor_is_kept_and_memory_is_bounded(results):
    assert results["memory"]["alive"] == 0
    assert results["memory"]["kept"] <= 2


def test_threads_do_not_mix_their_tensors(results):
    assert results["threads"] == {"name": "threads", "launches": 400, "mixed": 0}


@pytest.mark.parametrize("name", ["hopper", "plain", "decode"])
def test_a_remembered_call_does_little(results, name):
    """Functions entered, of Python and of C: some 85 instead of 270 to 490."""
    found = results["work"]
    assert found[f"{name}, remembered"] <= 100 < 250 < found[f"{name}, ordinary"]


class OnDevice(SimpleNamespace):
    """As much of a CUDA tensor as tells calls apart."""

    is_cuda, dtype, shape = True, torch.bfloat16, torch.Size((1, 2, 3, 16))

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, ...]:
        return 96, 48, 16, 1


def remembered_call(index: int = 0, address: int = 1024, options=(), **ingredients):
    tensor = OnDevice(index=index, address=address)
    problem = Problem(tensor, tensor, tensor, **{"scale": 1.0} | ingredients)
    return remembered.remembered(test_calls_are_told_apart, problem, (tensor,), *options)


def test_calls_are_told_apart(monkeypatch):
    """By their device, alignment, ingredients and options, and the type of a scale that is 1."""
    monkeypatch.setattr(remembered, "_calls", {})
    calls = [
        remembered_call(),
        remembered_call(index=1),
        remembered_call(address=1028),
        remembered_call(scale=1),
        remembered_call(scale=0.5),
        remembered_call(causal="upper_left"),
        remembered_call(window_left=1),
        remembered_call(window_right=1),
        remembered_call(dropout_p=0.5),
        remembered_call(key_lengths=OnDevice(address=0)),
        remembered_call(attn_mask=OnDevice(address=0)),
        remembered_call(bias=OnDevice(address=0)),
        remembered_call(options=("other",)),
    ]
    assert len({id(call) for call in calls}) == len(remembered._calls) == len(calls)
    assert remembered_call(address=2048) is calls[0]
    remembered.forget()
    assert remembered_call() is not calls[0]


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(remembered, "_calls", {})
    monkeypatch.setenv("FASTATTN_REMEMBERED_LAUNCHES", "0")
    remembered.reason.cache_clear()
    try:
        assert not remembered_call().remembers and not remembered._calls
    finally:
        monkeypatch.undo()
        remembered.reason.cache_clear()
    assert remembered.reason() is None


def test_the_interpreter_and_offline_compilation_remember_nothing(monkeypatch):
    """Theirs are CPU tensors."""
    monkeypatch.setattr(remembered, "_calls", {})
    tensor = torch.empty(1, 2, 3, 16)
    assert not remembered.remembered(run, Problem(tensor, tensor, tensor, 1.0), (None,)).remembers
    assert not remembered._calls
