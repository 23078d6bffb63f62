"""The engine's threads and memory: forked children, exhausted memory, nested use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from fastattn.backends import cpu
from fastattn.testing import Case, run_backend

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_the_same(tmp_path):
    """The runtime's worker threads do not survive fork(): the child must not wait for them."""
    case = Case("fork", batch=2, heads=3, queries=70, head_dim=16)
    given = case.make(), case.make_grad_out(), case.make_grad_lse()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = run_backend(cpu, *given)
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # a child that hangs is killed
            results = run_backend(cpu, *given)
            same = all(torch.equal(tensor, expected[name]) for name, tensor in results.items())
            os._exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
    finally:
        torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_exhausted_memory_is_an_exception():
    """Scratch of some hundred megabytes that the process may not have: MemoryError, not a crash."""
    script = textwrap.dedent(
        """
        import resource
        import torch
        from fastattn.backends import cpu
        from fastattn.problem import make_problem
        torch.set_num_threads(2)
        rows = torch.zeros(1, 2, 1, 64).expand(1, 2, 400_000, 64)
        lse = torch.zeros(1, 2, 400_000)
        grad_value = torch.empty(1, 2, 1, 64).expand(1, 2, 400_000, 64)
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
        problem = make_problem(rows, rows, rows)
        try:
            cpu.backward(problem, rows, lse, rows, None, None, None, grad_value, None)
        except MemoryError:
            print("MemoryError")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "MemoryError", done.stderr
