"""benchmarks.gpu without a GPU: its processes that fail, and its result file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import pool  # noqa: E402
from benchmarks.gpu import result as result_module  # noqa: E402
from benchmarks.gpu.pool import Pool, Task  # noqa: E402
from benchmarks.gpu.result import ResultFile  # noqa: E402

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
