"""The random cases: what a seed names, and that a wrong result is found."""

from __future__ import annotations

import pytest
import torch

from fastattn.backends import cpu
from fuzz.__main__ import run
from fuzz.cases import AdditiveCase, random_case

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)


def test_a_seed_names_one_case():
    for seed in range(40):
        first, second = random_case(seed), random_case(seed)
        assert first == second
        if not isinstance(first, AdditiveCase):
            for one, other in zip(first.make().problem, second.make().problem, strict=True):
                assert torch.equal(one.nan_to_num(), other.nan_to_num()) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize("wrong", ("out", "lse"))
def test_a_wrong_result_is_a_miss_with_its_seed(wrong, monkeypatch, capsys):
    isa, forward = cpu.isa(), cpu.forward
    assert run(range(1, 4), [isa], False) == 0
    assert "3 cases from seed 1" in capsys.readouterr().out

    def slightly_wrong(problem, out, lse, **residual):
        forward(problem, out, lse, **residual)
        (out if wrong == "out" else lse).mul_(1.01)

    monkeypatch.setattr(cpu, "forward", slightly_wrong)
    assert run(range(1, 4), [isa], False) == 1
    printed = capsys.readouterr().out
    assert "miss: seed" in printed and f"{isa} {wrong}: error" in printed
