"""How the benchmark finds the longest sequence that fits: steps of known memory in place of measured ones."""

import pytest

from benchmarks import model_memory
from benchmarks.model_memory import LENGTHS, LIMIT, Step, steps_until_limit


@pytest.mark.parametrize(
    ("bytes_at", "longest", "last_tried"),
    [
        (lambda n: LIMIT, 1024, 1024),  # it just fits; twice the length cannot
        (lambda n: LIMIT // 2 * n // 4096, 8192, 8192),
        (lambda n: LIMIT // 3 * n // 4096, 8192, 8192),  # over half: nothing longer is tried
        (lambda n: LIMIT // 5 * (n // 2048) ** 2, 4096, 4096),
        (lambda n: LIMIT // 9 * (n // 2048) ** 2, 4096, 8192),  # a square may pass the limit in one doubling
        (lambda n: 3 * LIMIT, 0, 1024),
        (lambda n: 1, LENGTHS[-1], LENGTHS[-1]),
    ],
)
def test_longest_that_fits(monkeypatch, bytes_at, longest, last_tried):
    tried = []

    def step(kind, implementation, length):
        tried.append(length)
        if bytes_at(length) > 2 * LIMIT:
            raise MemoryError
        return Step(bytes_at(length), 1.0)

    monkeypatch.setattr(model_memory, "step_in_child", step)
    steps = steps_until_limit("classifier", "naive")
    assert max(steps, default=0) == longest
    assert tried[-1] == last_tried and all(step.bytes <= LIMIT for step in steps.values())
