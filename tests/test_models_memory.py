"""The benchmark of the models: its steps agree, and it finds the longest sequence that fits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import model_memory, models
from benchmarks.model_memory import COMPARED, LENGTHS, LIMIT, Step, longest, step_in_child, steps_until_limit
from benchmarks.models import ModelInputs, ModelWorkload
from fastattn.models.detector import DetectorConfig

SMALL = {"embed_dim": 16, "heads": 2, "layers": 1}
WORKLOADS = [
    ModelWorkload("transformer", 2, 20, **SMALL),
    ModelWorkload("classifier", 2, 20, **SMALL),
    ModelWorkload("detector", 2, 25, **SMALL),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_steps_of_all_implementations_agree_and_change_the_model(workload):
    inputs = ModelInputs(workload)
    inputs.check()
    losses = []
    for name, trained in inputs.trained.items():
        before = [parameter.detach().clone() for parameter in trained.model.parameters()]
        inputs.call(name)()
        assert any(not torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))
        losses.append(trained.loss().item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_a_wrong_gradient_is_not_timed(workload, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.05 * grad

    from fastattn.models import attention

    right = attention._ATTEND["fastattn"]
    monkeypatch.setitem(attention._ATTEND, "fastattn", lambda *arguments: Wrong.apply(right(*arguments)))
    with pytest.raises(AssertionError, match="a gradient"):
        ModelInputs(workload).check()


def test_the_detectors_convolutions_are_counted():
    """Against the multiplications of the layers that a forward calls."""
    config = DetectorConfig(embed_dim=32)
    count = 0

    def add(module, inputs, output):
        nonlocal count
        count += module.weight.numel() * output.shape[2] * output.shape[3]

    from fastattn.models.detector import Backbone

    backbone = Backbone(config)
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(add)
    backbone(torch.randn(1, 1, 40, 40), torch.full((1, 2), 40))
    assert models._backbone_weights(32) * 5 * 5 == count


@pytest.mark.parametrize(
    ("bytes_at", "fitting", "last_tried"),
    [
        (lambda n: LIMIT * n // 1024, 1024, 1024),  # it just fits; twice the length cannot
        (lambda n: LIMIT // 2 * n // 2048, 4096, 4096),
        (lambda n: LIMIT // 3 * n // 2048, 4096, 4096),  # over half: nothing longer is tried
        (lambda n: LIMIT // 5 * (n // 512) ** 2, 1024, 1024),
        (lambda n: LIMIT // 9 * (n // 512) ** 2, 1024, 2048),  # a square may pass the limit in one doubling
        (lambda n: 3 * LIMIT, 0, COMPARED),  # for the table, although nothing fits
        (lambda n: 1, LENGTHS[-1], LENGTHS[-1]),
    ],
)
def test_longest_that_fits(monkeypatch, bytes_at, fitting, last_tried):
    monkeypatch.setattr(model_memory, "step_in_child", lambda kind, name, length: Step(bytes_at(length), 1.0))
    steps = steps_until_limit("classifier", "naive")
    assert longest(steps) == fitting
    assert max(steps) == last_tried and COMPARED in steps


def test_a_step_in_a_child_measures_what_the_command_does():
    """The naive form stores a tanh for each query, key and feature, and its gradient: 2 x 4 bytes x 64 x L^2."""
    step = step_in_child("additive", "naive", 256)
    assert step.bytes >= 2 * 4 * 64 * 256**2 and step.seconds > 0
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "benchmarks.model_memory", "additive", "naive", "256"]
    printed = json.loads(subprocess.run(command, cwd=root, capture_output=True, check=True).stdout)
    assert printed["bytes"] == pytest.approx(step.bytes, rel=0.25)


def test_a_child_that_fails_is_an_error_that_says_what_it_measured():
    with pytest.raises(RuntimeError, match="transformer with flash attention at length 128 ended with exit status 1"):
        step_in_child("transformer", "flash", 128)
