"""The shipped GPU configurations compiled without a GPU, and the rules that judge them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastattn.kernels import compile_report, configs, launch, offline
from fastattn.kernels.offline import innermost_loops
from fastattn.problem import bias_gradient_shape
from fastattn.testing import Case

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


def test_a_newer_triton_takes_its_own_configurations(monkeypatch):
    assert set(configs.NEWER) <= set(configs.TABLE)
    monkeypatch.setattr(configs, "newer_triton", lambda: False)
    pinned = configs.choose("decode", 2, 128, 90)
    monkeypatch.setattr(configs, "newer_triton", lambda: True)
    assert configs.choose("decode", 2, 128, 90) != pinned
    assert configs.choose("decode", 2, 128, 80) == pinned


def test_what_looks_at_every_element_takes_smaller_tiles():
    assert set(configs.ELEMENTWISE) <= set(configs.TABLE)
    plain, elementwise = (configs.choose("forward", 2, 128, 90, elementwise) for elementwise in (False, True))
    assert elementwise.block_m * elementwise.block_n < plain.block_m * plain.block_n
    assert configs.choose("grad_query", 2, 128, 90, True) == configs.choose("grad_query", 2, 128, 90)


def test_calls_with_everything_are_reported_where_tiles_are_loaded_ahead():
    jobs = [job for job in compile_report.jobs() if job.call == compile_report.EVERYTHING]
    found = {(job.kernel, job.element_size, job.head_dim, job.architecture) for job in jobs}
    assert {("forward", 2, d, a) for d in (64, 128, 256, 512) for a in (80, 90, 100)} <= found
    assert {(kernel, 2, 128, a) for kernel in ("grad_key_value", "grad_query") for a in (80, 90, 100)} <= found
    assert all(job.config.num_stages > 1 for job in jobs)
    for job in jobs:
        problem = compile_report.problem_of(job)
        assert problem.attn_mask is not None and problem.bias is not None and problem.key_lengths is not None
        assert problem.causal and problem.window_left and (problem.dropout_p > 0) == (job.kernel != "decode")


def test_unchanged_rows_are_kept(tmp_path, monkeypatch):
    resources = offline.Resources(255, 0, 0, 4096, 4, {"HMMA": 8}, {"HMMA": 8, "all": 20})
    job = compile_report.Job("forward", 2, 64, 80, configs.Config(128, 64), "mask")
    rows = [
        compile_report.Row(job, resources, ()),
        compile_report.Row(dataclasses.replace(job, call="bias"), None, ("no",)),
    ]
    monkeypatch.setattr(compile_report, "RESULTS", tmp_path / "report")
    compile_report.write(rows)
    assert compile_report.last_rows() == {row.job: row for row in rows}
    monkeypatch.setattr(compile_report.triton, "__version__", "0.0")
    assert compile_report.last_rows() == {}


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


class ReadsNothing(TorchDispatchMode):
    """Refuses what would make the host wait for the device's data."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_to_copy")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name.removeprefix("aten::") not in self.WAITING, function
        return function(*args, **(kwargs or {}))


SIZES = {"batch": 2, "heads": 2, "queries": 37, "keys": 70, "head_dim": 16}
#: Beside what the compile report compiles: each ingredient, and each way in which a bias is broadcast.
INGREDIENTS = [
    Case("lengths_window", **SIZES, key_lengths=(70, 33), window=(9, 3)),
    Case("mask_dropout", **SIZES, mask="full", dropout_p=0.3, causal="lower_right"),
    Case("grouped_bias_dropout", **SIZES | {"heads": 4}, kv_heads=2, bias="per_head", dropout_p=0.2),
    Case("value_dim", **SIZES | {"head_dim": 40}, value_dim=24),
    Case("negative_scale", **SIZES, scale=-0.3, causal="upper_left"),
    *(Case(f"bias_{kind}", **SIZES, bias=kind) for kind in ("shared", "keys", "queries", "scalar", "per_batch")),
]


@pytest.mark.parametrize("case", INGREDIENTS, ids=lambda case: case.name)
def test_every_ingredient_compiles(case):
    """What the interpreter, which has no types, takes: the compiler takes it too, and no launch reads a tensor."""
    problem = case.make(dtype=torch.bfloat16)
    out, lse = torch.zeros(*problem.query.shape[:3], problem.value.shape[3]), torch.zeros(problem.query.shape[:3])
    out = out.bfloat16()
    of_bias_alone = case.name.startswith("bias_")
    tensors = (None,) * 3 if of_bias_alone else (problem.query, problem.key, problem.value)
    grad_bias = None if problem.bias is None else torch.zeros(bias_gradient_shape(problem.bias))
    small = configs.Config(16, 32)
    with offline.compiling_for(80) as compiled, ReadsNothing():
        launch.backward(problem, out, lse, out, lse, *tensors, grad_bias, small, small, small)
        if not of_bias_alone:
            launch.forward(problem, out, lse, small)
            launch.weights(problem, lse, torch.zeros(2, 37, 70), True, small)
            if not problem.dropout_p and problem.scale > 0:
                launch.decode(problem, out, lse, 3, small)
    assert all("cubin" in kernel.asm for _, kernel in compiled)
    assert len(compiled) >= 2


@pytest.mark.parametrize("architecture", (80, 86, 90, 100, 120))
@pytest.mark.parametrize("element_size", (2, 4))
@pytest.mark.parametrize("head_dim", (16, 32, 64, 128, 256, 512))
def test_every_problem_has_a_configuration(head_dim, element_size, architecture):
    for kernel in {kernel for kernel, _, _ in configs.TABLE}:
        config = configs.choose(kernel, element_size, head_dim, architecture)
        assert not (config.tma and architecture < 90)
        assert configs.choose(kernel, element_size, head_dim, 120) == configs.choose(kernel, element_size, head_dim, 80)


def test_the_newest_architecture_not_above_the_device_is_chosen(monkeypatch):
    chosen = {80: configs.Config(64, 64), 90: configs.Config(128, 64)}
    monkeypatch.setitem(configs.TABLE, ("forward", 2, 64), chosen)
    assert configs.choose("forward", 2, 64, 89) == chosen[80]
    assert configs.choose("forward", 2, 32, 90) == chosen[90]
    assert configs.choose("forward", 2, 64, 100) == chosen[90]
