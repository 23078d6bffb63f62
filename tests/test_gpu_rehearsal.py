"""The very command of a run on a GPU, on the CPU, with a hang, a crash and a wrong result in each of its parts.

All rehearsals run at once. Which fault strikes where is told by the environment to a module that every worker imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as program  # noqa: E402
from benchmarks.gpu import bench, plan, smoke, tune  # noqa: E402

FAULTS = '''
"""Faults in the reference, in the stages, calls and shapes that the environment names; every row tells its process."""
import json
import os
import re
import signal
import time

from benchmarks.gpu import watchdog, worker
from fastattn.backends import reference

FAULTS = json.loads(os.environ["FASTATTN_TEST_FAULTS"])
HANG_SECONDS = 3.0
stage, finished, row, calls = [None], watchdog.finished, worker.Context.row, (reference.forward, reference.backward)
announce = worker.Context.stage


def strikes(fault, stage, problem=None, call=None):
    """Whether a fault belongs to a stage, and to a call of a problem there."""
    if not re.fullmatch(fault["stage"], stage or ""):
        return False
    if problem is None:
        return True
    return (
        fault.get("call") in (None, call)
        and fault.get("shape") in (None, [problem.query.shape[2], problem.key.shape[2]])
        and fault.get("causal", problem.causal) == problem.causal
        and fault.get("bias", problem.bias is not None) == (problem.bias is not None)
    )


def stage_within_seconds(context, name, seconds=None):
    """A stage that will hang gets little time for it."""
    if any(fault["what"] == "hang" and strikes(fault, name) for fault in FAULTS):
        seconds = min(seconds or HANG_SECONDS, HANG_SECONDS)
    entered = announce(context, name, seconds)
    if entered:
        stage[0] = name
    return entered


def faulty(name, call):
    def called(problem, *arguments, **gradients):
        call(problem, *arguments, **gradients)
        for fault in FAULTS:
            if strikes(fault, stage[0], problem, name):
                if fault["what"] == "hang":
                    time.sleep(600)
                if fault["what"] == "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
                if fault["what"] == "wrong":
                    written = (*gradients.values(), *arguments[4 if name == "backward" else 0:])
                    next(tensor for tensor in written if tensor is not None)[..., -1, -1] += 100.0

    return called


worker.Context.stage = stage_within_seconds
worker.Context.row = lambda context, status, **values: row(
    context, status, **values | {"pid": os.getpid(), "dead": os.environ.get("FASTATTN_GPU_DEAD", "")}
)
watchdog.finished = lambda device, seconds: not any(
    fault["what"] == "stuck" and strikes(fault, stage[0]) for fault in FAULTS
)
reference.forward, reference.backward = map(faulty, ("forward", "backward"), calls)
'''

FULL, CAUSAL = {"causal": None, "bias": False}, {"causal": "upper_left"}
SQUARE = {"shape": [32, 32]}
#: By rehearsal what goes wrong: "stuck" is a launch that does not end on the device, "hang" a call that does not end.
FAULTS_OF = {
    "first": [
        {"what": "stuck", "stage": "compile/hopper/fused/d128"},
        {"what": "crash", "stage": "plain/decode"},
        {"what": "wrong", "stage": "compile/hopper/keys/d64", "call": "backward"},
        {"what": "crash", "stage": "d16/fastattn", "call": "backward"} | SQUARE | FULL,
        {"what": "hang", "stage": "timing/d16/fastattn", "call": "forward"} | SQUARE | CAUSAL,
        {"what": "wrong", "stage": "reference/forward", "shape": [5, 5]},
        {"what": "crash", "stage": "reference/backward", "shape": [33, 80]},
        {"what": "wrong", "stage": "autocast", "call": "forward"},
        {"what": "crash", "stage": "reference/backward/d16/whole", "call": "backward"},
    ],
    "second": [
        {"what": "wrong", "stage": "compile/hopper/forward/d256", "call": "forward"},
        {"what": "wrong", "stage": "d16/fastattn", "call": "forward"} | SQUARE | FULL,
        {"what": "hang", "stage": "d16/fastattn", "call": "backward"} | SQUARE | CAUSAL,
        {"what": "crash", "stage": "timing/d16/fastattn", "call": "backward", "bias": True},
        {"what": "hang", "stage": "compile/reference/forward", "shape": [17, 65]},
        {"what": "crash", "stage": "forbidden_column"},
        {"what": "wrong", "stage": "wide_mask"},
        {"what": "hang", "stage": "wide_bias"},
        {"what": "wrong", "stage": "reference/forward/d16/whole", "call": "forward"},
        {"what": "hang", "stage": "timing/reference/backward/d16/chosen", "call": "backward"},
    ],
}
#: By rehearsal and task what its rows say is wrong, or left out for it: (status, stage, words of the error).
EXPECTED = {
    "first": {
        "smoke/hopper/fused/d128": [
            ("hang", "compile/hopper/fused/d128", "did not finish"),
            ("note", "compile/hopper/fused/d128", None),
            ("crash", "compile/hopper/fused/d128", "exit status 4"),
            ("skipped", "compile/hopper/fused/d128", "failed hard"),
        ],
        "smoke/plain/decode": [
            ("crash", "plain/decode", "SIGSEGV"),
            ("skipped", "plain/decode", "failed hard"),
        ],
        "smoke/hopper/keys/d64": [("fail", "hopper/keys/d64", "allowed")],
        "bench/d16_l32_b2h2_fp32": [
            ("crash", "d16/fastattn", "SIGSEGV"),
            ("skipped", "d16/fastattn", "failed hard"),
        ],
        "bench/d16_l32_b2h2_fp32_upper_left": [
            ("timeout", "timing/d16/fastattn", "no answer within 3 s"),
            ("skipped", "timing/d16/fastattn", "failed hard"),
        ],
        "check/bf16/tile_smallest": [("fail", "reference/forward", "allowed")],
        "check/bf16/gqa_causal": [
            ("crash", "reference/backward", "SIGSEGV"),
            ("skipped", "reference/backward", "failed hard"),
        ],
        "check/device/autocast": [("fail", "autocast", "output: error")],
        "tune/reference_backward_d16_l32_full": [
            ("crash", "reference/backward/d16/whole", "SIGSEGV"),
            ("skipped", "reference/backward/d16/whole", "failed hard"),
        ],
    },
    "second": {
        "smoke/hopper/forward/d256": [("fail", "hopper/forward/d256", "allowed")],
        "bench/d16_l32_b2h2_fp32": [("fail", "d16/fastattn", "allowed")],
        "bench/d16_l32_b2h2_fp32_upper_left": [
            ("timeout", "d16/fastattn", "no answer within 3 s"),
            ("skipped", "d16/fastattn", "failed hard"),
        ],
        "bench/d16_l32_b2h2_fp32_bias_grad": [
            ("crash", "timing/d16/fastattn", "SIGSEGV"),
            ("skipped", "timing/d16/fastattn", "failed hard"),
        ],
        "check/bf16/length_17x65_lower_right": [
            ("timeout", "compile/reference/forward", "no answer within 3 s"),
            ("skipped", "compile/reference/forward", "failed hard"),
        ],
        "check/device/forbidden_column": [
            ("crash", "forbidden_column", "SIGSEGV"),
            ("skipped", "forbidden_column", "failed hard"),
        ],
        "check/device/wide_mask": [("fail", "wide_mask", "output rows: error")],
        "check/device/wide_bias": [
            ("timeout", "wide_bias", "no answer within 3 s"),
            ("skipped", "wide_bias", "failed hard"),
        ],
        "tune/reference_forward_d16_l32_full": [("fail", "reference/forward/d16/whole", "allowed")],
        "tune/reference_backward_d16_l32_full": [
            ("timeout", "timing/reference/backward/d16/chosen", "no answer within 3 s"),
            ("skipped", "timing/reference/backward/d16/chosen", "failed hard"),
        ],
    },
}
WORKERS = {"first": "2", "second": "1"}
DEAD = {
    "first": {"hopper/fused/d128", "plain/decode", "hopper/keys/d64"},
    "second": {"hopper/forward/d256"},
}
#: The first dead family, at which compute-sanitizer looks where it is installed.
CHECKED = {"first": "profile/memcheck/plain/decode", "second": "profile/memcheck/hopper/forward/d256"}
#: What the gate leaves out, and what has no candidate to measure again.
LEFT_OUT = {"first": {"bench/d16_l1x32_b2h2_fp32"}, "second": {"best/forward_d16_full"}}


def by_gate(rows: list[dict]) -> tuple[list[dict], set[str]]:
    """The rows of what ran, and the tasks that the gate left out."""
    ran = [row for row in rows if row.get("error") != "left out by the gate"]
    return ran, {row["task"] for row in rows if row not in ran}


class Rehearsal:
    """A run of the program that has ended: its status, what it printed, and its result file, read while it ran."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.out, self.broken = name, folder / f"{name}.json", []
        self.mark = f"FASTATTN_TEST_MARK={folder}/{name}"
        arguments = ["--device", "cpu", "--quick", "--workers", WORKERS[name], "--out", str(self.out)]
        arguments += ["--time-limit", "400", "--preload", "gpu_faults", "--logs", str(folder / name)]
        environment = {
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "1",
            "FASTATTN_TEST_FAULTS": json.dumps(FAULTS_OF[name]),
            "FASTATTN_TEST_MARK": self.mark.partition("=")[2],
        }
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)
        self.poll = threading.Thread(target=self._poll)
        self.poll.start()

    def _poll(self) -> None:
        while self.process.poll() is None:
            try:
                if self.out.exists():
                    strict(self.out)
            except ValueError as error:
                self.broken.append(error)
            time.sleep(0.1)

    def end(self):
        self.printed, _ = self.process.communicate(timeout=300)
        self.poll.join()
        self.content = strict(self.out)
        self.rows, self.left_out = by_gate(self.content["rows"])
        return self

    def rows_of(self, task: str) -> list[dict]:
        return [row for row in self.rows if row["task"] == task]

    def measured(self, task: str) -> set[tuple]:
        """What a task found right, in words that are the same in every run."""
        names = ("stage", "case", "contender", "variant", "direction", "padding", "status")
        return {tuple(row.get(name) for name in names) for row in self.rows_of(task) if row["status"] in RIGHT}

    def processes(self) -> list[str]:
        """What still runs of all that the program started."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (place / "environ").read_bytes().split(b"\0"):
                    found.append((place / "cmdline").read_text())
            except OSError:  # it has ended, or is another user's
                continue
        return found


RIGHT = ("ok", "unsupported")


def strict(path: Path) -> dict:
    """A file's JSON; ValueError where it is none, or has NaN."""

    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory) -> dict[str, Rehearsal]:
    folder = tmp_path_factory.mktemp("rehearsals")
    (folder / "gpu_faults.py").write_text(FAULTS)
    started = [Rehearsal(folder, name) for name in FAULTS_OF]
    return {rehearsal.name: rehearsal.end() for rehearsal in started}


BOTH = pytest.mark.parametrize("name", ["first", "second"])


@BOTH
def test_each_fault_is_named_where_it_struck(rehearsals, name):
    run = rehearsals[name]
    assert run.process.returncode == 1, run.printed
    for task, expected in EXPECTED[name].items():
        rows = [row for row in run.rows_of(task) if row["status"] not in RIGHT]
        assert [(row["status"], row["stage"]) for row in rows] == [entry[:2] for entry in expected], task
        for row, (status, _, words) in zip(rows, expected, strict=True):
            assert words is None or words in row["error"], row
            if status == "fail":
                assert row["traceback"].startswith("Traceback") and "AssertionError" in row["traceback"]
            if status in ("crash", "timeout") and "exit status" not in row["error"]:
                assert "gpu_faults.py" in row["error"], "where in Python it was"
    assert {row["task"] for row in run.rows if row["status"] not in RIGHT} == EXPECTED[name].keys()


@BOTH
def test_all_else_is_measured_and_right(rehearsals, name):
    run, other = rehearsals[name], rehearsals["second" if name == "first" else "first"]
    planned = {task.key for step in plan.steps("cpu", "reference", quick=True) for task in step.tasks}
    planned |= {"best/forward_d16_full", "machine", CHECKED[name]}
    met = {row["task"] for row in run.rows}
    assert met == planned - LEFT_OUT[name]
    assert run.left_out == ({"bench/d16_l1x32_b2h2_fp32"} if name == "first" else set())
    assert run.content["tasks"].keys() == met | run.left_out
    for task in met:
        assert run.content["tasks"][task]["status"] == "done"
        if task not in EXPECTED[name]:
            assert run.measured(task)
            if task not in LEFT_OUT[other.name] and task != CHECKED[name]:
                assert run.measured(task) >= other.measured(task)


@BOTH
def test_what_hung_or_crashed_while_timing_left_the_others_theirs(rehearsals, name):
    """The contenders of a shape, and the candidates of a task, in each direction."""
    run = rehearsals[name]

    def timed(task: str, name: str) -> set[str]:
        return {f"{row['direction']} {row[name]}" for row in run.rows_of(task) if row["status"] == "ok"}

    def of(direction: str, *names: str) -> set[str]:
        return {f"{direction} {name}" for name in names}

    peers = of("forward", "matmul", "naive", "math") | of("backward", "matmul", "naive", "math")
    full, causal = (
        timed("bench/d16_l32_b2h2_fp32", "contender"),
        timed("bench/d16_l32_b2h2_fp32_upper_left", "contender"),
    )
    backward = timed("tune/reference_backward_d16_l32_full", "variant")
    if name == "first":
        assert (full, causal) == (peers, peers)
        assert backward == of("backward", "matmul", "chosen")
    else:
        assert (full, causal) == (peers, peers)
        assert timed("bench/d16_l32_b2h2_fp32_bias_grad", "contender") == peers | of("forward", "fastattn")
        assert backward == of("backward", "matmul", "whole")
        assert timed("tune/reference_forward_d16_l32_full", "variant") == of("forward", "matmul", "chosen")


@BOTH
def test_the_gate_tells_every_process_what_is_dead(rehearsals, name):
    run = rehearsals[name]
    after = [row for row in run.rows if row["part"] not in ("smoke", "machine") and "dead" in row]
    assert {row["part"] for row in after} >= {"bench", "check", "tune"}
    assert len({row["pid"] for row in after}) > 2
    assert {frozenset(row["dead"].split(",")) for row in after} == {frozenset(DEAD[name])}
    assert smoke.dead_families(run.rows) == DEAD[name]


def test_the_winner_is_measured_again_and_printed(rehearsals):
    run = rehearsals["first"]
    best = {row["variant"]: row for row in run.rows_of("best/forward_d16_full") if row["status"] == "ok"}
    assert best.keys() >= {"chosen", "whole", "matmul"}
    assert best["chosen"]["default"] and best["whole"]["relative"] > tune.WORTHWHILE
    assert "ForwardConfig(whole=True)" in run.printed
    assert "Config(" not in rehearsals["second"].printed, "one was wrong, the other has nothing to be compared with"


class Recorded:
    """A pool that runs nothing, keeps what it was given, and finds one family of part smoke dead."""

    given: ClassVar[list] = []
    dead: ClassVar[str] = ""

    def __init__(self, result, source, logs, count, limit, preload, environment, progress, name):
        self.result, self.name, self.compilations, self.task_environment = result, name, Counter(), {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def start(self):
        pass

    close = start

    def run(self, tasks, deadline, resume):
        self.given.extend((self.name, task.key, self.task_environment) for task in tasks)
        for task in tasks:
            wrong = task.key in {f"smoke/{name}" for name in self.dead.split()}
            row = {"part": task.part, "task": task.key, "status": "hang" if wrong else "ok"}
            self.result.add(row | ({"stage": task.key.removeprefix("smoke/")} if wrong else {"stage": None}))


@pytest.mark.parametrize(
    ("dead", "status", "parts"),
    [
        ("", 0, {"smoke", "machine", "bench", "check", "tune"}),
        ("additive", 1, {"smoke", "machine", "bench", "check", "tune", "profile"}),
        ("hopper/statistics", 3, {"smoke", "machine", "bench", "profile"}),
        ("hopper/forward/d128 plain/forward", 3, {"smoke", "machine", "profile"}),
        ("torch/matmul", 3, {"smoke", "machine"}),
    ],
)
def test_what_is_dead_decides_what_the_program_runs(monkeypatch, tmp_path, dead, status, parts):
    monkeypatch.setattr(program, "Pool", Recorded)
    monkeypatch.setattr(Recorded, "given", [])
    monkeypatch.setattr(Recorded, "dead", dead)
    assert program.main(["--device", "cpu", "--out", str(tmp_path / "result.json"), "--workers", "2"]) == status
    rows, left_out = by_gate(strict(tmp_path / "result.json")["rows"])
    assert {row["part"] for row in rows} == parts
    planned = {task.key for step in plan.steps("cpu", "reference") for task in step.tasks}
    assert planned == left_out | {row["task"] for row in rows} & planned
    assert {name for name, key, _ in Recorded.given if key.startswith("smoke/")} == {"smoke"}
    after = [(key, environment) for name, key, environment in Recorded.given if name == "timed"]
    headline = {task.key for task in bench.headline_tasks("cpu", "reference", quick=False)}
    if "bench" in parts:
        assert headline <= {key for key, _ in after}
    if dead == "hopper/statistics":
        assert {key for key, _ in after} == headline | {"profile/memcheck/hopper/statistics"}
        assert {environment["FASTATTN_HOPPER"] for _, environment in after} == {"0"}
    told = dead.replace(" ", ",") if "bench" in parts else ""
    assert {environment.get("FASTATTN_GPU_DEAD", "") for _, environment in after} <= {told}


@pytest.mark.parametrize("name", FAULTS_OF)
def test_a_run_ends_in_time_and_leaves_a_whole_file_and_no_process(rehearsals, name):
    run = rehearsals[name]
    assert run.broken == []
    assert run.processes() == []
    assert len(run.rows) > 20
    assert "rows in" in run.printed.splitlines()[-1]
    limit = (
        3.0 + 30.0
    )  # a hang's stage, the start of the process that goes on, and another program that keeps both busy
    slow = {key: task["seconds"] for key, task in run.content["tasks"].items() if task["seconds"] > 2 * limit}
    assert not slow, "none waited for a sleep of 600 s, or for the limits that its stage would have on a GPU"
