"""Signals during a call: Ctrl-C ends it at once, and whatever a handler does, the engine stays as it was."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from fastattn import scaled_dot_product_attention
from fastattn.backends import cpu
from fastattn.problem import make_problem
from fastattn.testing import Case, run_backend, run_reference

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)
if not hasattr(signal, "setitimer"):
    pytest.skip("needs timers that signal", allow_module_level=True)

LONG = 16000


@pytest.fixture
def on_alarm():
    """Calls a function by SIGALRM, after some seconds and, if wanted, again and again."""
    before = signal.getsignal(signal.SIGALRM)

    def start(handler, seconds, interval=0.0):
        signal.signal(signal.SIGALRM, lambda number, frame: handler())
        signal.setitimer(signal.ITIMER_REAL, seconds, interval)

    yield start
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def poison(*shape):
    return torch.full(shape, torch.nan)


def forward():
    query, out = torch.randn(1, 8, LONG, 64), poison(1, 8, LONG, 64)
    problem = make_problem(query, query, query)
    return out, lambda: cpu.forward(problem, out, poison(1, 8, LONG))


def few_queries():
    """Their keys are read once, which takes longer than the alarm only if they are many."""
    query, key = torch.randn(1, 64, 8, 64), torch.randn(1, 1, 64, 64).expand(1, 64, -1, -1)
    key = key.repeat(1, 1, 20, 1).expand(400, -1, -1, -1)
    query, out = query.expand(400, -1, -1, -1), poison(400, 64, 8, 64)
    problem = make_problem(query, key, key)
    return out, lambda: cpu.forward(problem, out, poison(400, 64, 8))


def weights():
    query, out = torch.randn(1, 1, 4000, 64).expand(1, 200, -1, -1), poison(1, 4000, 4000)
    problem = make_problem(query, query, query)
    return out, lambda: cpu.weights(problem, torch.zeros(1, 200, 4000), out, True)


def backward():
    query = torch.randn(1, 8, LONG, 64)
    problem = make_problem(query, query, query)
    out, lse, gradient = torch.zeros_like(query), torch.zeros(1, 8, LONG), poison(1, 8, LONG, 64)
    others = poison(1, 8, LONG, 64), poison(1, 8, LONG, 64)
    return gradient, lambda: cpu.backward(problem, out, lse, query, None, gradient, *others, None)


def additive_problem():
    rows = torch.ones(1, LONG, 64)
    return rows, rows, rows, torch.ones(64), None, 0.0


def additive_forward():
    out = poison(1, LONG, 64)
    rows = poison(1, LONG), poison(1, LONG)
    return out, lambda: cpu._C.additive_forward(additive_problem(), out, *rows, torch.get_num_threads())


def additive_backward():
    """One chunk of keys: a single item of work."""
    rows, grad_value = torch.zeros(1, LONG), poison(1, LONG, 64)
    outputs = poison(1, 1, LONG, 64), poison(1, LONG, 64), grad_value, poison(1, 1, 64)
    inputs = rows, rows, torch.ones(1, LONG, 64)
    threads = torch.get_num_threads()
    return grad_value, lambda: cpu._C.additive_backward(additive_problem(), *inputs, *outputs, threads)


CALLS = (forward, few_queries, weights, backward, additive_forward, additive_backward)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_an_interrupt_ends_a_call_before_it_is_done(call, threads, on_alarm):
    out, compute = call()
    on_alarm(lambda: signal.default_int_handler(signal.SIGINT, None), 0.05)
    with pytest.raises(KeyboardInterrupt):
        compute()
    assert out.isnan().any()
    case = Case("next", queries=70, keys=90).make()
    torch.testing.assert_close(run_backend(cpu, case)["out"].double(), run_reference(case)["out"], rtol=1e-5, atol=1e-5)


def test_an_interrupt_passes_through_autograd(on_alarm):
    query = torch.randn(1, 8, LONG, 64, requires_grad=True)
    result = torch.zeros_like(query)

    class Gradient(torch.autograd.Function):
        """The engine's backward alone: a forward as long would have to be waited for."""

        @staticmethod
        def forward(ctx, query):
            return result

        @staticmethod
        def backward(ctx, grad_out):
            backward()[1]()

    out = Gradient.apply(query)
    on_alarm(lambda: signal.default_int_handler(signal.SIGINT, None), 0.05)
    with pytest.raises(KeyboardInterrupt):
        out.backward(result)


def test_a_handler_may_call_the_engine_and_return(threads, on_alarm):
    query = torch.randn(1, 8, 4000, 64)
    small = torch.randn(2, 4, 130, 64)
    expected, expected_small = (scaled_dot_product_attention(x, x, x) for x in (query, small))
    results = []
    on_alarm(lambda: results.append(scaled_dot_product_attention(small, small, small)), 0.02, 0.02)
    while len(results) < 5:
        assert torch.equal(scaled_dot_product_attention(query, query, query), expected)
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    assert all(torch.equal(result, expected_small) for result in results)


def test_calls_of_other_threads_go_on(on_alarm):
    query = torch.randn(1, 4, 4000, 64)
    expected = scaled_dot_product_attention(query, query, query)
    results, is_done = [], threading.Event()

    def attend():
        results.append(scaled_dot_product_attention(query, query, query))
        is_done.set()

    def interrupt():
        raise KeyboardInterrupt

    threading.Thread(target=attend).start()
    on_alarm(interrupt, 0.05)
    with pytest.raises(KeyboardInterrupt):
        threading.Event().wait(60)
    assert is_done.wait(60)
    assert torch.equal(results[0], expected)
