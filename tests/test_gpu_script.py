"""benchmarks.gpu without a GPU: its plan, what judges and times, and its report."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fastattn import testing
from fastattn.backends import reference

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as program  # noqa: E402
from benchmarks.gpu.worker import Unsupported, as_json  # noqa: E402


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
    )


def test_dry_run_keeps_its_shares_and_the_limit(capsys):
    from benchmarks.gpu import plan

    assert program.main(["--dry-run", "--workers", "14"]) == 0
    every = plan.steps("cuda", "triton")
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:] if line}
    for step in every:
        assert float(lines[step.name][3]) == step.seconds
        assert step.tasks or step.choose
        assert step.estimate(14) <= step.seconds, f"{step.name} is planned to be cut short"
    assert sum(step.seconds for step in every) <= plan.TIME_LIMIT <= 560.0
    until_headline = sum(step.seconds for step in every[: [step.name for step in every].index("headline") + 1])
    assert until_headline <= 140.0, "the numbers that matter come within four minutes, two for the machine's start"


def test_without_a_gpu_a_run_says_what_can_be_done(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert program.main(["check"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_bare_checkout_finds_its_kernels(tmp_path):
    """Nothing is installed, and nothing maps kernels/ to fastattn.kernels but the script itself."""
    for folder in ("fastattn", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=lambda path, names: {"__pycache__"} & set(names))
    linked = tmp_path / "fastattn" / "kernels"
    if linked.is_dir():
        shutil.rmtree(linked)
    code = "import benchmarks.gpu, fastattn, fastattn.kernels as k; print(k.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert finished.stdout.strip() == str(tmp_path / "kernels" / "__init__.py"), finished.stderr


def test_an_unknown_step_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(["benhc"])
    assert "benhc" in capsys.readouterr().err


def test_a_run_on_the_reference_checks_times_and_resumes(tmp_path):
    out = tmp_path / "result.json"
    arguments = ("--device", "cpu", "--workers", "1", "--out", str(out))
    chosen = (
        "(length_17x65_lower_right|everything|empty_keys|wide_batch_stride|public_gradients|bench/d16_l32_b2h2_fp32)$"
    )
    steps = ("headline", "check", "wide", "check_others", "bench")
    finished = run_script(*steps, "--only", chosen, *arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    content = json.loads(out.read_text())
    checks = [row for row in content["rows"] if row["part"] == "check"]
    assert {row["status"] for row in checks} == {"ok"}
    assert {row["stage"] for row in checks} >= {"reference/forward", "reference/backward", "wide_batch_stride"}
    assert any(row.get("padding") for row in checks)
    assert all(row["family"] for row in checks)
    timed = [row for row in content["rows"] if row["part"] == "bench" and row["status"] == "ok"]
    assert {(row["contender"], row["direction"]) for row in timed} >= {
        ("fastattn", "forward"),
        ("naive", "backward"),
        ("matmul", "forward"),
    }
    assert all(row["ms_p20"] <= row["ms"] <= row["ms_p80"] for row in timed)
    assert all(row["of_ceiling"] == 1.0 for row in timed if row["contender"] == "matmul")
    assert content["head"]["versions"]["torch"]
    assert content["ceilings"]["matmul_tflops"] >= 0

    count = len(content["rows"])
    finished = run_script(*steps, "--only", chosen, "--resume", *arguments)
    assert finished.returncode == 0
    assert len(json.loads(out.read_text())["rows"]) == count, "nothing ran twice"


class Recorder:
    """A context that keeps the rows."""

    def __init__(self):
        self.rows, self.current = [], None

    def stage(self, name, seconds=None):
        self.current = name
        return True

    def row(self, status, **values):
        self.rows.append({"status": status} | values)


class FaultyBackend:
    """The reference with one fault."""

    def __init__(self, fault):
        self.fault, self.calls = fault, 0

    def reasons(self, problem):
        return []

    def forward(self, problem, out, lse):
        reference.forward(problem, out, lse)
        self.calls += 1
        if self.fault == "wrong":
            out[..., -1] += 0.1
        if self.fault == "unwritten":
            out[..., -1, -1] = float("nan")
        if self.fault == "unsteady":
            out += self.calls * 1e-7
        if self.fault == "leak" and problem.value.isnan().any():
            out[..., 0, 0] = float("nan")

    def backward(self, *arguments, **gradients):
        reference.backward(*arguments, **gradients)
        if self.fault == "wrong gradient":
            gradients["grad_key"][..., 0, :] = 0.0


@pytest.mark.parametrize(
    ("fault", "stage", "message"),
    [
        (None, None, None),
        ("wrong", "reference/forward", "out: error"),
        ("unwritten", "reference/forward", "out: error"),
        ("unsteady", "reference/forward", "a second run changes"),
        ("leak", "reference/forward", "NaN in padding changes"),
        ("wrong gradient", "reference/backward", "grad_key"),
    ],
)
def test_check_sees_each_fault(monkeypatch, fault, stage, message):
    from benchmarks.gpu import check, problems

    monkeypatch.setattr(problems, "load_backend", lambda name: FaultyBackend(fault))
    context = Recorder()
    case = testing.Case("padded", batch=2, queries=33, keys=40, head_dim=16, key_lengths=(40, 13))
    check.run_case(context, asdict(case), "fp32", "cpu", "reference")
    wrong = [row for row in context.rows if row["status"] != "ok"]
    if fault is None:
        assert wrong == []
        assert {row["stage"] for row in context.rows} == {"reference/forward", "reference/backward"}
        assert sum(row.get("padding", False) for row in context.rows) == 2
    else:
        assert wrong[0]["stage"] == stage
        assert wrong[0]["status"] == "fail"
        assert message in wrong[0]["error"]


@pytest.mark.parametrize("name", ["out", "grad_query", "grad_key", "grad_value"])
def test_a_wrong_element_is_seen_before_timing(name):
    from benchmarks.gpu.contenders import Setup, fastattn_default
    from benchmarks.gpu.verify import Truth

    setup = Setup(2, 4, 2, 20, 30, 16, "fp32", "lower_right", device="cpu", backend="reference")
    out = fastattn_default(setup)()
    gradients = torch.autograd.grad(out, setup.leaves, setup.tensors["grad_out"])
    results = {"out": out.detach()} | dict(zip(testing.GRADIENTS, gradients, strict=False))
    assert 0.0 <= Truth(setup, with_gradients=True).judge(results, strict=True) <= 1.0
    results[name][-1, -1, -1, 0] += 0.5
    with pytest.raises(AssertionError, match=name):
        Truth(setup, with_gradients=True).judge(results, strict=True)


@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
@pytest.mark.parametrize("variant", [None, "padding_50", "window"])
def test_useful_work_counts_the_allowed_pairs(causal, variant):
    from benchmarks.gpu.candidates import problem_of
    from benchmarks.gpu.contenders import Setup
    from fastattn import reference as specification

    setup = Setup(3, 2, 2, 300, 400, 8, "fp32", causal, variant, device="cpu", backend="reference")
    allowed = specification.allowed(problem_of(setup)).expand(3, 2, 300, 400).sum().item()
    assert setup.pairs == allowed
    assert setup.flops("forward") == 4 * 8 * allowed
    assert setup.flops("backward") == 10 * 8 * allowed


@pytest.mark.parametrize("variant", [None, "padding_25", "window", "mask", "mask_heads", "bias"])
def test_contenders_compute_the_same_call(variant):
    from benchmarks.gpu.contenders import CONTENDERS, Setup

    setup = Setup(2, 4, 2, 40, 40, 16, "fp32", "upper_left", variant, device="cpu", backend="reference")
    if variant in ("mask", "mask_heads", "bias"):
        setup.causal = None  # the peers take a mask or causality, not both
    results = {name: CONTENDERS[name](setup)() for name in ("fastattn", "fastattn_plain", "naive", "math")}
    for name, result in results.items():
        torch.testing.assert_close(result, results["naive"], atol=1e-5, rtol=1e-4, msg=name)


def test_times_are_interleaved_and_ordered():
    from benchmarks.gpu.timing import time_interleaved

    order, entered = [], []

    def sleeper(name, seconds):
        return lambda: (order.append(name), time.sleep(seconds))

    timings = time_interleaved(
        {"a": sleeper("a", 0.001), "b": sleeper("b", 0.004), "c": sleeper("c", 9.0)},
        "cpu",
        rounds=2,
        round_ms=4.0,
        enter=lambda name: entered.append(name) or name != "c",
    )
    assert timings["a"].ms < timings["b"].ms
    assert timings["b"].low <= timings["b"].ms <= timings["b"].high
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert turns == ["a", "b"] * 3, "estimate, then two rounds"
    assert entered == ["a", "b", "c"] + ["a", "b"] * 3, "one that may not enter takes no turn"
    assert timings.keys() == {"a", "b"}


def plotted_rows():
    shape = {"part": "bench", "status": "ok", "task": "t", "heads": 2, "kv_heads": 2, "dtype": "bf16", "head_dim": 64}
    for length in (512, 1024):
        for causal in (None, "upper_left"):
            for direction in ("forward", "backward"):
                for rate, contender in enumerate(("fastattn", "cudnn", "matmul"), start=1):
                    labels = {"causal": causal, "direction": direction, "contender": contender}
                    yield (
                        shape
                        | labels
                        | {"queries": length, "keys": length, "rate": rate * length, "of_ceiling": 0.5, "host_ms": 0.1}
                    )


def test_plot_reads_a_result(tmp_path):
    from benchmarks.gpu import plot

    pytest.importorskip("matplotlib")
    rows = list(plotted_rows())
    rows.append(rows[0] | {"variant": "bias", "rate": -1})
    rows.append(rows[0] | {"keys": 4, "rate": -1})
    assert plot.shapes(rows) == [("bf16", 64)]
    found = plot.curves(rows, "bf16", 64, "forward", None)
    assert found == {"fastattn": {512: 512, 1024: 1024}, "cudnn": {512: 1024, 1024: 2048}}
    head = {"machine": {"gpu": "a GPU"}, "versions": {"torch": "2"}, "date": "2026-01-01T00:00"}
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"head": head, "ceilings": {"matmul_tflops": 9000}, "rows": rows}))
    assert program.main(["plot", str(path), "--out", str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs" / "gpu-bf16-d64.png").stat().st_size > 10_000


def test_summary_names_failures_and_fits_a_short_log():
    from benchmarks.gpu import report

    rows = list(plotted_rows())
    rows += [
        {"part": "check", "task": f"check/{i}", "status": "fail", "stage": "forward", "error": "x" * 900}
        for i in range(50)
    ]
    rows.append({"part": "bench", "task": "t", "status": "error", "stage": "cudnn", "error": "a peer's"})
    text = report.summary({"rows": rows, "ceilings": {}})
    assert len(text) <= 9000
    assert "50 fail" in text
    assert "check/0 [forward]" in text
    rows.append({"part": "bench", "task": "t", "status": "timeout", "stage": "timing/d128/flash", "error": "a peer's"})
    assert len(report.wrong_rows(rows)) == 50, "a peer's failure is not ours"
    rows.append({"part": "bench", "task": "t", "status": "timeout", "stage": "timing/d128/fastattn", "error": "ours"})
    assert len(report.wrong_rows(rows)) == 51


def test_the_targets_are_told_where_the_ceiling_died():
    from benchmarks.gpu import report

    row = {"part": "bench", "status": "ok", "direction": "forward", "rate": 600.0, "of_ceiling": None, "host_ms": 0.1}
    names = ("bench/d128_l8192_b2h16_bf16", "bench/d128_l1x8192_b16h32kv8_bf16")
    rows = [row | {"task": task, "contender": name} for task in names for name in ("fastattn", "cudnn")]
    lines = report.summary({"rows": rows, "ceilings": {}}).splitlines()
    assert "d128_l8192_b2h16_bf16 forward: 1.000 of cudnn's rate, 0.000 of matmul (target 1.05)" in lines


def test_what_is_not_finite_is_no_number_of_a_row():
    message = {"row": {"metrics": {"stalled": float("nan"), "rate": [1.5, float("-inf")]}, "text": "NaN"}}
    expected = {"row": {"metrics": {"stalled": None, "rate": [1.5, None]}, "text": "NaN"}}
    assert json.loads(as_json(message)) == expected


def test_device_cpu_stops_what_takes_too_long_and_keeps_what_it_said():
    from benchmarks import device_cpu

    code = "import sys, time; print('first', flush=True); print('why', file=sys.stderr, flush=True); time.sleep(60)"
    run = device_cpu._run([sys.executable, "-c", code], 3.0)
    assert run["status"] == "stopped after 3 s"
    assert run["lines"] == ["first"]
    assert "why" in run["output"]
    run = device_cpu._run([sys.executable, "-c", "import os, sys; sys.exit(os.environ['CODE'] == 'x')"], 60.0, CODE="x")
    assert run["status"] == "exit status 1"


def test_device_cpu_measures_each_target_once():
    """Every column of the table of targets is measured in an instruction set that can reach it."""
    from benchmarks import device_cpu

    columns = [(isa, column) for isa, rows in device_cpu.MEASURED.items() for dtype, column in rows]
    assert {column for _, column in columns} == {"avx512", "avx512_bf16", "avx2"}
    assert all(isa.startswith(column) for isa, column in columns), "avx512_bf16 includes avx512"


def test_each_switch_is_flipped_alone():
    pytest.importorskip("triton")
    from benchmarks.gpu.candidates import switches
    from fastattn.kernels.hopper.configs import BackwardConfig, ForwardConfig

    forward = switches(ForwardConfig())
    assert {"ping_pong": False} in forward
    assert {"overlap": False, "ping_pong": False} in forward
    assert [change for change in forward if "heads_inner" in change] == [{"heads_inner": True}, {"heads_inner": False}]
    assert not any({"block_n", "stages", "consumers"} & set(change) for change in forward)
    assert {"persistent": False} in switches(BackwardConfig())
    assert not any("ordered" in change for change in switches(BackwardConfig()))
    fused = switches(BackwardConfig(fused=True))
    assert {"fused": False} in fused and {"ordered": False} in fused
    assert {"fused": False, "persistent": False} in fused and {"persistent": False} not in fused


def test_every_prediction_is_tested():
    pytest.importorskip("triton")
    from benchmarks.gpu import plan
    from benchmarks.gpu.candidates import switches, variants
    from benchmarks.gpu.predictions import PREDICTIONS
    from fastattn.kernels.hopper import configs

    tables = {
        "forward": (configs.FORWARD, configs.FORWARD_CANDIDATES),
        "backward": (configs.BACKWARD, configs.BACKWARD_CANDIDATES),
    }
    ranked = set()
    for step in plan.steps("cuda", "triton"):
        for task in step.tasks:
            if task.part == "tune" and task.arguments["engine"] == "hopper":
                setup = task.arguments["setup"]
                ranked.add((task.arguments["direction"], setup["head_dim"], setup["queries"], setup["causal"]))
    for direction, head_dim, variant, length, causal in PREDICTIONS:
        assert (direction, head_dim, length, causal) in ranked
        chosen, candidates = tables[direction]
        assert variant in variants(chosen[head_dim, causal is not None], candidates[head_dim])
    for direction, (chosen, _) in tables.items():
        names = {" ".join(f"{field}={value}" for field, value in c.items()) for c in switches(chosen[128, False])}
        predicted = {key[2] for key in PREDICTIONS if key[:2] == (direction, 128)}
        assert names <= predicted, "a switch without a prediction"


def test_the_winner_is_the_fastest_over_all_lengths_that_repeats_itself():
    from benchmarks.gpu import tune

    def row(variant, relative, length, **config):
        shape = {"part": "tune", "status": "ok", "engine": "hopper", "direction": "backward", "head_dim": 128}
        shape |= {"causal": None, "queries": length, "variant": variant, "relative": relative}
        return shape | {"default": variant == "chosen", "config": {"ordered": True} | config}

    rows = [row("chosen", 1.0, length) for length in (1024, 8192)]
    rows += [row("a", 1.3, 1024), row("a", 0.7, 8192)]  # mean 0.95
    rows += [row("b", 1.02, 1024), row("b", 1.02, 8192)]
    rows += [row("c", 1.5, 1024, fused=True, ordered=False), row("c", 1.5, 8192, fused=True, ordered=False)]
    rows += [row("d", 1.4, 8192)]  # one length failed
    found = tune.winners(rows)
    assert found["backward", 128, None]["variant"] == "b"
    (line,) = tune.config_lines(rows)
    assert line == "BACKWARD[128, False] = BackwardConfig(ordered=True)  # b: 1.020"
    (task,) = tune.best_tasks(rows, "cuda", "triton", False)
    assert task.arguments["only"] == ["b"]
    assert tune.winners(rows[:4]) == {}
    for entry in rows:  # the chosen configuration was wrong or hung, so there is nothing to compare with
        entry.pop("relative")
    assert tune.winners(rows) == {} and tune.config_lines(rows) == []


def test_what_a_dead_kernel_would_cost_again_and_again_is_left_out(monkeypatch):
    """Each candidate and each contender with a fused kernel that hangs would cost a process."""
    pytest.importorskip("triton")
    from benchmarks.gpu import contenders, families, tune
    from benchmarks.gpu.candidates import Candidate
    from fastattn.kernels.hopper.configs import BackwardConfig, ForwardConfig

    configs = {
        "sweeps": BackwardConfig(),
        "ordered": BackwardConfig(fused=True),
        "unordered": BackwardConfig(fused=True, ordered=False),
        "forward": ForwardConfig(),
    }

    def lives(dead):
        monkeypatch.setenv(families.DEAD, dead)
        context = Recorder()
        candidates = [Candidate(name, False, None, {}, config) for name, config in configs.items()]
        found = [c.name for c in candidates if tune._lives(context, c, "hopper/backward/d128", {})]
        return found, {row["variant"] for row in context.rows if row["status"] == "skipped"}

    assert lives("hopper/keys/d128") == (list(configs), set())
    assert lives("hopper/fused/d128") == (["sweeps", "unordered", "forward"], {"ordered"})
    assert lives("additive,hopper/fused_unordered/d128") == (["sweeps", "ordered", "forward"], {"unordered"})
    setup = contenders.Setup(1, 1, 1, 8, 8, 8, "bf16", device="cpu", backend="reference")
    with pytest.raises(Unsupported, match="dead"):
        contenders.fastattn_unordered(setup)


def test_what_each_contender_runs_is_timed_in_its_environment(monkeypatch):
    """The backward of "fastattn_plain" takes the plain kernels too, not only its forward."""
    from benchmarks.gpu.bench import backward_of
    from benchmarks.gpu.contenders import CONTENDERS, Setup

    setup = Setup(1, 1, 1, 8, 8, 8, "fp32", device="cpu", backend="reference")
    seen = []
    original = reference.backward
    monkeypatch.setattr(
        reference, "backward", lambda *a, **k: (seen.append(os.environ.get("FASTATTN_HOPPER")), original(*a, **k))
    )
    for name in ("fastattn", "fastattn_plain"):
        backward_of(setup, CONTENDERS[name](setup)(), name)()
    assert seen == [None, "0"]


def test_summary_ranks_variants_beside_their_predictions():
    from benchmarks.gpu import report

    row = {"part": "tune", "task": "tune/t", "status": "ok", "direction": "forward", "head_dim": 128}
    row |= {"queries": 8192, "causal": None, "rate": 600.0, "ms": 1.0, "relative": 1.0, "default": True}
    rows = [row | {"variant": "chosen"}]
    slower = {"variant": "overlap=False", "rate": 540.0, "ms": 1.1, "relative": 0.9, "default": False}
    rows.append(row | slower)
    lines = report.summary({"rows": rows, "ceilings": {}}).rstrip().splitlines()
    assert lines[-2].split() == ["600", "1.000", "chosen", "(default)"]
    assert lines[-1].split() == ["540", "0.900", "overlap=False", "(predicted", "0.94)"]
