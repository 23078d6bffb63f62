"""Peak memory and time of one training step of a model on one thread, in a process of its own.

``python -m benchmarks.model_memory classifier torch 4096`` prints, as JSON, the bytes that the step
needed at its peak beyond what the process held before it, and its seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

from benchmarks.memory import RESET_PEAK, _status_bytes

#: What "the longest sequence that fits" has to fit in.
LIMIT = 256 * 2**20
#: Each twice the one before, tried in this order.
LENGTHS = (512, 1024, 2048, 4096, 8192)
#: At this length every implementation is measured, whether it fits or not.
COMPARED = 1024


@dataclass(frozen=True)
class Step:
    """What one step took: bytes at its peak over those before, and seconds (of this one call)."""

    bytes: int
    seconds: float


def measure_step(kind: str, implementation: str, length: int) -> Step:
    """The model's or the additive attention's step at this length, in this process."""
    import torch

    from benchmarks.models import AdditiveWorkload, ModelInputs, ModelWorkload

    def step(n: int):
        if kind == "additive":
            return AdditiveWorkload(1, n, n, 64).make().call(implementation)
        workload = ModelWorkload(kind, 1, n, embed_dim=128)
        return ModelInputs(workload, (implementation,)).call(implementation)

    torch.set_num_threads(1)
    step(64)()  # loads code; its memory is no part of the step
    call = step(length)
    RESET_PEAK.write_text("5")  # the high-water mark becomes the present size (proc(5))
    before = _status_bytes("VmRSS")
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return Step(_status_bytes("VmHWM") - before, round(seconds, 4))


def step_in_child(kind: str, implementation: str, length: int) -> Step:
    """The same in a fresh process, forked from one that has loaded everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.models"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_and_send, args=(sender, kind, implementation, length))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        what = f"{kind} with {implementation} attention at length {length}"
        raise RuntimeError(f"{what} ended with exit status {child.exitcode}") from None


def _measure_and_send(sender: Connection, kind: str, implementation: str, length: int) -> None:
    sender.send(measure_step(kind, implementation, length))


def steps_until_limit(kind: str, implementation: str) -> dict[int, Step]:
    """The steps at LENGTHS, up to the longest that fits in LIMIT, and at least up to COMPARED.

    A step needs memory for every token at the least, so where one needs over half of LIMIT, that of twice
    the length is known not to fit.
    """
    steps: dict[int, Step] = {}
    for length in LENGTHS:
        steps[length] = step_in_child(kind, implementation, length)
        if length >= COMPARED and steps[length].bytes > LIMIT / 2:
            break
    return steps


def longest(steps: dict[int, Step]) -> int:
    """The longest length whose step fits in LIMIT; 0 if none does."""
    return max((length for length, step in steps.items() if step.bytes <= LIMIT), default=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("transformer", "classifier", "additive"))
    parser.add_argument("implementation", choices=("naive", "torch", "fastattn"))
    parser.add_argument("length", type=int)
    given = parser.parse_args()
    print(json.dumps(asdict(measure_step(given.kind, given.implementation, given.length))))
