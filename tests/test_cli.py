"""The commands: what they print, their exit status, and what they answer to bad options."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import fastattn
from fastattn import dispatch
from fastattn.backends import cpu
from fastattn.cli import app, bench, check


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_info_names_versions_and_every_backend() -> None:
    result = invoke("info")
    assert result.exit_code == 0, result.output
    for word in (fastattn.__version__, torch.__version__, *dispatch.BACKENDS, "bfloat16", "dropout"):
        assert word in result.output


def test_info_tells_why_the_engine_is_missing_and_what_computes_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "x.cpp [too old]: apt-get install g++")
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert result.output.count("x.cpp [too old]: apt-get install g++") == 2  # of the processor, and of the backend
    assert "torch's own attention in calls for which it is exact" in result.output
    assert "a call takes torch" in result.output


@pytest.mark.parametrize("command", ["check", "bench"])
def test_the_help_names_every_backend(command: str) -> None:
    (line,) = (line for line in invoke(command, "--help").output.splitlines() if "--backend" in line)
    assert set(re.findall(r"\w+", line)) >= {"auto", *dispatch.BACKENDS}


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_check_passes(backend: str) -> None:
    result = invoke("check", "--backend", backend, "--match", "length_17x65", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "grad_value" in result.output
    assert "budget" in result.output
    assert "missed length" not in result.output


def test_check_fails_when_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(*arguments):
        results = run_backend(*arguments)
        results["grad_key"] = results["grad_key"] * 1.001
        return results

    run_backend = check.run_backend
    monkeypatch.setattr(check, "run_backend", slightly_wrong)
    result = invoke("check", "--backend", "reference", "--match", "head_dim_40", "--dtype", "float32")
    assert result.exit_code == 1
    assert "missed head_dim_40 float32 grad_key" in result.output


def test_check_fails_when_the_backend_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.dispatch, "backend_reasons", lambda *_: ["it is out of order"])
    result = invoke("check", "--backend", "reference", "--match", "decode")
    assert result.exit_code == 1
    assert "it is out of order" in result.output


def test_bench_prints_a_row_for_each_call_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CALLS", (((1, 2, 32, 16), True),))
    result = invoke("bench", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if "(1, 2, 32, 16) causal" in line]
    assert len(rows) == 2
    assert "forward+backward" in rows[1]


def test_bench_leaves_out_what_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that was slow on a small call is not tried on a large one."""
    monkeypatch.setattr(bench, "CALLS", (((1, 1, 16, 16), False), ((1, 1, 2048, 16), False)))
    lengths = []

    def slow(query, key, value, is_causal):
        lengths.append(query.shape[-2])
        bench.time.sleep(0.05)
        return query * key * value

    monkeypatch.setattr(bench, "naive_attention", slow)
    result = invoke("bench", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    assert set(lengths) == {16}


def test_naive_attention_is_attention() -> None:
    query, key, value = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    for is_causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        torch.testing.assert_close(bench.naive_attention(query, key, value, is_causal), expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("check", "--backend", "gpu"), "gpu"),
        (("check", "--dtype", "int8"), "int8"),
        (("check", "--match", "no such case"), "no such case"),
        (("check", "--device", "abacus"), "abacus"),
        (("bench", "--dtype", "float8"), "float8"),
        (("bench", "--threads", "0"), "--threads"),
        (("bench", "--seconds", "-1"), "--seconds"),
    ],
)
def test_bad_options_are_named(arguments: tuple[str, ...], named: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert named in result.output
    assert "Traceback" not in result.output


def test_the_module_is_the_program() -> None:
    run = subprocess.run([sys.executable, "-m", "fastattn", "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in ("info", "check", "bench"):
        assert command in run.stdout


def test_the_version_is_printed() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"fastattn {fastattn.__version__}\n")


def test_starting_needs_no_extras() -> None:
    """Commands import their own needs: the program starts without the models' and benchmarks' packages."""
    extras = ("matplotlib", "sklearn", "tokenizers", "triton", "pycocotools", "sacrebleu")
    code = f"import sys, fastattn.cli; print(*(name for name in {extras} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""
