"""Peak memory of forward and backward by sequence length: ``python -m pytest benchmarks --part=memory``.

The benchmark's time is that of a whole process; what counts is ``extra_info["bytes"]``.
"""

from __future__ import annotations

import pytest

from benchmarks.memory import peak_in_child
from benchmarks.suite import MEMORY_LENGTHS


@pytest.fixture(autouse=True)
def only_in_the_memory_part(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--part") != "memory":
        pytest.skip("measured with --part=memory")


@pytest.mark.parametrize("length", MEMORY_LENGTHS)
@pytest.mark.parametrize("implementation", ("naive", "torch", "fastattn"))
def test_peak_memory(implementation: str, length: int, benchmark) -> None:
    benchmark.group = f"memory at length {length}"
    peak = benchmark.pedantic(peak_in_child, args=(implementation, length))
    benchmark.extra_info.update(implementation=implementation, length=length, bytes=peak)
