"""The pytest-benchmark suite: ``python -m pytest benchmarks --part="one thread"``.

pytest-benchmark times fastattn. Between two of its rounds every peer runs once, timed in the same
way, and so does the probe of the machine's ceiling; what they say is in each benchmark's
``extra_info`` and in the tables of ``make bench``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import machine
from benchmarks.measure import Turns
from benchmarks.peers import LeftOutError
from benchmarks.suite import Entry
from benchmarks.workloads import Inputs


def at_one_thread(call: Callable[[], object], threads: int) -> Callable[[], object]:
    def run() -> None:
        torch.set_num_threads(1)
        call()
        torch.set_num_threads(threads)

    return run


@pytest.fixture
def seconds_scale(request: pytest.FixtureRequest) -> float:
    return request.config.getoption("--seconds-scale")


def test_entry(entry: Entry, benchmark, seconds_scale: float) -> None:
    inputs = entry.workload.make()
    threads = torch.get_num_threads()
    call = inputs.call("fastattn")
    peers, left_out = {}, {}
    for name in entry.peers:
        try:
            peers[name] = inputs.call(name)
        except LeftOutError as reason:
            left_out[name] = str(reason)
    if isinstance(inputs, Inputs):
        inputs.check(peers)
    else:
        inputs.check()
    for name, workload in entry.beside.items():
        peers[name] = workload.make().call("fastattn")
    if threads > 1:
        peers["one thread"] = at_one_thread(call, threads)

    if entry.ceiling == "read":
        work, ceiling = entry.workload.key_value_bytes, machine.read_rate
    else:
        work = entry.workload.flops
        ceiling = machine.fma_probe(entry.workload.dtype)
    turns = Turns(call, peers, ceiling, entry.seconds * seconds_scale)
    benchmark.group = entry.group
    benchmark.pedantic(turns.run_call, setup=turns.run_peers, rounds=turns.rounds)
    measured = turns.summary(benchmark.stats.stats.data, work) | {
        "workload": str(entry.workload),
        "fields": entry.workload.fields(),
        "flops": entry.workload.flops,
        "beside_flops": {name: workload.flops for name, workload in entry.beside.items()},
        "left_out": left_out,
    }
    measured["targets"] = [target.judge(measured, machine.isa()) for target in entry.targets]
    benchmark.extra_info.update(measured)
