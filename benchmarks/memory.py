"""Peak memory of one forward and backward pass, in a process of its own.

``python -m benchmarks.memory torch 4096`` prints, as JSON, the bytes that the pass needed at its peak
beyond what the process held before it: the output and gradients and all that lies between.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")

#: (batch, heads, head_dim) of the memory measurements.
SIZES = (1, 8, 64)


def _status_bytes(field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)[1]) * 1024


def peak_of_pass(implementation: str, length: int) -> int:
    """Bytes at the peak of forward and backward over those before, in this process."""
    from benchmarks.workloads import Workload

    batch, heads, head_dim = SIZES
    # The first call loads code and starts threads; its memory is no part of the pass.
    Workload(batch, heads, 64, head_dim, backward=True).make().call(implementation)()
    call = Workload(batch, heads, length, head_dim, backward=True).make().call(implementation)
    RESET_PEAK.write_text("5")  # the high-water mark becomes the present size (proc(5))
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def peak_in_child(implementation: str, length: int) -> int:
    """The same, in a fresh process.

    Raises MemoryError when the process was killed, as the system does when memory runs out.
    """
    command = [sys.executable, "-m", "benchmarks.memory", implementation, str(length)]
    root = Path(__file__).parents[1]
    child = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ)
    if child.returncode < 0:
        raise MemoryError(f"{implementation} at length {length} was killed by signal {-child.returncode}")
    if child.returncode:
        raise RuntimeError(child.stderr.strip() or f"exit status {child.returncode}")
    return json.loads(child.stdout)["bytes"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("implementation", choices=("naive", "torch", "fastattn"))
    parser.add_argument("length", type=int)
    given = parser.parse_args()
    print(json.dumps({"bytes": peak_of_pass(given.implementation, given.length)}))
