"""What holds around the CPU engine's kernels: threads, fork, the choice of the instruction set, the GIL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastattn.backends import cpu
from fastattn.problem import make_problem
from fastattn.testing import Case, run_backend, run_reference

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)

CASES = (
    Case("full", heads=3, queries=300, keys=400),
    Case("causal", heads=3, queries=300, causal="upper_left"),
    Case("decode", heads=2, queries=1, keys=3000),
    Case("mask_dropout", heads=2, queries=130, mask="full", dropout_p=0.2),
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bitwise_equal_over_thread_counts(case, dtype, isa, threads):
    problem = case.make(dtype=dtype)
    threads(1)
    expected = run_backend(cpu, problem)
    for count in (1, 2, 3):
        threads(count)
        actual = run_backend(cpu, problem)
        assert torch.equal(actual["out"], expected["out"]) and torch.equal(actual["lse"], expected["lse"])


def test_subnormal_numbers_are_flushed_in_the_engine_alone(threads):
    """Each thread gets back the mode that it came with: torch's operations still know such numbers."""
    threads(2)
    tiny = torch.full((1 << 20,), 1e-40)
    for case in CASES[:3]:
        problem = case.make()
        run_backend(cpu, problem, case.make_grad_out())
        assert (tiny * 0.5).count_nonzero() == tiny.numel()


@pytest.mark.parametrize("heavy", [0, 3, 5])
def test_no_item_is_left_out_however_uneven(heavy, threads):
    """One sequence holds nearly all of the work: the threads that are done with theirs take from its heads."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, 5, 300, 16, generator=generator) for _ in range(3))
    lengths = torch.full((6,), 2)
    lengths[heavy] = 300
    problem = make_problem(query, key, value, key_lengths=lengths)
    expected = run_reference(problem)["out"]
    for count in (1, 2, 3, 4, 7, 31) * 5:
        threads(count)
        out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:3], torch.nan)
        cpu.forward(problem, out, lse)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
        assert lse.isfinite().all()


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_child_forked_after_a_parallel_region_does_not_hang():
    # The child calls nothing of torch's that might use torch's own threads.
    run = _python("""
import os, numpy, torch
from fastattn.backends import cpu
from fastattn.problem import make_problem
from fastattn.testing import Case, run_backend, run_reference
torch.set_num_threads(2)
problem = Case("fork", queries=300).make()
expected = run_backend(cpu, problem)["out"].numpy()
out, lse = torch.full((2, 2, 300, 64), torch.nan), torch.empty(2, 2, 300)
child = os.fork()
if child == 0:
    cpu.forward(problem, out, lse)
    os._exit(0 if numpy.array_equal(out.numpy(), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert run.returncode == 0, run.stderr


def test_more_threads_than_the_system_gives_are_not_asked_for():
    """The runtime ends a process that it cannot give its threads; torch itself works on small tensors here."""
    run = _python("""
import torch
from fastattn.backends import cpu
from fastattn.testing import Case
problem = Case("many", batch=400, heads=100, queries=1, keys=2, head_dim=8).make()
shape = problem.query.shape
results = [(torch.full(shape, torch.nan), torch.full(shape[:3], torch.nan)) for _ in range(3)]
for threads, (out, lse) in zip((2, 1_000_000, 2**31 - 1), results):
    torch.set_num_threads(threads)
    cpu.forward(problem, out, lse)
    torch.set_num_threads(2)
    assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
""")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", cpu.available_isas())
def test_environment_chooses_the_instruction_set(name):
    run = _python("from fastattn.backends import cpu; print(cpu.isa())", FASTATTN_CPU_ISA=name)
    assert run.stdout.strip() == name, run.stderr


def test_unknown_instruction_set_in_the_environment():
    run = _python("from fastattn.backends import cpu; cpu.isa()", FASTATTN_CPU_ISA="mmx")
    assert run.returncode != 0
    assert "ValueError: FASTATTN_CPU_ISA must be one of" in run.stderr and "got 'mmx'" in run.stderr


def test_set_isa_checks_its_argument():
    with pytest.raises(ValueError, match=r"isa must be one of .*portable.*, got 'sse9'"):
        cpu.set_isa("sse9")


def test_emulated_instruction_set_is_never_chosen_by_itself():
    run = _python("from fastattn.backends import cpu; print(cpu.isa())", FASTATTN_CPU_ISA="")
    assert run.stdout.strip() in cpu.available_isas() and "emulated" not in run.stdout


def test_other_threads_run_during_a_call(threads):
    threads(1)
    problem = Case("long", batch=1, queries=3000).make()
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1
            time.sleep(0.0005)

    worker = threading.Thread(target=count)
    worker.start()
    before = counted[0]
    run_backend(cpu, problem)
    after = counted[0]
    done.set()
    worker.join()
    assert after - before > 2


EXCHANGE_TABLE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_tensors_are_read_alike_through_their_methods(dtype):
    """Before torch 2.10 there is no table of functions for it."""
    problem = Case(
        "everything",
        kv_heads=1,
        queries=17,
        keys=33,
        causal="lower_right",
        key_lengths=(33, 20),
        bias="full",
        dropout_p=0.2,
    ).make(dtype=dtype)
    grad_out = torch.randn(2, 2, 17, 64).to(dtype)
    expected = run_backend(cpu, problem, grad_out)
    cpu._C.use_torch(torch, None)
    try:
        actual = run_backend(cpu, problem, grad_out)
    finally:
        cpu._C.use_torch(torch, EXCHANGE_TABLE)
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("table", (EXCHANGE_TABLE, None))
def test_what_the_engine_cannot_read_is_an_error(table):
    problem = Case("plain", queries=6, head_dim=8).make()
    out, lse = torch.empty(2, 2, 6, 8), torch.empty(2, 2, 6)
    unreadable = {
        "dtype": problem.query.int(),
        "four dimensions": problem.query[None],
        "have memory": torch._efficientzerotensor(2, 2, 6, 8, dtype=torch.float32),
    }
    cpu._C.use_torch(torch, table)
    try:
        for message, query in unreadable.items():
            with pytest.raises(ValueError, match=message):
                cpu.forward(problem._replace(query=query), out, lse)
        with pytest.raises(RuntimeError):
            cpu.forward(problem._replace(query=problem.query.to_sparse()), out, lse)
        with pytest.raises(ValueError, match="malformed"):
            cpu._C.forward(problem[:-1], out, lse, None, 1)
    finally:
        cpu._C.use_torch(torch, EXCHANGE_TABLE)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(("isa", "flags"), [("portable", ()), ("avx2", ("-mavx2", "-mfma", "-mf16c"))])
def test_the_micro_benchmark_fits_the_kernels(isa, flags):
    source = Path(__file__).parents[1] / "csrc" / "bench" / f"parts_{isa}.cpp"
    command = ["c++", "-std=c++17", "-fopenmp", "-fsyntax-only", "-w", *flags, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
