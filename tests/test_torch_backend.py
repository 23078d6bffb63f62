"""torch's own attention as a backend: every case that it takes, and what its kernel alone would get wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastattn import dispatch, explain, reference, scaled_dot_product_attention
from fastattn.problem import make_problem
from fastattn.testing import CASES, SMOKE_CASES, Case, assert_within_budget, run_backend, run_reference

ENGINE = dispatch.load("torch")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF, torch.float64)
TAKEN = [case for case in CASES if case.dropout_p == 0.0]
#: Larger than the kernel's blocks, which it skips, or begins with, where nothing in them may be attended to.
LONG = [
    Case("long_window", batch=1, queries=300, keys=1700, window=(100, 0), causal="lower_right", head_dim=16),
    Case("long_causal", batch=1, queries=1030, head_dim=16, causal="upper_left"),
    Case("long_mask", batch=1, queries=70, keys=1100, head_dim=16, mask="shared", masked_rows=True),
]


def given(case, dtype):
    problem = case.make(dtype=dtype)
    return problem, case.make_grad_out(dtype=dtype), case.make_grad_lse(dtype=problem.lse_dtype)


def assert_exact(problem, grad_out, grad_lse):
    """out alone, and out, lse and gradients."""
    exact, naive = (run_reference(problem, grad_out, grad_lse, dtype=dtype) for dtype in (torch.float64, None))
    results = run_backend(ENGINE, problem, grad_out, grad_lse)
    assert_within_budget(results, problem, exact, naive, grad_out)
    alone = torch.full_like(results["out"], torch.nan)
    ENGINE.forward(problem, alone, None)
    assert_within_budget({"out": alone}, problem, exact, naive, grad_out)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in (*TAKEN, *LONG)]
    + [(case, dtype) for case in (*SMOKE_CASES, *LONG) if case.dropout_p == 0.0 for dtype in (*HALF, torch.float64)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_within_budget(case, dtype):
    problem, *gradients = given(case, dtype)
    assert ENGINE.reasons(problem) == []
    assert_exact(problem, *gradients)


@pytest.mark.parametrize("causal", ["upper_left", "lower_right"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_causality_with_a_scale_that_is_not_positive(scale, causal):
    """The kernel multiplies its -inf by the scale."""
    assert_exact(*given(Case("scaled", queries=40, scale=scale, causal=causal), torch.float32))


def test_what_it_does_not_take_has_a_reason():
    problem = Case("dropping", dropout_p=0.1).make()
    assert ENGINE.reasons(problem) == ["its kernel has no dropout"]
    assert "CPU" in ENGINE.reasons(Case("elsewhere").make(device="meta"))[0]
    with pytest.raises(ValueError, match="backend='torch' cannot compute this call: its kernel has no dropout"):
        scaled_dot_product_attention(*problem[:3], dropout_p=0.1, backend="torch")


HIDING = {
    "key_lengths": {"key_lengths": torch.tensor([6, 4])},
    "mask": {"attn_mask": torch.arange(8) < torch.tensor([6, 4]).view(2, 1, 1, 1)},
    "bias": {"attn_mask": torch.zeros(2, 1, 1, 8).masked_fill(torch.arange(8) >= 4, -torch.inf)},
    "mask of a group": {"attn_mask": (torch.arange(8) < 4).expand(2, 4, 1, 8).contiguous(), "enable_gqa": True},
    "lower_right": {"key_lengths": torch.tensor([6, 4]), "causal": "lower_right"},
    "upper_left": {"causal": "upper_left"},
    "window": {"window": (0, 1), "causal": "lower_right", "attn_mask": torch.arange(8) < 6},
}


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("name", HIDING)
def test_keys_that_nobody_may_attend_to_change_nothing(name, hidden):
    """Of every key that no query sees any bit is left, and none of its gradient: whatever it holds."""
    options = HIDING[name]
    heads = 2 if "enable_gqa" in options else 4
    query, key, value, grad_out = (torch.randn(2, h, n, 8) for h, n in ((4, 5), (heads, 8), (heads, 8), (4, 5)))
    problem = make_problem(query, key, value, **options)
    seen = reference.allowed(problem).expand(2, 4, 5, 8).any(2).unflatten(1, (heads, -1)).any(2)
    assert not seen.all()
    clean = run_backend(ENGINE, problem, grad_out, torch.ones(2, 4, 5))
    key, value = (rows.masked_fill(~seen.unsqueeze(-1), hidden) for rows in (key, value))
    dirty = run_backend(ENGINE, problem._replace(key=key, value=value), grad_out, torch.ones(2, 4, 5))
    for result in clean:
        assert torch.equal(clean[result], dirty[result]), result


@pytest.mark.parametrize("poisoned", ["query", "grad_out", "grad_lse"])
def test_a_query_that_may_attend_to_nothing_passes_nothing(poisoned):
    inputs = {name: torch.randn(1, 2, length, 8) for name, length in (("query", 5), ("key", 7), ("value", 7))}
    gradients = {"grad_out": torch.randn(1, 2, 5, 8), "grad_lse": torch.randn(1, 2, 5)}
    (inputs | gradients)[poisoned][:, :, 2] = torch.nan
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    results = run_backend(ENGINE, make_problem(**inputs, attn_mask=mask), **gradients)
    assert (results["out"][:, :, 2] == 0).all() and (results["lse"][:, :, 2] == -torch.inf).all()
    assert (results["grad_query"][:, :, 2] == 0).all()
    assert all(results[name].isfinite().all() for name in ("out", "grad_query", "grad_key", "grad_value"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [4, 40])
def test_what_is_not_a_number_is_not_hidden(keys, dtype):
    """The kernel takes the largest score of a row, and a NaN beside few others for none."""
    query, key, value = (torch.randn(1, 2, length, 8, dtype=dtype) for length in (5, keys, keys))
    query[:, :, 1] = torch.nan
    key[:, 1] = torch.nan
    out, lse = scaled_dot_product_attention(query, key, value, backend="torch", return_lse=True)
    alone = scaled_dot_product_attention(query, key, value, torch.arange(keys) > 1, backend="torch")
    for result in (out, lse, alone):
        assert result[:, 1].isnan().all()
        assert result[:, 0, 1].isnan().all()
        assert result[:, 0, [0, 2, 3, 4]].isfinite().all()
    gradient = torch.zeros_like(query)
    ENGINE.backward(make_problem(query, key, value), out, lse, torch.ones_like(out), None, gradient, None, None, None)
    assert gradient[:, 1].isnan().all() and gradient[:, 0, 1].isnan().all()
    assert gradient[:, 0, [0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [-1.0, -1e-30, -3000 / 3.4e38], ids=["lowest", "1e8", "thousands"])
def test_gradients_beside_large_biases(size, dtype):
    """Rows of them have an lse in which the sum of the weights has no place."""
    problem, grad_out, grad_lse = given(Case("large", queries=9, keys=20), dtype)
    row = torch.zeros(9, 20, dtype=dtype)
    row[::2] = size * min(3.4e38, torch.finfo(dtype).max)
    assert_exact(problem._replace(bias=row.expand(2, 2, 9, 20)), grad_out, grad_lse)


def test_a_bias_without_a_gradient_stays_off_the_dense_path(monkeypatch):
    problem, grad_out, grad_lse = given(Case("mask", queries=9, keys=20), torch.float32)
    problem = problem._replace(bias=torch.randn(9, 20).expand(2, 2, 9, 20))
    exact = run_reference(problem, grad_out, grad_lse)
    monkeypatch.setattr(reference, "gradients", None)
    out, lse = torch.empty(2, 2, 9, 64), torch.empty(2, 2, 9)
    ENGINE.forward(problem, out, lse)
    gradients = [torch.full_like(tensor, torch.nan) for tensor in problem[:3]]
    ENGINE.backward(problem, out, lse, grad_out, grad_lse, *gradients, None)
    for gradient, name in zip(gradients, ("grad_query", "grad_key", "grad_value"), strict=True):
        torch.testing.assert_close(gradient.double(), exact[name], rtol=1e-4, atol=1e-5)


def test_key_lengths_cost_only_the_keys_that_are_left(monkeypatch):
    """The kernel gets no key past the longest sequence, and no mask where all are as long."""
    asked = []
    kernel = ENGINE._forward
    monkeypatch.setattr(
        ENGINE, "_forward", lambda *args, **options: asked.append((args, options)) or kernel(*args, **options)
    )
    case = Case("padded", queries=5, keys=100)
    for lengths in ((30, 30), (30, 7)):
        run_backend(ENGINE, replace(case, key_lengths=lengths).make())
    (_, key, *_), options = asked[0]
    assert key.shape[2] == 30 and options["attn_mask"] is None
    (_, key, *_), options = asked[1]
    assert key.shape[2] == 30 and options["attn_mask"].shape == (2, 1, 1, 30)


def test_the_number_of_threads_changes_no_bit():
    code = """
import torch
from fastattn import dispatch
from fastattn.testing import Case, run_backend
for case in (Case("one", batch=1, heads=1, queries=300, keys=200), Case("few", batch=1, heads=3, queries=1, keys=900)):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run_backend(dispatch.load("torch"), case.make(), case.make_grad_out(), case.make_grad_lse()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_explain_says_what_is_dense():
    query = torch.zeros(1, 1, 40, 8)

    def notes(**arguments) -> tuple[str, ...]:
        return explain(query, query, query, backend="torch", **arguments).notes

    plain = notes(is_causal=True)
    assert plain == ("dense, in O(Lq * Lk) memory: every gradient where |lse| is over 64",)
    assert notes(key_lengths=[7]) == plain
    (window,) = notes(window=(3, 0))
    assert window.endswith("; the mask that says what a query may attend to")
    (biased,) = notes(attn_mask=torch.zeros(40, 40))
    assert biased.endswith("; the gradient of a bias")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_gradients_of_large_scores_without_a_bias(dtype):
    """Scores of some hundreds, whose rounded lse would cost their weights ten times the budget."""
    case = Case("large", batch=1, heads=2, queries=5, keys=300, head_dim=32, scale=4.0)
    problem, grad_out = case.make(dtype=dtype), case.make_grad_out(dtype=dtype)
    results = run_backend(ENGINE, problem, grad_out)
    exact, naive = run_reference(problem, grad_out), run_reference(problem, grad_out, dtype=None)
    assert results["lse"].abs().max() > 64
    assert_within_budget(results, problem, exact, naive, grad_out)
