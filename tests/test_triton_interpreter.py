"""TRITON_INTERPRET=1 as a user sets it: the package mends the interpreter by itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fastattn.backends import triton as backend
from fastattn.cli import check
from fastattn.kernels import interpreter
from fastattn.testing import CASES, SMOKE_CASES

CALLS = """
import torch, fastattn
from fastattn.additive import additive_attention
from fastattn.backends import additive_cpu

assert "backend: triton" in str(fastattn.explain(*torch.zeros(3, 1, 1, 4, 8), backend="triton"))
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
    inputs = torch.randn(3, 1, 2, 40, 16).to(dtype).unbind()
    exact, found = ([tensor.detach().to(t).requires_grad_() for tensor in inputs] for t in (torch.float64, dtype))
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True)
    out = fastattn.scaled_dot_product_attention(*found, is_causal=True, backend="triton")
    expected = expected, *torch.autograd.grad(expected.square().sum(), exact)
    out = out, *torch.autograd.grad(out.double().square().sum(), found)
    for got, want in zip(out, expected, strict=True):
        assert (got.double() - want).abs().max() < tolerance * max(1.0, want.abs().max())

additive_cpu.reasons = lambda *arguments: ["the kernels are wanted here"]
query, key, value, weight = (torch.randn(shape, requires_grad=True) for shape in ((1, 9, 4), (1, 17, 4), (1, 17, 3), 4))
out = additive_attention(query, key, value, weight)
exact = (torch.tanh(query[:, :, None] + key[:, None]) @ weight).softmax(-1) @ value
torch.testing.assert_close(out, exact)
for got, want in zip(*(torch.autograd.grad(x.sum(), (query, key, value, weight)) for x in (out, exact)), strict=True):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
"""


def interpreted(arguments: list[str], folder) -> None:
    """Run Python on the arguments, in a folder without this checkout."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_calls_and_their_gradients(tmp_path):
    interpreted(["-c", CALLS], tmp_path)


def test_the_check_command(tmp_path):
    arguments = ["--backend", "triton", "--match", "window_causal", "--dtype", "bfloat16"]
    interpreted(["-m", "fastattn", "check", *arguments], tmp_path)


def test_the_check_command_takes_few_cases_where_kernels_are_interpreted(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    assert check.cases_for("triton", cpu, "") == list(SMOKE_CASES)
    assert [case.name for case in check.cases_for("triton", cpu, "decode_lower")] == ["decode_lower_right"]
    assert check.cases_for("cpu", cpu, "") == list(CASES)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    assert check.cases_for("triton", cpu, "") == list(CASES)


def test_only_what_is_wrong_is_mended():
    interpreter.mend()
    mended = dict(vars(interpreter.InterpreterBuilder))
    assert all(works() for works in interpreter.REPAIRS)
    interpreter.mend()
    assert dict(vars(interpreter.InterpreterBuilder)) == mended


def test_bfloat16_rounds_as_torch_does():
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    found = interpreter.float32_to_bfloat16(values.numpy())
    expected = values.bfloat16()
    assert torch.equal(torch.from_numpy(found).view(torch.bfloat16).isnan(), values.isnan())
    real = ~values.isnan()
    assert torch.equal(torch.from_numpy(found).view(torch.int16)[real], expected.view(torch.int16)[real])
    assert torch.equal(
        torch.from_numpy(interpreter.bfloat16_to_float32(found))[real].view(torch.int32),
        expected.float()[real].view(torch.int32),
    )
