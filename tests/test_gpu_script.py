"""benchmarks.gpu without a GPU: its plan, its result file, and its processes that fail."""

import json
import os
import shutil
import signal
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
from benchmarks.gpu import pool  # noqa: E402
from benchmarks.gpu import result as result_module  # noqa: E402
from benchmarks.gpu.pool import Pool, Task  # noqa: E402
from benchmarks.gpu.result import ResultFile  # noqa: E402
from benchmarks.gpu.worker import Unsupported, as_json  # noqa: E402

FAULTY = '''
"""Handlers that misbehave in each way that a kernel can."""
import os
import signal
import time

from benchmarks.gpu import worker


def good(context, value):
    context.stage("only")
    context.row("ok", value=value, pid=os.getpid())


def stages(context, faults):
    for name in ("first", "second", "third"):
        if not context.stage(name):
            continue
        if faults.get(name) == "hang":
            time.sleep(600)
        if faults.get(name) == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if faults.get(name) == "exit":
            os._exit(3)
        if faults.get(name) == "lose the device":
            worker.device_is_lost = lambda: True
            worker.run_stage(context, name, lambda: 1 / 0)
        if faults.get(name) == "raise":
            raise RuntimeError("a launch failed")
        if faults.get(name) == "assert":
            raise AssertionError("wrong")
        context.row("ok", stage=name)


def answers_of():
    import gc
    import io

    return next(f for f in gc.get_objects() if isinstance(f, io.TextIOWrapper) and f.fileno() > 2 and f.writable())


def silent(context):
    if context.stage("second"):
        os.close(answers_of().fileno())
        time.sleep(600)


def broken_off(context):
    """Ends within a line of its answers."""
    answers = answers_of()
    if context.stage("second"):
        answers.write('{"row": {"status": "o')
        answers.flush()
        os._exit(3)


def chatty(context):
    print("this is not an answer")
    os.system("echo neither is this")
    context.row("ok")


def slow(context):
    time.sleep(0.4)
    context.row("ok")


def hurried(context):
    if context.stage("slow", 1.0):
        time.sleep(600)


def family(context, engine):
    for direction in ("forward", "backward"):
        name = f"{engine}/{direction}"
        if context.stage(name):
            if engine == "hopper" and direction == "backward":
                time.sleep(600)
            context.row("ok", stage=name)


def hang(context):
    context.row("ok", pid=os.getpid())
    time.sleep(600)


def variable(context):
    context.row("ok", value=os.environ.get("FASTATTN_TEST"), pid=os.getpid())
'''


@pytest.fixture
def run_pool(tmp_path, monkeypatch):
    """Runs tasks of the faulty module in real worker processes; returns the result file."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setattr(pool, "START_SECONDS", 60.0)
    result = ResultFile(tmp_path / "result.json")

    def run(tasks, workers=1, seconds=120.0, resume=False, **options):
        environment = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        options = {"environment": environment, "preload": ()} | options
        with Pool(result, "source", tmp_path / "logs", workers, **options) as pool:
            pool.run(tasks, time.monotonic() + seconds, resume)
        return result

    return run


def task(key, handler, timeout=20.0, **arguments):
    return Task("test", key, f"faulty:{handler}", arguments, timeout=timeout)


def rows_of(result, key):
    return [row for row in result.rows if row["task"] == key]


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
    )


def test_one_process_serves_many_tasks(run_pool):
    result = run_pool([task(f"t{i}", "good", value=i) for i in range(4)])
    assert [row["value"] for row in result.rows] == [0, 1, 2, 3]
    assert len({row["pid"] for row in result.rows}) == 1
    assert all(entry["status"] == "done" for entry in result.content["tasks"].values())


def test_two_processes_share_the_tasks(run_pool):
    result = run_pool([task(f"t{i}", "good", value=i) for i in range(6)], workers=2)
    assert sorted(row["value"] for row in result.rows) == list(range(6))


FATAL = [("hang", "timeout"), ("crash", "crash"), ("exit", "crash"), ("lose the device", "crash")]


@pytest.mark.parametrize(("fault", "status"), FATAL)
def test_a_stage_that_takes_the_process_down_costs_only_itself(run_pool, fault, status):
    tasks = [task("bad", "stages", timeout=1.0, faults={"second": fault}), task("good", "good", value=1)]
    result = run_pool(tasks)
    outcome = [(row["stage"], row["status"]) for row in rows_of(result, "bad")]
    assert ("second", status) in outcome
    assert ("third", "ok") in outcome, "the task goes on after the stage"
    assert rows_of(result, "good")[0]["status"] == "ok"
    reasons = {"hang": "no answer", "crash": "SIGSEGV", "exit": "exit status 3", "lose the device": "ZeroDivisionError"}
    assert reasons[fault] in next(row["error"] for row in rows_of(result, "bad") if row["status"] == status)


def test_an_exception_ends_the_task_and_keeps_its_rows(run_pool):
    result = run_pool(
        [task("error", "stages", faults={"second": "raise"}), task("wrong", "stages", faults={"first": "assert"})]
    )
    assert [(row["status"], row["stage"]) for row in rows_of(result, "error")] == [("ok", "first"), ("error", "second")]
    assert "a launch failed" in rows_of(result, "error")[1]["error"]
    assert rows_of(result, "wrong")[0]["status"] == "fail"
    assert result.content["tasks"]["error"]["status"] == "error"


def test_a_stage_that_keeps_dying_is_left_out(run_pool):
    tasks = [task(f"t{i}", "stages", faults={"second": "exit"}) for i in range(4)]
    result = run_pool(tasks, stage_limit=2)
    second = [row["status"] for row in result.rows if row["stage"] == "second"]
    assert second.count("crash") == 2
    left_out = rows_of(result, "t3")[1]
    assert (left_out["status"], left_out["stage"]) == ("skipped", "second")
    assert sum(row["stage"] == "third" for row in result.rows) == 4


def test_a_process_that_ends_within_a_line_has_crashed(run_pool):
    result = run_pool([task("t", "broken_off"), task("good", "good", value=1)])
    assert [(row["status"], row["stage"]) for row in result.rows[:2]] == [("crash", "second"), ("skipped", "second")]
    assert rows_of(result, "good")[0]["status"] == "ok"


def test_a_process_that_cannot_end_is_not_waited_for(run_pool, monkeypatch):
    """The driver may hold back one whose kernel hangs; here it only closes what it answers through."""
    monkeypatch.setattr(pool, "KILL_SECONDS", 0.5)
    result = run_pool([task("t", "silent"), task("good", "good", value=1)])
    assert [(row["status"], row["stage"]) for row in result.rows[:2]] == [("crash", "second"), ("skipped", "second")]
    assert "no exit status" in result.rows[0]["error"]
    assert rows_of(result, "good")[0]["status"] == "ok"


def test_a_fault_of_the_program_costs_one_task(run_pool, monkeypatch):
    attempt = Pool._attempt

    def faulty(pool, task, index):
        return 1 / 0 if task.key == "bad" else attempt(pool, task, index)

    monkeypatch.setattr(Pool, "_attempt", faulty)
    result = run_pool([task("bad", "good", value=0), task("good", "good", value=1)])
    assert [(row["task"], row["status"]) for row in result.rows] == [("bad", "error"), ("good", "ok")]
    assert "ZeroDivisionError" in result.rows[0]["error"]


def test_what_a_library_prints_is_not_an_answer(run_pool):
    assert run_pool([task("t", "chatty")]).rows[0]["status"] == "ok"


def test_a_stage_has_the_time_that_it_asks_for(run_pool):
    start = time.monotonic()
    result = run_pool([task("t", "hurried", timeout=60.0)])
    assert time.monotonic() - start < 30.0
    assert [(row["stage"], row["status"]) for row in result.rows] == [("slow", "timeout"), ("slow", "skipped")]


def test_no_engine_is_silenced_by_the_death_of_another(run_pool):
    """What counts is the stage's name, and it names the family of kernels."""
    tasks = [task(f"hopper{i}", "family", timeout=0.6, engine="hopper") for i in range(3)]
    tasks += [task("plain", "family", timeout=0.6, engine="plain")]
    result = run_pool(tasks, stage_limit=2)
    outcome = [(row["task"], row["status"]) for row in result.rows if row["stage"].endswith("/backward")]
    assert outcome == [
        ("hopper0", "timeout"),
        ("hopper0", "skipped"),
        ("hopper1", "timeout"),
        ("hopper1", "skipped"),
        ("hopper2", "skipped"),
        ("plain", "ok"),
    ]


def test_workers_serve_several_runs_and_die_with_the_pool(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    result = ResultFile(tmp_path / "result.json")
    environment = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with Pool(result, "s", tmp_path / "logs", environment=environment, preload=()) as pool:
        pool.start()
        pool.task_environment = {"FASTATTN_TEST": "1"}
        for name in ("a", "b"):
            pool.run([task(name, "good", value=1)], time.monotonic() + 60.0)
        pool.run([task("c", "variable")], time.monotonic() + 60.0)
    pids = {row["pid"] for row in result.rows}
    assert len(pids) == 1
    assert rows_of(result, "c")[0]["value"] == "1"
    assert not Path(f"/proc/{pids.pop()}").exists()


def test_a_worker_that_died_between_two_tasks_costs_the_next_nothing(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    result = ResultFile(tmp_path / "result.json")
    with Pool(result, "s", tmp_path / "logs", environment={"PYTHONPATH": str(tmp_path)}, preload=()) as pool:
        pool.run([task("a", "good", value=1)], time.monotonic() + 60.0)
        os.kill(result.rows[0]["pid"], signal.SIGKILL)
        pool._workers[0].process.wait()
        pool.run([task("b", "good", value=2)], time.monotonic() + 60.0)
    assert [row["status"] for row in result.rows] == ["ok", "ok"]


def test_a_worker_dies_with_the_program(tmp_path):
    """Also one that hangs, and when the program is killed: it would stay on the GPU."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    program = f"""
import sys, threading, time
from pathlib import Path
from benchmarks.gpu.pool import Pool, Task
from benchmarks.gpu.result import ResultFile
folder = Path({str(tmp_path)!r})
pool = Pool(ResultFile(folder / "r.json"), "s", folder / "logs", environment={{"PYTHONPATH": str(folder)}}, preload=())
task = Task("p", "t", "faulty:hang", timeout=500.0)
threading.Thread(target=pool.run, args=([task], time.monotonic() + 500.0), daemon=True).start()
while not pool.result.rows:
    time.sleep(0.05)
print(pool.result.rows[0]["pid"], flush=True)
time.sleep(500)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    worker = int(process.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    process.kill()
    process.wait()
    end = time.monotonic() + 10.0
    while time.monotonic() < end and _lives(worker):
        time.sleep(0.05)
    assert not _lives(worker)


def _lives(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent to ask does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_after_the_deadline_tasks_are_skipped_and_a_resumed_run_takes_them_up(run_pool):
    tasks = [task(f"t{i}", "slow") for i in range(60)]
    first = run_pool(tasks, seconds=2.0)
    states = [entry["status"] for entry in first.content["tasks"].values()]
    assert "skipped" in states
    tasks = tasks[: states.count("done") + 2]
    before = {row["task"] for row in first.rows if row["status"] == "ok"}
    second = run_pool(tasks, resume=True)
    done = [row["task"] for row in second.rows if row["status"] == "ok"]
    assert sorted(done) == sorted({t.key for t in tasks} | before), "each once, also those of the first run"


def test_resume_runs_again_what_other_sources_made(tmp_path):
    result = ResultFile(tmp_path / "result.json")
    result.add({"part": "p", "task": "t", "status": "ok"})
    result.finish("t", "done", 1.0, "old")
    result.close()
    again = ResultFile(tmp_path / "result.json", resume=True)
    assert again.is_done("t", "old")
    assert not again.is_done("t", "new")
    again.start("t")
    assert again.rows == []
    assert ResultFile(tmp_path / "result.json").rows == [], "without resume a run starts afresh"


def test_a_change_of_one_engine_lets_the_others_results_stand(tmp_path, monkeypatch):
    from benchmarks.gpu import environment

    keys = ("tune/hopper_forward_d128", "check/bf16/a/plain", "smoke/plain/forward", "bench/d128", "smoke/torch/matmul")
    for folder in ("fastattn/train", "kernels/hopper"):
        (tmp_path / folder).mkdir(parents=True)
    files = ("fastattn/plain.py", "fastattn/train/loop.py", "kernels/launch.py", "kernels/hopper/launch.py")
    monkeypatch.setattr(environment, "ROOT", tmp_path)

    def changed_by(name):
        digests = []
        for text in ("before", "after"):
            for file in files:
                (tmp_path / file).write_text("before")
            (tmp_path / name).write_text(text)
            environment.source_digest.cache_clear()
            digests.append([environment.source_of(key) for key in keys])
        return [key for key, before, after in zip(keys, *digests, strict=True) if before != after]

    try:
        assert changed_by("kernels/hopper/launch.py") == ["tune/hopper_forward_d128", "bench/d128"]
        assert changed_by("kernels/launch.py") == ["check/bf16/a/plain", "smoke/plain/forward", "bench/d128"]
        assert changed_by("fastattn/plain.py") == list(keys[:-1])
        assert changed_by("fastattn/train/loop.py") == []
    finally:
        environment.source_digest.cache_clear()


def test_the_result_file_is_whole_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(result_module, "WRITE_EVERY", 0.01)
    result = ResultFile(tmp_path / "deep" / "result.json")
    counts = []
    for index in range(300):
        result.add({"part": "p", "task": "t", "index": index})
        if result.path.exists():
            counts.append(len(json.loads(result.path.read_text())["rows"]))
    result.close()
    assert counts == sorted(counts)
    rows = json.loads(result.path.read_text())["rows"]
    assert [row["index"] for row in rows] == list(range(300))
    assert [path.name for path in result.path.parent.iterdir()] == ["result.json"]


def test_rows_cost_the_run_little(tmp_path):
    """A row waits for no file: a thousand of them are written a few times."""
    result = ResultFile(tmp_path / "result.json")
    written = []
    write = result._write
    result._write = lambda: (written.append(1), write())
    for index in range(1000):
        result.add({"part": "p", "task": "t", "index": index, "error": "x" * 500})
    result.close()
    assert len(written) <= 4
    assert len(json.loads(result.path.read_text())["rows"]) == 1000


def test_resume_refuses_another_schema(tmp_path):
    (tmp_path / "result.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0"):
        ResultFile(tmp_path / "result.json", resume=True)


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
