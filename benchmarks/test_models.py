"""Peak memory and time of training steps up to the longest sequence that fits: ``--part=models``.

The steps' times beside their peers' are entries of the suite (``benchmarks/suite.py``) in the same part.
"""

from __future__ import annotations

import pytest

from benchmarks.model_memory import longest, steps_until_limit

CASES = [(model, name) for model in ("transformer", "classifier") for name in ("naive", "torch", "fastattn")]
CASES += [("additive", "naive"), ("additive", "fastattn")]


@pytest.fixture(autouse=True)
def only_in_the_models_part(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--part") != "models":
        pytest.skip("measured with --part=models")


@pytest.mark.parametrize(("model", "implementation"), CASES)
def test_longest_that_fits(model: str, implementation: str, benchmark) -> None:
    benchmark.group = f"memory of a {model} step"
    steps = benchmark.pedantic(steps_until_limit, args=(model, implementation))
    benchmark.extra_info.update(
        model=model,
        implementation=implementation,
        peaks={length: step.bytes for length, step in steps.items()},
        seconds={length: step.seconds for length, step in steps.items()},
        longest=longest(steps),
    )
