"""The smoke gate of benchmarks.gpu without a GPU: each fault in each family, the row it gives, what it switches off."""

import dataclasses
import functools
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastattn import testing

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import check, devices, families, profile, smoke, watchdog  # noqa: E402


class Ended(BaseException):
    """Stands for the end of the process."""


class Recorder:
    """A context that keeps the rows."""

    def __init__(self):
        self.rows, self.stages, self.current = [], [], None

    def stage(self, name, seconds=None):
        self.current = name
        self.stages.append((name, seconds))
        return True

    def row(self, status, **values):
        self.rows.append({"part": "smoke", "status": status} | values)


@pytest.fixture(scope="module")
def calls():
    """The calls of the small cases, each with its truth, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoke, "Call", functools.cache(smoke.Call))
        yield


def run_family(family):
    context = Recorder()
    smoke.run(context, family, "cpu", "reference")
    return context


def test_every_family_is_right_on_the_reference(calls):
    for family, described in smoke.FAMILIES.items():
        context = run_family(family)
        assert [row["status"] for row in context.rows] == ["ok"] * len(described.cases), context.rows
        assert all(row["family"] == family and 0.0 <= row["of_budget"] <= 1.0 for row in context.rows)
        names, seconds = zip(*context.stages, strict=True)
        assert names == (f"compile/{family}",) * (1 + len(described.cases)) + (family,), "a clock for each case"
        assert seconds[-1] > watchdog.LAUNCH_SECONDS + watchdog.DUMP_SECONDS + watchdog.READ_SECONDS
        assert smoke.dead_families(context.rows) == set()


def spoiled(fault, launch):
    def launch_family(call, backend):
        results = launch(call, backend)
        first = next(iter(results.values()))
        if fault == "raise":
            raise RuntimeError("a launch failed")
        if fault == "wrong":
            first[..., -1] += 1.0
        if fault == "unwritten":
            first[..., -1, -1] = torch.nan
        return results

    return launch_family


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("raise", "error", "a launch failed"),
        ("wrong", "fail", "allowed"),
        ("unwritten", "fail", "allowed"),
    ],
)
def test_what_is_wrong_in_a_family_kills_it_alone(calls, monkeypatch, fault, status, message):
    monkeypatch.setattr(smoke, "launch_family", spoiled(fault, smoke.launch_family))
    for family in smoke.FAMILIES:
        rows = run_family(family).rows
        assert [row["status"] for row in rows] == [status]
        assert message in rows[0]["error"]
        assert smoke.dead_families(rows) == {family}


def test_a_result_that_changes_from_call_to_call_is_wrong_unless_its_order_is_free(monkeypatch):
    def unsteady(call, backend):
        results = right(call, backend)
        calls.append(call)
        if len(calls) > len(call.family.cases):  # the second calls: one unit in the last place
            for tensor in results.values():
                tensor.copy_(torch.nextafter(tensor, torch.zeros_like(tensor)).where(tensor.isfinite(), tensor))
        return results

    right = smoke.launch_family
    monkeypatch.setattr(smoke, "launch_family", unsteady)
    for family in ("plain/forward", "hopper/fused/d128", "hopper/fused_unordered/d128"):
        calls = []
        rows = run_family(family).rows
        if family == "hopper/fused_unordered/d128":
            assert {row["status"] for row in rows} == {"ok"}
        else:
            assert rows[0]["status"] == "fail" and "a second run" in rows[0]["error"]


def test_a_hang_in_each_family_is_named_before_the_process_ends(calls, monkeypatch):
    def end(code):
        raise Ended(code)

    monkeypatch.setattr(watchdog, "finished", lambda device, seconds: False)
    monkeypatch.setattr(os, "_exit", end)
    for family in smoke.FAMILIES:
        context = Recorder()
        with pytest.raises(Ended, match=str(watchdog.HUNG_EXIT)):
            smoke.run(context, family, "cpu", "reference")
        assert [row["status"] for row in context.rows] == ["hang", "note"]
        assert context.stages[-1] == (f"compile/{family}", pytest.approx(33.0)), "the dump's own time"
        assert context.rows[0]["stage"] == f"compile/{family}"
        assert context.rows[0]["family"] == family
        assert "no dump" in context.rows[1]["text"]
        assert smoke.dead_families(context.rows) == {family}


@pytest.mark.parametrize("status", ["hang", "timeout", "crash", "error", "fail"])
def test_a_row_without_a_family_is_booked_by_its_stage(status):
    for stage in ("hopper/fused/d128", "compile/hopper/fused/d128"):
        rows = [{"part": "smoke", "status": status, "stage": stage}, {"part": "smoke", "status": status, "stage": None}]
        assert smoke.dead_families(rows) == {"hopper/fused/d128"}
    assert smoke.dead_families([{"part": "check", "status": status, "stage": "plain/forward"}]) == set()
    assert smoke.dead_families([{"part": "smoke", "status": status, "stage": "core_dump"}]) == set()


def test_a_family_that_was_running_when_the_time_was_up_is_dead():
    """One that was still compiling, or that never began, is only unknown."""
    stages = ("plain/forward", "compile/plain/decode", None)
    rows = [{"part": "smoke", "status": "skipped", "stage": stage, "error": "out of time"} for stage in stages]
    assert smoke.dead_families(rows) == {"plain/forward"}


KEYS = (
    "bench/d128_l8192_b2h16_bf16",
    "bench/d128_l1x8192_b16h32kv8_bf16",
    "bench/d96_l4096_b4h21_bf16",
    "tune/hopper_forward_d128_l8192_full",
    "tune/hopper_backward_d64_l8192_full",
    "ablate/hopper_switches_backward_d64_l8192_full",
    "tune/triton_forward_d128_l8192_full",
    "tune/triton_decode_d128_l8192_full",
    "check/bf16/tile_d128_127/plain",
    "check/bf16/mask_full",
)


@pytest.mark.parametrize(
    ("dead", "gate", "dropped"),
    [
        (set(), "go", []),
        ({"torch/matmul"}, "stop", KEYS),
        ({"plain/forward", "hopper/forward/d128"}, "stop", KEYS),
        ({"hopper/forward/d128"}, "plain", [KEYS[3], KEYS[4], KEYS[5]]),
        ({"hopper/statistics"}, "plain", [KEYS[3], KEYS[4], KEYS[5]]),
        ({"hopper/forward/d64"}, "go", [KEYS[4], KEYS[5]]),
        ({"hopper/keys/d64"}, "go", [KEYS[4], KEYS[5]]),
        ({"hopper/fused/d128"}, "go", []),
        ({"hopper/fused_unordered/d128"}, "go", []),
        ({"hopper/padded/d96"}, "go", [KEYS[2]]),
        ({"plain/forward"}, "go", [KEYS[6], KEYS[7], KEYS[8], KEYS[9]]),
        ({"plain/grad_query"}, "go", [KEYS[8], KEYS[9]]),
        ({"plain/decode"}, "go", [KEYS[1], KEYS[7]]),
        ({"additive"}, "go", []),
    ],
)
def test_what_dies_decides_what_is_measured(dead, gate, dropped):
    found = smoke.consequences(dead)
    assert found["gate"] == gate
    assert [key for key in KEYS if smoke.drops(found, key)] == list(dropped)
    if gate != "stop" and dead:
        assert found["environment"][families.DEAD] == ",".join(sorted(dead))
    assert found["environment"].get("FASTATTN_HOPPER") == ("0" if gate == "plain" else None)


@pytest.mark.parametrize("family", smoke.FAMILIES)
def test_the_headline_is_measured_whatever_single_family_of_ours_dies(family):
    found = smoke.consequences({family})
    assert (found["gate"] == "stop") == (family == "torch/matmul")
    assert smoke.drops(found, KEYS[0]) == (family == "torch/matmul")


@pytest.fixture
def on_hopper(monkeypatch):
    """The dispatch answers for CPU tensors as it would for a Hopper device's."""
    pytest.importorskip("triton")
    from fastattn.backends import triton
    from fastattn.kernels import hopper
    from fastattn.kernels.hopper import configs

    def reasons(problem):
        return ["off"] if os.environ.get("FASTATTN_HOPPER") == "0" else hopper.capability.problem_reasons(problem)

    monkeypatch.setattr(hopper, "reasons", reasons)
    monkeypatch.setattr(configs, "BACKWARD", dict(configs.BACKWARD))
    monkeypatch.setattr(triton, "hopper_reasons", triton.hopper_reasons)


def problem_with(**fields):
    return testing.Case("case", batch=1, **({"queries": 130} | fields)).make("cpu", torch.bfloat16)


def test_a_family_is_what_the_dispatch_runs(on_hopper):
    def names(engine="triton", **fields):
        problem = problem_with(**fields)
        return [families.family_of(problem, engine, direction) for direction in ("forward", "backward")]

    two_sweeps = "hopper/keys/d{0} + hopper/queries/d{0}"
    plain = ["plain/forward", "plain/grad_key_value + plain/grad_query"]
    assert names(head_dim=128) == ["hopper/forward/d128", "hopper/fused/d128"]
    assert names(head_dim=96) == ["hopper/forward/d128", "hopper/fused/d128"]
    assert names(head_dim=64) == ["hopper/forward/d64", two_sweeps.format(64)]
    assert names(head_dim=256) == ["hopper/forward/d256", two_sweeps.format(256)]
    assert names(head_dim=32) == plain
    assert names(head_dim=64, mask="full") == plain
    assert names("plain", head_dim=128) == plain
    assert names(head_dim=64, bias="full")[1] == "plain/grad_key_value + plain/grad_query + plain/grad_bias"
    assert names(head_dim=128, queries=1, keys=4096)[0] == "plain/decode"
    assert names("reference", head_dim=128) == ["reference/forward", "reference/backward"]


def test_the_dispatch_avoids_what_is_dead(on_hopper, monkeypatch):
    monkeypatch.setenv(families.DEAD, "hopper/fused/d128,hopper/keys/d64,plain/decode")
    families.leave_out_dead()
    assert families.families_of(problem_with(head_dim=128), "triton", "backward").keys() == {
        "hopper/keys/d128",
        "hopper/queries/d128",
    }
    assert "plain/grad_query" in families.families_of(problem_with(head_dim=64), "triton", "backward")
    assert families.family_of(problem_with(head_dim=64), "triton", "forward") == "hopper/forward/d64"


def test_every_family_of_the_dispatch_is_in_the_smoke_run(on_hopper):
    met = set()
    for fields in smoke.FAMILIES["plain/forward"].cases + smoke.FAMILIES["plain/decode"].cases:
        problem = testing.Case(**fields).make("cpu", torch.bfloat16)
        for direction in ("forward", "backward"):
            met |= families.families_of(problem, "plain", direction).keys()
    for head_dim in (64, 96, 128, 256):
        for direction in ("forward", "backward"):
            met |= families.families_of(problem_with(head_dim=head_dim), "triton", direction).keys()
    assert met - {"plain/grad_bias"} <= smoke.FAMILIES.keys()


@pytest.fixture
def launches(on_hopper, monkeypatch):
    """The names of the kernels that would be launched, for CPU tensors."""
    from triton.runtime.jit import JITFunction

    import fastattn.kernels.hopper.launch_backward  # noqa: F401
    from fastattn.backends import additive_cpu, additive_triton, triton

    names = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *arguments, **named: names.append(self.fn.__name__))
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(additive_triton, "reasons", lambda *tensors: [])
    monkeypatch.setattr(additive_cpu, "reasons", lambda *tensors: ["not now"])
    return names


KERNELS = {
    "plain/forward": {"attention_forward"},
    "plain/grad_key_value": {"row_statistics", "gradients_of_keys"},
    "plain/grad_query": {"row_statistics", "gradients_of_queries"},
    "plain/decode": {"decode_part", "combine_parts"},
    "additive": {"additive_forward", "additive_backward_queries", "additive_backward_keys"},
    "hopper/statistics": {"statistics_kernel"},
    "hopper/forward": {"attention_forward"},
    "hopper/padded": {"attention_forward"},
    "hopper/keys": {"statistics_kernel", "gradients_of_keys"},
    "hopper/keys/d256": {"statistics_kernel", "gradients_of_wide_keys"},
    "hopper/queries": {"statistics_kernel", "gradients_of_queries"},
    "hopper/fused": {"statistics_kernel", "gradients"},
    "hopper/fused_unordered": {"statistics_kernel", "gradients"},
}


@pytest.mark.parametrize("family", [name for name in smoke.FAMILIES if name != "torch/matmul"])
def test_each_family_launches_its_kernels(launches, family):
    """With the arguments that the launchers take, for small cases on the CPU; the kernels themselves do not run."""
    expected = KERNELS.get(family) or KERNELS[family.rpartition("/")[0]]
    for case in smoke.cases_of(family, "cpu"):
        whole = smoke.FAMILIES[family].cases[case.seed]
        sizes = ("head_dim", "keys", "key_lengths") if family == "plain/decode" else ("head_dim",)
        case = dataclasses.replace(case, **{name: whole[name] for name in sizes})
        call = smoke.Call(family, case, "cpu")
        launches.clear()
        smoke.launch_family(call, "triton")
        assert expected <= set(launches) <= expected | {"mark_nonfinite", "split_large_lse"}


def test_the_dispatch_launches_hopper_kernels_again_and_again(launches):
    from fastattn.backends import triton

    problem = problem_with(head_dim=128)
    for _ in range(2):
        testing.run_backend(triton, problem, torch.ones_like(problem.query))
    assert launches == ["attention_forward", "statistics_kernel", "gradients"] * 2


def test_checks_come_in_the_order_of_their_value():
    tasks = check.tasks("cuda", "triton", quick=False)
    kinds = []
    for task in tasks:
        case = testing.Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in task.arguments["case"].items()})
        dtype = task.arguments["dtype"]
        hopper = dtype == "bf16" and task.arguments["engine"] != "plain" and check._suits_hopper(case)
        kinds.append("hopper" if hopper else dtype)
    assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before] == [
        "hopper",
        "bf16",
        "fp16",
        "fp32",
    ]
    assert len({task.key for task in tasks}) == len(tasks)
    wide = [task.arguments["name"] for task in devices.wide_tasks("cuda", "triton", quick=False)]
    assert wide == list(devices.WIDE_CHECKS)
    assert not set(wide) & {task.arguments["name"] for task in devices.tasks("cuda", "triton", quick=False)}
    assert all(callable(getattr(devices, name)) for name in (*devices.CHECKS, *wide))


def test_a_family_that_does_not_compile_is_not_run():
    class Broken:
        def reasons(self, problem):
            return []

        def forward(self, problem, out, lse):
            raise RuntimeError("ptxas")

    context = Recorder()
    call = check.Call(testing.Case("small", queries=5, head_dim=8), torch.float32, "cpu", Broken())
    check.run_family(context, "plain/forward", call, ("out", "lse"), case="small")
    assert [name for name, _ in context.stages] == ["compile/plain/forward"]
    assert context.rows[0]["stage"] == "compile/plain/forward" and context.rows[0]["family"] == "plain/forward"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_core_dump_is_asked_for_read_and_kept(tmp_path, monkeypatch):
    """A thread plays the driver and writes the core file, a script plays the debugger and prints its arguments."""
    script(tmp_path / "cuda-gdb", 'echo "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("ENABLE_USER_TRIGGERED_COREDUMP", "COREDUMP_PIPE", "COREDUMP_FILE", "COREDUMP_GENERATION_FLAGS"):
        monkeypatch.setenv(f"CUDA_{name}", "")
    monkeypatch.setattr(watchdog, "_armed", {})
    watchdog.arm()
    pipe = os.environ["CUDA_COREDUMP_PIPE"]
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def driver():
        while not os.read(reader, 4096):
            time.sleep(0.01)
        Path(os.environ["CUDA_COREDUMP_FILE"]).write_bytes(b"core")

    thread = threading.Thread(target=driver, daemon=True)
    thread.start()
    text = watchdog.core_dump("hopper/fused/d128", str(tmp_path / "logs"))
    thread.join(5.0)
    os.close(reader)
    assert f"target cudacore {os.environ['CUDA_COREDUMP_FILE']}" in text
    assert "info cuda warps" in text
    assert (tmp_path / "logs" / "hang-hopper-fused-d128.txt").read_text() == text


def test_what_a_machine_lacks_is_said_and_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_armed", {})
    assert watchdog.core_dump("additive", None).startswith("no dump")
    monkeypatch.setattr(watchdog, "_armed", {"pipe": tmp_path / "none", "core": tmp_path / "core"})
    monkeypatch.setattr(watchdog, "tool", lambda name: None)
    assert "not installed" in watchdog.core_dump("additive", str(tmp_path))
    monkeypatch.setattr(watchdog, "tool", lambda name: "/bin/true")
    assert "FileNotFoundError" in watchdog.core_dump("additive", str(tmp_path))
    assert watchdog.run_for(["sleep", "30"], 0.6) == ""


NCU = """
case "$*" in
  *query-metrics*) printf 'gpu__time_duration  time\\nsm__throughput  busy\\nlts__throughput  busy\\n' ;;
  *lts__throughput*) echo "==ERROR== Failed to find metric" ;;
  *) echo '"ID","Kernel Name","Metric Name","Metric Value"'
     echo '"0","gradients","gpu__time_duration.sum","1,234"'
     echo '"0","gradients","sm__throughput.avg.pct_of_peak_sustained_elapsed","n/a"' ;;
esac
"""


def test_ncu_is_asked_for_what_the_chip_counts_and_then_for_less(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "tool", lambda name: str(script(tmp_path / name, NCU)))
    assert profile.count({}, "forward") == [("gradients", {"nanoseconds": 1234.0})]
    listed = "gpu__time_duration x\nsm__throughput x\nsm__pipe_tensor_cycles_active x"
    known = profile.known_metrics(listed)
    assert set(known.values()) == {"nanoseconds", "sm_percent", "tensor_percent", "registers", "shared_bytes"}
    assert profile.known_metrics("") == profile.METRICS


def test_memcheck_looks_at_the_first_dead_family_only():
    tasks = profile.sanitizer_tasks({"hopper/fused/d128", "hopper/keys/d64"})
    assert [task.arguments for task in tasks] == [{"family": "hopper/keys/d64"}]
    assert profile.sanitizer_tasks(set()) == []
