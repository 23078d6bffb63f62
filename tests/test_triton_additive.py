"""The Triton kernels of additive attention, interpreted, against the formula written out in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPARE = """
import sys
import torch
sys.path.insert(0, "tests")
from fastattn import additive
from fastattn.backends import additive_cpu, additive_triton
from test_additive import inputs, lengths_of, naive

additive_cpu.reasons = lambda q, k, v: ["not in this test"]
for size in ((2, 5, 19, 6, 3), (1, 17, 16, 17, 20), (1, 1, 33, 4, 1)):
    for masked in (False, True):
        exact = inputs(size)
        tensors = [t.detach().float().requires_grad_() for t in exact]
        lengths, mask = lengths_of(size) if masked else (None, None)
        if masked:
            tensors[1].data[~mask] = float("nan")
        assert not additive_triton.reasons(*tensors[:3])
        expected = naive(*exact, mask)[0]
        grad = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        actual = additive.additive_attention(*tensors, key_lengths=lengths)
        pairs = [(actual, expected)]
        pairs += zip(
            torch.autograd.grad(actual, tensors, grad.float()), torch.autograd.grad(expected, exact, grad), strict=True
        )
        for got, want in pairs:
            torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)
print("agree")
"""


def test_interpreted_kernels_agree_with_the_formula():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "agree", done.stderr


def test_kernels_compile_for_hopper_without_spills():
    import torch

    from fastattn.kernels import offline
    from fastattn.kernels.additive import launch_backward, launch_forward

    query, key, weight = torch.zeros(2, 64, 64), torch.zeros(2, 128, 64), torch.zeros(64)
    allowed = torch.ones(2, 128, dtype=torch.int8)
    with offline.compiling_for(90) as compiled:
        out, lse = launch_forward(query, key, key, weight, allowed)
        launch_backward(query, key, key, weight, allowed, out, lse, lse)
    assert len(compiled) == 3
    for name, kernel in compiled:
        assert offline.resources(kernel).spill_bytes == 0, name


@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="needs a GPU")
def test_on_a_gpu():
    import torch

    from fastattn.additive import additive_attention
    from fastattn.backends import additive_triton
    from test_additive import inputs, lengths_of, naive

    size = (3, 70, 130, 48, 33)
    exact = inputs(size)
    tensors = [t.detach().float().cuda().requires_grad_() for t in exact]
    lengths, mask = lengths_of(size)
    assert not additive_triton.reasons(*tensors[:3])
    actual, expected = additive_attention(*tensors, key_lengths=lengths.cuda()), naive(*exact, mask)[0]
    torch.testing.assert_close(actual.double().cpu(), expected, atol=1e-5, rtol=1e-4)
    grads = zip(torch.autograd.grad(actual.sum(), tensors), torch.autograd.grad(expected.sum(), exact), strict=True)
    for got, want in grads:
        torch.testing.assert_close(got.double().cpu(), want, atol=1e-4, rtol=1e-3)
