"""The CPU engine where rounding is all there is: cancellation, near-ties and scores that are exact.

Each case is one in which naive attention loses little or nothing, so that the error budget is tight.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fastattn import scaled_dot_product_attention
from fastattn.backends import cpu
from fastattn.problem import make_problem
from fastattn.testing import assert_within_budget, judge, run_backend, run_reference

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)

HALF_DTYPES = (torch.bfloat16, torch.float16)
#: Queries and keys: on the path of a few queries, in part of a panel, and in a whole one and more.
SIZES = ((1, 70), (5, 70), (20, 70), (70, 130))


def _normal(generator, *shape):
    return torch.randn(shape, generator=generator)


def _integers(generator, low, high, *shape):
    return torch.randint(low, high, shape, generator=generator).float()


# What a case changes of normal query, key, value and grad_out [1, 2, L, 64], and its other arguments.


def _lone_keys(generator, query, key, value, grad_out):
    """One key for each query: its weight is 1 whatever the score, and moves with nothing."""
    return {"attn_mask": torch.eye(*query.shape[2:3], key.shape[2], dtype=torch.bool), "dropout_p": 0.9}


def _lone_biases(generator, query, key, value, grad_out):
    """The same by a bias, beside which the score that is subtracted is rounded: the largest weight is not quite 1."""
    return {"attn_mask": 200 * torch.eye(*query.shape[2:3], key.shape[2]), "dropout_p": 0.1}


def _offset_values(generator, query, key, value, grad_out):
    """Gradients of out that do not see what all values share."""
    value += 100
    grad_out[..., 1::2] = -grad_out[..., ::2]
    return {}


def _tied_biases(generator, query, key, value, grad_out):
    query.zero_()
    return {"attn_mask": 3000 + _integers(generator, 0, 4, 1, 2, query.shape[2], key.shape[2]) / 2}


def _exact_scores_and_biases(generator, query, key, value, grad_out):
    query.copy_(_integers(generator, -3, 4, *query.shape))
    key.copy_(_integers(generator, -3, 4, *key.shape))
    bias = _integers(generator, 0, 4, 1, 2, query.shape[2], key.shape[2]) / 2 - 3000
    return {"attn_mask": bias, "scale": 0.125}


def _distant_alibi(generator, query, key, value, grad_out):
    slopes = torch.tensor([1 / 2, 1 / 16]).view(1, 2, 1, 1)
    return {"attn_mask": slopes * torch.arange(8000.0, 8000 + key.shape[2])}


def _exact_large_scores(generator, query, key, value, grad_out):
    query.copy_((query * 32).round() / 4)
    key.copy_((key * 16).round() / 16)
    return {"scale": 1.0}


def _exact_large_negated_scores(generator, query, key, value, grad_out):
    return _exact_large_scores(generator, query, key, value, grad_out) | {"scale": -1.0}


def _small_scores(generator, query, key, value, grad_out):
    return {"scale": 0.004}


def _all_but_equal_scores(generator, query, key, value, grad_out):
    query[:], key[:] = query[..., :1, :] / 4 + query / 64, key[..., :1, :] / 4
    return {"scale": 0.25}


CASES = {
    _lone_keys: HALF_DTYPES,
    _lone_biases: HALF_DTYPES,
    _offset_values: HALF_DTYPES,
    _tied_biases: (torch.float32,),
    _exact_scores_and_biases: (torch.float32,),
    _distant_alibi: (torch.float32,),
    _exact_large_scores: (torch.float32,),
    _exact_large_negated_scores: (torch.float32,),
    _small_scores: HALF_DTYPES,
    _all_but_equal_scores: HALF_DTYPES,
}
LSE_CASES = (_small_scores, _all_but_equal_scores)


@cache
def _problem_and_references(case, dtype, queries, keys):
    generator = torch.Generator().manual_seed(queries)
    tensors = [_normal(generator, 1, 2, length, 64) for length in (queries, keys, keys, queries)]
    arguments = case(generator, *tensors)
    query, key, value, grad_out = (tensor.to(dtype) for tensor in tensors)
    problem = make_problem(query, key, value, **arguments, rng_state=torch.tensor([queries, 0]))
    references = run_reference(problem, grad_out), run_reference(problem, grad_out, dtype=None)
    return problem, grad_out, references


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case, dtypes in CASES.items() for dtype in dtypes],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_within_budget(case, dtype, sizes, isa):
    problem, grad_out, references = _problem_and_references(case, dtype, *sizes)
    results = run_backend(cpu, problem, grad_out)
    if case in LSE_CASES:  # 16-bit gradients of one query are too few numbers to compare roundings by
        results = {name: results[name] for name in ("out", "lse")}
    assert_within_budget(results, problem, *references, grad_out)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("case", (_lone_keys, _lone_biases), ids=lambda case: case.__name__)
def test_out_and_its_residual_are_out_as_it_was(case, dtype, sizes, isa):
    """A lone key's value, times 10 or 10 / 9, is known to the last bit of float32; many lie amid two bfloat16."""
    problem, _, (exact, _) = _problem_and_references(case, dtype, *sizes)
    out = torch.empty_like(exact["out"], dtype=dtype)
    residual = torch.empty_like(out, dtype=torch.int16)
    cpu.forward(problem, out, torch.empty_like(exact["lse"], dtype=torch.float32), residual)
    if dtype == torch.bfloat16:
        whole = ((out.view(torch.int16).int() << 16) + residual.int()).view(torch.float32)
    else:
        whole = out.float() + residual.view(torch.float16).float() / 2048
    bits = 22 if dtype == torch.bfloat16 else 21
    torch.testing.assert_close(whole.double(), exact["out"], rtol=2.0**-bits, atol=1e-30)


def _plain(*tensors):
    return scaled_dot_product_attention(*tensors)


def _with_lse(*tensors):
    return scaled_dot_product_attention(*tensors, return_lse=True)[0]


def _compiled(*tensors):
    return torch.compile(_plain, fullgraph=True, backend="aot_eager")(*tensors)


def _gradients(attend, query, key, value, grad_out):
    query, key = query.clone().requires_grad_(), key.clone().requires_grad_()
    return torch.autograd.grad(attend(query, key, value), (query, key), grad_out)


def _pullback(query, key, value, grad_out):
    return torch.func.vjp(lambda query, key: _plain(query, key, value), query, key)[1](grad_out)


WAYS = {
    "plain": lambda *given: _gradients(_plain, *given),
    "with lse": lambda *given: _gradients(_with_lse, *given),
    "compiled": lambda *given: _gradients(_compiled, *given),
    "functional": _pullback,
    "mapped": lambda *given: torch.vmap(_pullback, in_dims=1, out_dims=1)(*(t.unsqueeze(2) for t in given)),
    "checkpointed": lambda *given: _gradients(
        lambda *tensors: torch.utils.checkpoint.checkpoint(_plain, *tensors, use_reentrant=False), *given
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_what_rounding_takes_from_out_reaches_the_backward(way, dtype):
    problem, grad_out, (exact, naive) = _problem_and_references(_offset_values, dtype, 5, 70)
    names = ("grad_query", "grad_key")
    gradients = WAYS[way](problem.query, problem.key, problem.value, grad_out)
    gradients = {name: gradient.reshape(exact[name].shape) for name, gradient in zip(names, gradients, strict=True)}
    assert_within_budget(gradients, problem, exact, naive, grad_out)


@pytest.mark.parametrize("value_size", (1.0, 1e-3))
@pytest.mark.parametrize("size", (1.0, 30.0))
@pytest.mark.parametrize("queries", (2, 38, 130))
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_the_gradient_of_a_float32_bias_is_as_precise_as_float32(dtype, queries, size, value_size, isa):
    """The budget is that of naive attention in float32; small values leave grad_lse, which is float32 too."""
    generator = torch.Generator().manual_seed(queries)
    query, key, value, grad_out = (
        _normal(generator, 3, 4, length, 40).to(dtype) for length in (queries, 70, 70, queries)
    )
    bias, grad_lse = size * _normal(generator, 1, 1, 1, 70), _normal(generator, 3, 4, queries)
    problem = make_problem(query, key, value * value_size, bias)
    exact = run_reference(problem, grad_out, grad_lse)
    in_float32 = run_reference(problem, grad_out, grad_lse, dtype=torch.float32)
    results = run_backend(cpu, problem, grad_out, grad_lse)
    judgements = judge(results, problem, exact, in_float32, grad_out, grad_lse)
    assert [j for j in judgements if j.name == "grad_bias" and not j.passed] == []


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_returned_weights_of_large_scores_add_up_to_one(dtype, isa):
    """Also beside a query whose every bias is the lowest number, and of a 16-bit call in float32."""
    query, key = (10 * torch.randn(1, 1, 40, 64).to(dtype) for _ in range(2))
    bias = torch.zeros(1, 1, 40, 40, dtype=dtype)
    bias[:, :, ::7] = torch.finfo(dtype).min
    problem = make_problem(query, key, key, bias)
    lse = run_backend(cpu, problem)["lse"]
    weights = torch.empty(1, 1, 40, 40, dtype=problem.lse_dtype)
    cpu.weights(problem, lse, weights, False)
    large = lse.isfinite() & (lse.abs() > 100) & (lse.abs() < 1e6)
    assert large.sum() > 20
    tolerance = 17 * torch.finfo(problem.lse_dtype).eps
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(lse), rtol=0, atol=tolerance)


@pytest.mark.parametrize("queries", (5, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, *HALF_DTYPES), ids=str)
def test_the_returned_weight_of_a_lone_key_is_one(dtype, queries, isa):
    """Scores of about 10, whose last digits depend on the order of their sums: the weights' is the forward's.

    The score in units of log2 e rounds by up to 8 units of a weight; an lse from another order is more off.
    """
    generator = torch.Generator().manual_seed(queries)
    query, key = (_normal(generator, 32, 8, length, 80).to(dtype) for length in (queries, 1))
    problem = make_problem(query, key, key, scale=1.0)
    lse = run_backend(cpu, problem)["lse"]
    of_ten = (lse.abs() > 8) & (lse.abs() < 16)  # such scores have no sum of their own
    assert of_ten.sum() > 30
    weights = torch.full((32, 8, queries, 1), torch.nan, dtype=problem.lse_dtype)
    cpu.weights(problem, lse, weights, False)
    tolerance = (10 if dtype == torch.float32 else 15) * torch.finfo(problem.lse_dtype).eps
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=tolerance)
    other_order = (query.to(lse) * key.to(lse)).flip(-1).cumsum(-1)[..., -1].contiguous()
    cpu.weights(problem, other_order, weights, False)
    assert (weights - 1.0).abs().max() > tolerance


@pytest.mark.parametrize("seed", range(12))
def test_large_scores_of_few_queries(seed, isa):
    """Naive attention sums so few in lanes, and keeps more digits than one long sum."""
    for queries in (1, 4, 6):
        generator = torch.Generator().manual_seed(seed)
        query, key, value = (_normal(generator, 2, 4, length, 188) for length in (queries, 13, 13))
        problem = make_problem(query, key, value, scale=0.96)
        exact, naive = run_reference(problem), run_reference(problem, dtype=None)
        assert_within_budget(run_backend(cpu, problem), problem, exact, naive)
