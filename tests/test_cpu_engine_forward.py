"""Forward of the CPU engine against the float64 reference, on every instruction set of the machine."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from fastattn import reference
from fastattn.backends import cpu
from fastattn.problem import make_problem
from fastattn.testing import CASES, Case, assert_within_budget, run_backend, run_reference

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Several blocks of keys and panels of queries, and few queries against keys in several chunks.
LONG_CASES = (
    Case("blocks", batch=1, heads=1, queries=300, keys=700, head_dim=24),
    Case("blocks_causal", batch=1, heads=2, kv_heads=1, queries=530, head_dim=16, causal="upper_left"),
    Case("blocks_lower_right", batch=2, queries=70, keys=400, causal="lower_right", key_lengths=(400, 131)),
    Case("blocks_window", batch=1, heads=1, queries=530, head_dim=16, window=(70, 33)),
    Case("blocks_window_causal", batch=1, heads=1, queries=600, head_dim=8, window=(100, None), causal="upper_left"),
    Case("blocks_everything", heads=4, kv_heads=2, queries=200, keys=333, head_dim=16, mask="full", bias="keys",
         masked_rows=True, key_lengths=(333, 140), causal="lower_right", dropout_p=0.3),
    Case("chunks", heads=4, kv_heads=1, queries=1, keys=1500, head_dim=80, value_dim=200),
    Case("chunks_two_queries", heads=2, queries=2, keys=1300, head_dim=33, causal="lower_right", bias="full"),
    Case("chunks_mask", queries=3, keys=1300, head_dim=64, mask="full", masked_rows=True, dropout_p=0.2),
    Case("chunks_window", queries=1, keys=2000, head_dim=64, causal="lower_right", window=(600, None)),
)  # fmt: skip


@cache
def _references(case: Case, dtype: torch.dtype):
    problem = case.make(dtype=dtype)
    return run_reference(problem), run_reference(problem, dtype=None)


@pytest.mark.parametrize("case", (*CASES, *LONG_CASES), ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_within_budget(case, dtype, isa):
    problem = case.make(dtype=dtype)
    assert_within_budget(run_backend(cpu, problem), problem, *_references(case, dtype))


@pytest.mark.parametrize("queries", (1, 40))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_lse_of_equal_scores_is_exact(dtype, queries, isa):
    """The exponential of a low-precision dtype may be coarse, but not in the sum of weights of 1."""
    problem = Case("equal", queries=queries, keys=1000, head_dim=16, scale=0.0).make(dtype=dtype)
    lse = run_backend(cpu, problem)["lse"]
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(1000)), rtol=3e-7, atol=0.0)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("causal_lower_right", "mask_rows", "dropout", "everything",
                                                     "gqa", "bias_full", "empty_keys", "value_dim_5_80")],
    ids=lambda case: case.name,
)  # fmt: skip
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("average", (False, True))
def test_weights(case, dtype, average, isa):
    problem = case.make(dtype=dtype)
    out = torch.empty(*problem.query.shape[:3], problem.value.shape[3], dtype=dtype)
    lse = torch.empty(out.shape[:3], dtype=problem.lse_dtype)
    cpu.forward(problem, out, lse)
    exact = reference.weights(reference.in_dtype(problem, torch.float64), average)
    actual = torch.full_like(exact, torch.nan, dtype=problem.lse_dtype)
    cpu.weights(problem, lse, actual, average)
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-4}[dtype]
    torch.testing.assert_close(actual.double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_is_written_in_any_layout(dtype, isa):
    problem = Case("layout", queries=70, head_dim=40, value_dim=24).make(dtype=dtype)
    expected = run_backend(cpu, problem)["out"]
    buffer = torch.full((2, 70, 2, 30), torch.nan, dtype=dtype)  # [B, L, H, Dv + 6]
    out = buffer.permute(0, 2, 1, 3)[..., 3:27]
    cpu.forward(problem, out, torch.empty(2, 2, 70, dtype=problem.lse_dtype))
    assert torch.equal(out, expected)
    assert buffer[..., :3].isnan().all() and buffer[..., 27:].isnan().all()


@pytest.mark.parametrize("queries", (1, 65))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("form", ("key_lengths", "mask"))
def test_padding_does_not_leak(queries, dtype, value, form, isa):
    clean = Case("clean", queries=queries, keys=200, head_dim=32).make(dtype=dtype)
    if form == "key_lengths":
        clean = clean._replace(key_lengths=torch.tensor([131, 131]))
    else:
        clean = clean._replace(attn_mask=(torch.arange(200) < 131).expand(2, 2, queries, 200))
    expected = run_backend(cpu, clean)
    assert expected["out"].isfinite().all()
    key, val = clean.key.clone(), clean.value.clone()
    key[:, :, 131:] = value
    val[:, :, 131:] = value
    actual = run_backend(cpu, clean._replace(key=key, value=val))
    assert torch.equal(actual["out"], expected["out"]) and torch.equal(actual["lse"], expected["lse"])


@pytest.mark.parametrize("queries", (1, 65))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_of_lowest_bias_is_the_mean(queries, dtype, isa):
    problem = Case("lowest", queries=queries, keys=150, head_dim=16).make(dtype=dtype)
    bias = torch.full((2, 2, queries, 150), torch.finfo(dtype).min, dtype=dtype)
    biased = problem._replace(bias=bias)
    results = run_backend(cpu, biased)
    out, lse = results["out"].double(), results["lse"].double()
    # bfloat16's lowest is a little above float32's, which is what has no place in log2 units becomes.
    exact = run_reference(biased)
    torch.testing.assert_close(lse, exact["lse"], rtol=5e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)
    if dtype == torch.float16:
        # Its lowest bias leaves scores apart, but for what float32 rounds them by: 2^-8 at 65504 in log2 units. So
        # much may each weight be off, and the result by what the values then move it.
        query, key, value = (x.double() for x in problem[:3])
        weights = (problem.scale * query @ key.mT).softmax(-1)
        distance = (value.unsqueeze(2) - exact["out"].unsqueeze(3)).abs()
        moved = (2 ** (2**-8) - 1) * (weights.unsqueeze(3) @ distance).squeeze(3)
        assert ((out - exact["out"]).abs() <= moved + torch.finfo(dtype).eps / 2 * exact["out"].abs()).all()
    else:
        mean = problem.value.double().mean(2, keepdim=True).expand_as(out)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-9}[dtype]
        torch.testing.assert_close(out, mean, atol=tolerance, rtol=0)


def _weights(problem):
    lse = run_backend(cpu, problem)["lse"]
    weights = torch.full((*lse.shape, problem.key.shape[2]), torch.nan, dtype=problem.lse_dtype)
    cpu.weights(problem, lse, weights, False)
    return weights.double()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("queries", (1, 40))
def test_weights_of_a_row_of_lowest_bias_are_equal(queries, dtype, isa):
    """Its lse has lost the sum of weights beside a bias of that size."""
    problem = Case("lowest", queries=queries, keys=150, head_dim=16).make(dtype=dtype)
    bias = torch.full((queries, 150), torch.finfo(dtype).min, dtype=dtype).expand(2, 2, -1, -1)
    weights = _weights(problem._replace(bias=bias))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 150), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (Case("few", queries=3, keys=300, scale=400.0),
                                  Case("many", queries=40, bias="full", scale=400.0)),
                         ids=lambda case: case.name)  # fmt: skip
def test_weights_of_large_scores_add_up_to_one(case, dtype, isa):
    problem = case.make(dtype=dtype)
    assert run_backend(cpu, problem)["lse"].min() > 1024
    total = _weights(problem).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)


@pytest.mark.parametrize("growth", (0.0, 3.0, -3.0))
def test_scores_that_grow_along_the_keys(growth, isa):
    """Maxima far above those of earlier blocks make the engine renew its reference."""
    problem = Case("growth", batch=1, queries=40, keys=900, head_dim=16).make()
    key = problem.key + growth * torch.arange(900.0)[:, None] / problem.scale / 16
    query = problem.query * 0.01 + 1.0
    case = problem._replace(query=query, key=key)
    assert_within_budget(run_backend(cpu, case), case, run_reference(case), run_reference(case, dtype=None))


def test_nan_in_a_query_stays_in_its_row(isa):
    problem = Case("nan", batch=1, queries=70, head_dim=16).make()
    expected = run_backend(cpu, problem)["out"]
    query = problem.query.clone()
    query[0, 0, 5, 3] = torch.nan
    out = run_backend(cpu, problem._replace(query=query))["out"]
    assert out[0, 0, 5].isnan().all()
    out[0, 0, 5] = expected[0, 0, 5]
    torch.testing.assert_close(out, expected)


def test_scores_beyond_the_range_of_exponentials(isa):
    query = torch.tensor([1e4, -1e4]).repeat(40)[None, None, :, None]
    problem = make_problem(
        query, torch.tensor([-1.0, 1.0]).repeat(60)[None, None, :, None], torch.arange(120.0)[None, None, :, None]
    )
    expected, _ = reference.attention(reference.in_dtype(problem, torch.float64))
    torch.testing.assert_close(run_backend(cpu, problem)["out"].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("queries", (3, 70))
def test_a_key_that_a_bias_forbids_to_all_cannot_leak(isa, queries, dtype):
    query, key, value = (torch.randn(1, 2, length, 16).to(dtype) for length in (queries, 90, 90))
    bias = torch.zeros(queries, 90, dtype=dtype)
    bias[:, 7] = -torch.inf
    clean = run_backend(cpu, make_problem(query, key, value, attn_mask=bias))
    key[:, :, 7], value[:, :, 7] = torch.nan, torch.inf
    dirty = run_backend(cpu, make_problem(query, key, value, attn_mask=bias))
    assert torch.equal(clean["out"], dirty["out"]) and torch.equal(clean["lse"], dirty["lse"])


@pytest.mark.parametrize("form", ("plain", "mask", "causal", "lowest"))
@pytest.mark.parametrize("queries", (1, 4, 70))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_of_nan_gives_nan(form, queries, dtype, isa):
    """In out, in lse, and in the weights of the keys that it sees."""
    problem = Case("nan", batch=1, queries=queries, keys=queries + 5, head_dim=16).make(dtype=dtype)
    if form == "mask":
        problem = problem._replace(attn_mask=(torch.arange(queries + 5) % 3 > 0).expand(1, 2, queries, queries + 5))
    elif form == "causal":
        problem = problem._replace(causal="lower_right")
    elif form == "lowest":
        bias = torch.full((1, 2, queries, queries + 5), torch.finfo(dtype).min, dtype=dtype)
        problem = problem._replace(bias=bias)
    query = problem.query.clone()
    query[0, 0, -1] = torch.nan
    problem = problem._replace(query=query)
    results, others = run_backend(cpu, problem), torch.ones(1, 2, queries, dtype=torch.bool)
    others[0, 0, -1] = False
    for name in ("out", "lse"):
        assert results[name][0, 0, -1].isnan().all() and results[name][others].isfinite().all(), name
    weights = torch.empty(1, 2, queries, queries + 5, dtype=problem.lse_dtype)
    cpu.weights(problem, results["lse"], weights, False)
    seen = reference.allowed(problem).expand_as(weights)
    assert torch.equal(weights.isnan(), seen & ~others.unsqueeze(-1))
    assert (weights[~seen] == 0).all()


@pytest.mark.parametrize("queries", (1, 40))
def test_subnormal_numbers_of_float16_are_read_and_written(queries, isa):
    """All 1023 of both signs, from 2^-24 on: the engine flushes float32's subnormal numbers alone."""
    numbers = torch.arange(1024, dtype=torch.int16).view(torch.float16)
    numbers = torch.cat((numbers, -numbers))[None, None, None]
    ones, many = torch.ones(1, 1, 1, 2048, dtype=torch.float16), numbers.expand(1, 1, queries, 2048)
    problem = make_problem(many, ones, numbers, scale=1.0)
    results = run_backend(cpu, problem, many.contiguous(), None)
    assert torch.equal(results["out"], many)
    torch.testing.assert_close(results["grad_value"], queries * numbers, rtol=2**-10, atol=0)
    # Their sum is 0; that of the positive ones is 1023 * 512 / 2^24, read with the budget of an lse.
    budget = 16 * torch.finfo(torch.float32).eps
    ones[..., 1024:] = 0
    lse = run_backend(cpu, make_problem(many, ones, numbers, scale=1.0))["lse"]
    torch.testing.assert_close(lse, torch.full_like(lse, 1023 * 512 / 2**24), rtol=0, atol=budget)
    lse = run_backend(cpu, make_problem(ones.expand(1, 1, queries, 2048), numbers, numbers, scale=1.0))["lse"]
    torch.testing.assert_close(lse, torch.full_like(lse, 1023 * 512 / 2**24), rtol=0, atol=budget)
