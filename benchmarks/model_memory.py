"""Peak memory and time of one training step of a model, in a process of its own.

``python -m benchmarks.model_memory classifier torch 4096`` prints, as JSON, the bytes that the step
needed at its peak beyond what the process held before it, and its seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.memory import RESET_PEAK, _status_bytes

#: What "the longest sequence that fits" has to fit in.
LIMIT = 2 * 2**30
#: Each twice the one before, tried in this order until one does not fit.
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True)
class Step:
    """What one step took: bytes at its peak over those before, and seconds (of this one call)."""

    bytes: int
    seconds: float


def measure_step(kind: str, implementation: str, length: int) -> Step:
    """The model's or the additive attention's step at this length, in this process."""
    from benchmarks.models import AdditiveWorkload, ModelInputs, ModelWorkload

    def step(n: int):
        if kind == "additive":
            return AdditiveWorkload(1, n, n, 64).make().call(implementation)
        workload = ModelWorkload(kind, 1, n, embed_dim=128)
        return ModelInputs(workload, (implementation,)).call(implementation)

    step(64)()  # loads code and starts threads; their memory is no part of the step
    call = step(length)
    RESET_PEAK.write_text("5")  # the high-water mark becomes the present size (proc(5))
    before = _status_bytes("VmRSS")
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return Step(_status_bytes("VmHWM") - before, round(seconds, 4))


def step_in_child(kind: str, implementation: str, length: int) -> Step:
    """The same in a fresh process, which may hold 4 GiB; MemoryError where that is not enough."""
    command = [sys.executable, "-m", "benchmarks.model_memory", kind, implementation, str(length)]
    root = Path(__file__).parents[1]
    child = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ)
    if child.returncode < 0 or "not enough memory" in child.stderr or "MemoryError" in child.stderr:
        raise MemoryError(f"{kind} with {implementation} attention at length {length} needs over 4 GiB")
    if child.returncode:
        raise RuntimeError(child.stderr.strip() or f"exit status {child.returncode}")
    return Step(**json.loads(child.stdout))


def steps_until_limit(kind: str, implementation: str) -> dict[int, Step]:
    """The steps at LENGTHS, up to the longest that fits in LIMIT.

    A step needs memory for every token at the least, so where one needs over half of LIMIT, that of twice
    the length, which would take minutes, is known not to fit.
    """
    steps: dict[int, Step] = {}
    for length in LENGTHS:
        try:
            step = step_in_child(kind, implementation, length)
        except MemoryError:
            break
        if step.bytes > LIMIT:
            break
        steps[length] = step
        if step.bytes > LIMIT / 2:
            break
    return steps


if __name__ == "__main__":
    import resource

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("transformer", "classifier", "additive"))
    parser.add_argument("implementation", choices=("naive", "torch", "fastattn"))
    parser.add_argument("length", type=int)
    given = parser.parse_args()
    import torch  # noqa: F401 (what it maps at its import is beside the limit on the step)

    mapped = _status_bytes("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * 2**30, resource.RLIM_INFINITY))
    print(json.dumps(asdict(measure_step(given.kind, given.implementation, given.length))))
