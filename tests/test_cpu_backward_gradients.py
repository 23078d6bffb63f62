"""Gradients of the CPU engine against float64 autograd, on every instruction set of the machine."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from fastattn.backends import cpu
from fastattn.problem import bias_gradient_shape, make_problem
from fastattn.reference import allowed
from fastattn.testing import (
    CASES,
    GRADIENTS,
    Case,
    assert_within_budget,
    run_backend,
    run_reference,
)

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Sizes that the table does not have: several blocks and chunks of keys, few heads, and bits of each.
LONG_CASES = (
    Case("chunks", batch=1, heads=1, queries=130, keys=1100, head_dim=24),
    Case("chunks_causal", batch=1, heads=2, kv_heads=1, queries=1030, head_dim=16, causal="upper_left"),
    Case("chunks_window", batch=1, heads=1, queries=1030, head_dim=16, window=(70, 3)),
    Case("chunks_lower_right", batch=2, heads=1, queries=70, keys=1050, causal="lower_right", key_lengths=(1050, 600)),
    Case("chunks_bias", batch=2, heads=2, queries=33, keys=1100, head_dim=16, bias="shared"),
    Case("chunks_bias_keys", batch=2, heads=2, queries=33, keys=1100, head_dim=16, bias="keys", dropout_p=0.2),
    Case("chunks_bias_queries", batch=2, heads=2, queries=33, keys=1100, head_dim=16, bias="queries"),
    Case("chunks_mask", batch=1, heads=2, queries=100, keys=1100, head_dim=16, mask="shared", masked_rows=True),
)
#: Scores of some 50 (double precision, whose truth has errors of its own) and some 400.
LARGE_SCORES = {torch.float64: 1.0, torch.float32: 8.0, torch.bfloat16: 8.0, torch.float16: 8.0}
LARGE_SCORE_CASES = (
    Case("plain", queries=70, keys=130),
    Case("chunks", batch=1, heads=1, queries=70, keys=1100, head_dim=40),
    Case("causal_gqa", heads=4, kv_heads=2, queries=130, causal="upper_left"),
    Case("mask", queries=70, keys=130, mask="full", masked_rows=True, key_lengths=(130, 100)),
    Case("bias", queries=70, keys=130, bias="per_head", masked_rows=True, window=(64, 8)),
    Case("dropout", queries=70, keys=130, dropout_p=0.2),
    Case("few_causal", queries=3, keys=20, head_dim=65, causal="upper_left", seed=1),
    Case("few_mask", queries=3, keys=20, head_dim=65, causal="upper_left", mask="full", seed=1),
    Case("few_bias", queries=3, keys=130, head_dim=65, causal="upper_left", bias="per_head", seed=1),
)


def _problem_and_gradients(case: Case, dtype: torch.dtype):
    problem = case.make(dtype=dtype)
    return problem, case.make_grad_out(dtype=dtype), case.make_grad_lse(dtype=problem.lse_dtype)


@cache
def _references(case: Case, dtype: torch.dtype):
    given = _problem_and_gradients(case, dtype)
    return run_reference(*given), run_reference(*given, dtype=None)


@pytest.mark.parametrize("case", (*CASES, *LONG_CASES), ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_within_budget(case, dtype, isa):
    problem, grad_out, grad_lse = _problem_and_gradients(case, dtype)
    results = run_backend(cpu, problem, grad_out, grad_lse)
    assert_within_budget(results, problem, *_references(case, dtype), grad_out)


@pytest.mark.parametrize("case", LARGE_SCORE_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_within_budget(case, dtype, isa):
    """The weights of a row add up to one however coarse an lse of hundreds is."""
    given = _problem_and_gradients(replace(case, scale=LARGE_SCORES[dtype]), dtype)
    results = run_backend(cpu, *given)
    references = run_reference(*given), run_reference(*given, dtype=None)
    assert results["lse"][results["lse"].isfinite()].abs().max() > 16
    assert_within_budget({name: results[name] for name in results if "grad" in name}, given[0], *references, given[1])


FORMS = {"plain": None, "mask": torch.arange(90) % 7 > 0, "bias": torch.zeros(90)}


@pytest.mark.parametrize("queries", (1, 3, 8, 40))
@pytest.mark.parametrize("form", FORMS)
def test_weights_add_up_to_one_where_no_lse_is_large(form, queries, isa):
    """The backward must round scores as the forward did, whose sum of weights an lse is.

    Against a loss of sum(out), grad_value of a key is the sum of its weights.
    """
    query = torch.full((1, 1, queries, 65), 1.1)
    key = torch.linspace(0.1, 0.16, 65).expand(1, 1, 90, 65)
    problem = make_problem(query, key, torch.ones(1, 1, 90, 1), attn_mask=FORMS[form], scale=1.0)
    results = run_backend(cpu, problem, torch.ones(1, 1, queries, 1))
    assert results["lse"].abs().max() < 16
    total = results["grad_value"].double().sum()
    torch.testing.assert_close(total, torch.full_like(total, queries), rtol=1e-6, atol=0)


@pytest.mark.parametrize("queries", (1, 3, 8, 40))
@pytest.mark.parametrize("form", FORMS)
def test_score_gradients_add_up_to_zero_where_scores_are_large(form, queries, isa):
    """Weights of the backward and `out` must come of the same scores, however coarse those are.

    A component that all keys share moves no weight: its gradient of a query is 0.
    """
    generator = torch.Generator().manual_seed(queries)
    query, key, value, grad_out = (
        torch.randn(1, 2, length, 64, generator=generator) / 8 for length in (queries, 90, 90, queries)
    )
    query[..., 0], key[..., 0] = 30.0, 30.0
    problem = make_problem(query, key, value, attn_mask=FORMS[form], scale=1.0)
    results = run_backend(cpu, problem, grad_out)
    assert results["lse"].min() > 850
    assert (results["grad_query"][..., 0] / 30).abs().max() < 1e-7


def _gradients(problem, out, lse, grad_out, grad_lse, wanted):
    """The engine's gradients; those not in ``wanted`` are not asked for."""
    like = dict(zip(GRADIENTS, (problem.query, problem.key, problem.value), strict=False))
    buffers = {
        name: torch.full(tensor.shape, torch.nan, dtype=tensor.dtype) if name in wanted else None
        for name, tensor in like.items()
    }
    buffers["grad_bias"] = torch.zeros(bias_gradient_shape(problem.bias)) if "grad_bias" in wanted else None
    cpu.backward(problem, out, lse, grad_out, grad_lse, **buffers)
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


@pytest.mark.parametrize("wanted", GRADIENTS)
def test_each_gradient_alone_is_the_same(wanted, isa):
    case = Case("alone", heads=4, kv_heads=2, queries=70, keys=90, head_dim=24, bias="per_head", dropout_p=0.2)
    problem, grad_out, grad_lse = _problem_and_gradients(case, torch.float32)
    out, lse = (tensor.float() for tensor in list(run_reference(problem).values())[:2])
    together = _gradients(problem, out, lse, grad_out, grad_lse, GRADIENTS)
    alone = _gradients(problem, out, lse, grad_out, grad_lse, (wanted,))
    # The scale is multiplied in earlier when nobody wants the bias's gradient.
    torch.testing.assert_close(alone[wanted], together[wanted], rtol=1e-6, atol=1e-6)
    references = (run_reference(problem, grad_out, grad_lse, dtype=kind) for kind in (torch.float64, None))
    assert_within_budget(alone, problem, *references, grad_out)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "case",
    (
        Case("heads", batch=2, heads=4, kv_heads=2, queries=130, head_dim=32, causal="upper_left", dropout_p=0.1),
        Case("chunks", batch=1, heads=1, queries=300, keys=1600, head_dim=32),
        Case("chunks_causal", batch=1, heads=4, kv_heads=2, queries=600, keys=1100, head_dim=32, causal="lower_right"),
        Case("shared_bias", batch=2, heads=2, queries=70, keys=1100, head_dim=16, bias="shared"),
        Case("large_scores", batch=1, heads=2, queries=300, keys=1100, head_dim=32, scale=400.0),
    ),
    ids=lambda case: case.name,
)
def test_bitwise_equal_across_threads(case, dtype, isa):
    given = _problem_and_gradients(case, dtype)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(run_backend(cpu, *given))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for name, tensor in runs[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("poison", (torch.nan, torch.inf))
@pytest.mark.parametrize("ingredient", ("key_lengths", "mask", "bias", "window"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_unattended_keys_and_values_change_nothing(ingredient, poison, dtype, isa):
    case = Case("padding", heads=2, kv_heads=1, queries=70, keys=220, head_dim=24)
    problem, grad_out, grad_lse = _problem_and_gradients(case, dtype)
    unattended = torch.zeros(220, dtype=torch.bool)
    if ingredient == "key_lengths":
        problem = problem._replace(key_lengths=torch.tensor([100, 64]))
        unattended[100:] = True
    elif ingredient == "window":
        problem = problem._replace(window_left=3, window_right=5)
        unattended[75:] = True
    else:
        unattended[torch.tensor([0, 1, 17, 63, 64, 101, 219])] = True
        if ingredient == "mask":
            problem = problem._replace(attn_mask=(~unattended).expand(2, 2, 70, 220))
        else:
            forbidding = torch.zeros(2, 2, 70, 220, dtype=dtype).masked_fill_(unattended, -torch.inf)
            problem = problem._replace(bias=forbidding)
    references = run_reference(problem)
    out, lse = references["out"].to(dtype), references["lse"].to(problem.lse_dtype)
    clean = _gradients(problem, out, lse, grad_out, grad_lse, GRADIENTS[:3])
    key, value = problem.key.clone(), problem.value.clone()
    key[..., unattended, :] = poison
    value[..., unattended, :] = poison
    poisoned = _gradients(problem._replace(key=key, value=value), out, lse, grad_out, grad_lse, GRADIENTS[:3])
    for name, tensor in clean.items():
        assert torch.equal(tensor, poisoned[name]), name
    assert not poisoned["grad_key"][..., unattended, :].any()
    assert not poisoned["grad_value"][..., unattended, :].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_key_that_is_not_finite_spares_the_queries_that_do_not_attend_to_it(dtype, isa):
    """Also those in a last block of a few queries, after a block of others that do attend."""
    case = Case("few", heads=1, queries=70, keys=90, head_dim=24)
    problem, grad_out, grad_lse = _problem_and_gradients(case, dtype)
    mask = torch.ones(2, 1, 70, 90, dtype=torch.bool)
    mask[:, :, 64:, 5] = False
    problem = problem._replace(attn_mask=mask)
    clean = run_backend(cpu, problem, grad_out, grad_lse)["grad_query"][:, :, 64:]
    key = problem.key.clone()
    key[:, :, 5] = torch.nan
    poisoned = run_backend(cpu, problem._replace(key=key), grad_out, grad_lse)["grad_query"][:, :, 64:]
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("poisoned", ("query", "grad_out"))
@pytest.mark.parametrize("ingredient", ("mask", "bias", "window", "causal"))
@pytest.mark.parametrize("queries", (3, 70))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_query_that_is_not_finite_spares_the_keys_that_it_does_not_attend_to(
    ingredient, queries, poisoned, dtype, isa
):
    """Their gradients are what they are where that query gives nothing; those of others are not finite."""
    # Beside a score of NaN the forward computes a panel's weights another way: others' bits may differ.
    tolerance = {"rtol": 0, "atol": 0 if poisoned == "grad_out" else 4 * torch.finfo(dtype).eps}
    case = Case("query", heads=2, kv_heads=1, queries=queries, keys=90, head_dim=24)
    if ingredient in ("mask", "bias"):
        case = replace(case, **{ingredient: "full"}, masked_rows=ingredient == "bias")
    problem, grad_out, _ = _problem_and_gradients(case, dtype)
    if ingredient == "window":
        problem = problem._replace(window_left=2, window_right=40)
    elif ingredient == "causal":
        problem = problem._replace(causal="upper_left")
    i = queries - 2  # a masked row is every third
    silent = grad_out.clone()
    silent[0, 0, i] = 0
    expected = run_backend(cpu, problem, silent)
    if poisoned == "query":
        query = problem.query.clone()
        query[0, 0, i] = torch.nan
        problem = problem._replace(query=query)
    else:
        grad_out[0, 0, i] = torch.inf
        grad_out[0, 0, i, ::2] = torch.nan
    actual = run_backend(cpu, problem, grad_out)
    seen = allowed(problem).expand(2, 2, queries, 90)[0, 0, i]
    assert 0 < seen.sum() < 90
    for name in ("grad_key", "grad_value"):
        torch.testing.assert_close(actual[name][0, 0, ~seen], expected[name][0, 0, ~seen], **tolerance)
        assert torch.equal(actual[name][1], expected[name][1]), name
        assert not actual[name][0, 0, seen].isfinite().any(), name
    others = torch.ones(2, 2, queries, dtype=torch.bool)
    others[0, 0, i] = False
    torch.testing.assert_close(actual["grad_query"][others], expected["grad_query"][others], **tolerance)
    if ingredient == "bias":
        assert torch.equal(actual["grad_bias"][0, 0, i].isfinite(), ~seen)


def test_rows_that_only_a_finite_bias_discourages(isa):
    """A bias of finfo.min, or another huge constant, on a whole row leaves nothing but equal weights."""
    case = Case("constant", queries=20, keys=40, head_dim=16, bias="full")
    problem, grad_out, _ = _problem_and_gradients(case, torch.float32)
    bias = problem.bias.clone()
    bias[:, :, 3] = torch.finfo(torch.float32).min
    bias[:, :, 7] = -1e9
    problem = problem._replace(bias=bias)
    results = run_backend(cpu, problem, grad_out)
    references = run_reference(problem, grad_out), run_reference(problem, grad_out, dtype=None)
    assert_within_budget({name: results[name] for name in GRADIENTS}, problem, *references, grad_out)
