"""One part of the suite per process, so that its threads and instruction set hold from the first import."""

from __future__ import annotations

import os

import pytest

PART_NAMES = ("one thread", "avx2", "two threads", "memory", "models")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default=PART_NAMES[0], choices=PART_NAMES, help="which part of the suite to run")
    parser.addoption("--seconds-scale", default=1.0, type=float, help="factor on the time spent on each measurement")


def pytest_configure(config: pytest.Config) -> None:
    """Bind threads and choose the instruction set before torch, and with it the OpenMP runtime, is loaded."""
    part = config.getoption("--part")
    threads = 2 if part in ("two threads", "memory", "models") else 1
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["OMP_PROC_BIND"] = "true"
    if part == "avx2":
        os.environ["FASTATTN_CPU_ISA"] = "avx2"
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        from benchmarks.suite import entries_of

        part = metafunc.config.getoption("--part")
        metafunc.parametrize("entry", entries_of(part), ids=str)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Put the ceilings and the description that the part's figures belong to beside them."""
    from benchmarks import machine

    part = config.getoption("--part")
    output_json["fastattn"] = machine.description() | {
        "part": part,
        "isa": machine.isa(),
        "ceilings": {} if part == "memory" else machine.ceilings(),
    }
