"""Peak memory of one training step of a model, in a process of its own.

``python -m benchmarks.model_memory classifier torch 4096`` prints, as JSON, the bytes that the step
needed at its peak beyond what the process held before it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.memory import RESET_PEAK, _status_bytes

#: What "the longest sequence that fits" has to fit in.
LIMIT = 2 * 2**30
#: Tried in this order until one does not fit.
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def peak_of_step(kind: str, implementation: str, length: int) -> int:
    """Bytes at the peak of the model's or the additive attention's step over those before, in this process."""
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
    call()
    return _status_bytes("VmHWM") - before


def peak_in_child(kind: str, implementation: str, length: int) -> int:
    """The same in a fresh process, which may hold 4 GiB; MemoryError where that is not enough."""
    command = [sys.executable, "-m", "benchmarks.model_memory", kind, implementation, str(length)]
    root = Path(__file__).parents[1]
    child = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ)
    if child.returncode < 0 or "not enough memory" in child.stderr or "MemoryError" in child.stderr:
        raise MemoryError(f"{kind} with {implementation} attention at length {length} needs over 4 GiB")
    if child.returncode:
        raise RuntimeError(child.stderr.strip() or f"exit status {child.returncode}")
    return json.loads(child.stdout)["bytes"]


def peaks_until_limit(kind: str, implementation: str) -> dict[int, int | None]:
    """Bytes at each of LENGTHS, up to the first that passes LIMIT (None where even 4 GiB did not do)."""
    peaks: dict[int, int | None] = {}
    for length in LENGTHS:
        try:
            peaks[length] = peak_in_child(kind, implementation, length)
        except MemoryError:
            peaks[length] = None
        if peaks[length] is None or peaks[length] > LIMIT:
            break
    return peaks


def longest_that_fits(peaks: dict[int, int | None]) -> int:
    return max((length for length, peak in peaks.items() if peak is not None and peak <= LIMIT), default=0)


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
    print(json.dumps({"bytes": peak_of_step(given.kind, given.implementation, given.length)}))
