"""Every family of GPU kernels through Triton's own launchers and tensor maps, on a libcuda that only keeps rules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import stub_device

triton = stub_device.needed()

from benchmarks.gpu import cache, stub  # noqa: E402
from tests.gpu_launches import BROKEN_LAUNCHES, BROKEN_MAPS, CHECKS  # noqa: E402

ROOT = Path(__file__).parents[1]

#: By family what is launched, and how many tensor maps that takes.
TWO_SWEEPS = ["statistics_kernel", "gradients_of_keys", "gradients_of_queries"]
EXPECTED = {
    "hopper_d64": (["attention_forward", *TWO_SWEEPS], 4 + 8 + 5),
    "hopper_d128": (["attention_forward", "statistics_kernel", "gradients"], 4 + 9),
    "hopper_d256": (["attention_forward", "statistics_kernel", "gradients_of_wide_keys", "gradients_of_queries"], 17),
    "hopper_unordered": (["statistics_kernel", "gradients"], 9),
    "plain": (["attention_forward", "row_statistics", "gradients_of_keys", "gradients_of_queries"], 6),
    "plain_mask_and_bias": (
        ["mark_nonfinite", "attention_forward", "row_statistics", "split_large_lse", "gradients_of_keys"]
        + ["mark_nonfinite", "gradients_of_queries", "gradient_of_bias"],
        6,
    ),
    "plain_dropout": (["attention_forward", "row_statistics", "gradients_of_keys", "gradients_of_queries"], 6),
    "masked_d64": (["mark_nonfinite", "attention_forward"], 2),
    "masked_d256": (["mark_nonfinite", "attention_forward"], 2),
    "decode": (["decode_part", "combine_parts"], 0),
    "weights": (["split_large_lse", "attention_weights"], 0),
    "additive": (["additive_forward", "additive_backward_queries", "additive_backward_keys"], 0),
}
#: What two processes do side by side: the one most of the Hopper kernels, the other the rest.
FIRST = "hopper_d64", "hopper_d128", "hopper_d256"
ELSEWHERE = (*FIRST, "additive", "weights")
SHARES = (
    [*FIRST, "broadcast", *BROKEN_MAPS],
    ["additive", *BROKEN_LAUNCHES, *(name for name in EXPECTED if name not in ELSEWHERE), *CHECKS],
)

#: Words of the rule that a refusal names; None where nothing is broken.
RULES = {
    "none": None,
    "address": "no multiple of 16 bytes",
    "no_address": "no multiple of 16 bytes",
    "rank": "has rank 1 to 5, not 6",
    "size": "size 0 is 1 to 2^32, not 0",
    "stride": "stride 1 is 264 bytes, no multiple of 16",
    "zero_stride": "stride 2 is zero",
    "wide_stride": "stride 2 is 1099511627776 bytes, not below 2^40",
    "box": "side 1 of the box is 1 to 256, not 257",
    "empty_box": "side 1 of the box is 1 to 256, not 0",
    "narrow_box": "the inner side of the box has 8 bytes, no multiple of 16",
    "swizzle_128": "256 bytes, more than the swizzle's 128",
    "swizzle_64": "128 bytes, more than the swizzle's 64",
    "element_stride": "element stride 1 is 1 to 8, not 9",
    "nan_of_integers": "only floats are filled with NaN",
    "good": None,
    "no_grid": "the grid 1 x 0 x 1 is empty",
    "grid": "the grid 1 x 65536 x 1 is larger than 2147483647 x 65535 x 65535",
    "threads": "a block has 1 to 1024 threads, not 1056",
    "registers": "32 warps with",
    "shared": "49153 bytes of dynamic shared memory are more than the 49152 that were allowed",
    "opt_in": "232449 bytes of dynamic and 0 of static shared memory are more than a block's 232448",
    "opted_in": None,
    "broadcast": "is zero",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return stub.build(tmp_path_factory.mktemp("libcuda"))


def launch(library: Path, names: list[str], folder: Path = ROOT, **environment: str) -> dict[str, dict]:
    """What tests/gpu_launches.py of a checkout says of these names."""
    command = [sys.executable, "-m", "tests.gpu_launches", str(library), *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return {result["name"]: result for result in map(json.loads, finished.stdout.splitlines())}


@pytest.fixture(scope="module")
def made(library, tmp_path_factory) -> tuple[Path, dict]:
    """A cache folder with the kernels of "weights", and what was said of them."""
    folder = tmp_path_factory.mktemp("made")
    named = launch(library, ["weights"], TRITON_CACHE_DIR=str(folder), TRITON_STORE_BINARY_ONLY="1")
    return folder, named["weights"]


@pytest.fixture(scope="module")
def results(library, made) -> dict[str, dict]:
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda names: launch(library, names), SHARES)
    return first | second | {"weights": made[1]}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_family_launches(results, name):
    launched, maps = EXPECTED[name]
    result = results[name]
    assert result["refused"] is None
    assert (result["launched"], result["launches"], result["maps"]) == (launched, len(launched), maps)
    assert result["again"] == [3 * len(launched), 3 * maps]


@pytest.mark.parametrize("name", RULES)
def test_the_stand_in_keeps_the_rules(results, name):
    refused = results[name]["refused"]
    assert (refused is None) == (RULES[name] is None), refused
    assert RULES[name] is None or RULES[name] in refused


def test_every_case_of_the_checks_keeps_the_rules(results):
    """Each launch's grid, and each tensor map through the function of Triton's launcher; nothing is compiled."""
    from benchmarks.gpu import check

    found, tasks = results["check_cases"], check.tasks("cuda", "triton", quick=False)
    assert found["refused"] == []
    assert found["idle"] == [task.key for task in tasks if "/empty_" in task.key], "all others launch something"
    counts = found["counts"]
    assert counts["tasks"] == len(tasks) > 500
    assert counts["calls"] == 2 * len(tasks)
    assert counts["launches"] == sum(found["kernels"].values()) > 2500
    assert found["kernels"].keys() == KERNELS
    groups = {"bf16 triton": 2000, "bf16 hopper": 150, "bf16 plain": 250, "fp16 triton": 1000, "fp32 triton": 1000}
    assert found["maps"].keys() == groups.keys()
    assert all(found["maps"][group] > least for group, least in groups.items()), found["maps"]


KERNELS = {
    *("attention_forward", "row_statistics", "gradients_of_keys", "gradients_of_queries", "gradient_of_bias"),
    *("decode_part", "combine_parts", "mark_nonfinite", "split_large_lse"),
    *("statistics_kernel", "gradients", "gradients_of_wide_keys"),
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken_stride", "stride 2 is zero"),
        ("broken_address", "no multiple of 16 bytes"),
        ("broken_grid", "the grid (0, 1, 1)"),
    ],
)
def test_a_case_that_breaks_a_rule_is_refused(results, name, words):
    assert words in results[name]["refused"]


def test_a_packed_cache_serves_another_checkout(library, made, tmp_path):
    kept, made = made
    assert made["compiled"] == 2
    packed, folder, elsewhere = tmp_path / "cache.tar.xz", tmp_path / "unpacked", tmp_path / "checkout"
    cache.pack(kept, packed)
    assert cache.unpack(packed, folder) == 2
    assert cache.kernels_in(folder) == {"attention_weights": 1, "split_large_lse": 1}
    for name in ("benchmarks", "fastattn", "kernels"):
        shutil.copytree(ROOT / name, elsewhere / name, ignore=shutil.ignore_patterns("*.so", "results", "__pycache__"))
    (elsewhere / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "gpu_launches.py", elsewhere / "tests")
    ptxas = triton.knobs.nvidia.ptxas
    broken = tmp_path / "ptxas"  # its version is part of a kernel's key
    broken.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {ptxas.path} --version\nexit 1\n')
    broken.chmod(0o755)
    tools = {"TRITON_PTXAS_PATH": str(broken), "CC": "false"}
    read = launch(library, ["weights"], elsewhere, TRITON_CACHE_DIR=str(folder), **tools)["weights"]
    assert (read["refused"], read["hits"], read["compiled"]) == (None, 2, 0)
    assert read["launched"] == made["launched"]
    assert Path(read["kernels"]).is_relative_to(elsewhere)
