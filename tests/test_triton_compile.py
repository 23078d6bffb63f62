"""The shipped GPU configurations compiled without a GPU, and the rules that judge them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastattn.kernels import compile_report, configs
from fastattn.kernels.offline import innermost_loops

ROOT = Path(__file__).parents[1]


def test_most_used_configurations():
    """Registers suffice, shared memory fits and the tensor cores are used, on three architectures."""
    run = subprocess.run(
        [sys.executable, "-m", "fastattn.kernels.compile_report", "--check"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_tile_too_large_breaks_the_rules():
    job = compile_report.Job("forward", 2, 128, 80, configs.Config(128, 128, 4, 3))
    assert compile_report.row_of(job).broken


def test_a_compiler_error_is_reported():
    job = compile_report.Job("forward", 2, 64, 80, configs.Config(48, 64))
    (rule,) = compile_report.row_of(job).broken
    assert rule.startswith("does not compile")


def test_innermost_loops_leave_outer_ones_out():
    code = """
    .L_x_1:
        /*0000*/ FADD R0, R0, R1 ;
    .L_x_2:
        /*0010*/ HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0020*/ @P0 BRA `(.L_x_2) ;
        /*0030*/ @P1 BRA `(.L_x_1) ;
    """
    assert innermost_loops(code) == [["HMMA.16816.F32 R4, R8, R10, R4", "BRA `(.L_x_2)"]]


@pytest.mark.parametrize("architecture", (80, 86, 90, 100, 120))
@pytest.mark.parametrize("element_size", (2, 4))
@pytest.mark.parametrize("head_dim", (16, 32, 64, 128, 256, 512))
def test_every_problem_has_a_configuration(head_dim, element_size, architecture):
    for kernel in {kernel for kernel, _, _ in configs.TABLE}:
        config = configs.choose(kernel, element_size, head_dim, architecture)
        assert not (config.tma and architecture < 90)


def test_the_newest_architecture_not_above_the_device_is_chosen(monkeypatch):
    chosen = {80: configs.Config(64, 64), 90: configs.Config(128, 64)}
    monkeypatch.setitem(configs.TABLE, ("forward", 2, 64), chosen)
    assert configs.choose("forward", 2, 64, 89) == chosen[80]
    assert configs.choose("forward", 2, 32, 90) == chosen[90]
    assert configs.choose("forward", 2, 64, 100) == chosen[90]
