"""Blocks whose weights are computed beside the products: references that turn out wrong, and odd values."""

from __future__ import annotations

import pytest
import torch

from fastattn.backends import cpu
from fastattn.problem import make_problem
from fastattn.testing import assert_within_budget, run_backend, run_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Two blocks of keys and a rest, two full panels of queries and a rest.
KEYS, QUERIES = 517, 130


@pytest.fixture(params=cpu.available_isas(), autouse=True)
def isa(request):
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def inputs(dtype, head_dim=64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, QUERIES, head_dim), (1, 2, KEYS, head_dim), (1, 2, KEYS, head_dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check(query, key, value, **options):
    problem = make_problem(query, key, value, **options)
    actual = run_backend(cpu, problem)
    assert_within_budget(actual, problem, run_reference(problem), run_reference(problem, dtype=None))


@pytest.mark.parametrize("causal", [None, "lower_right"])
@pytest.mark.parametrize("head_dim", [12, 24, 64, 72])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_spacing_of_exponentials_and_products(dtype, head_dim, causal):
    check(*inputs(dtype, head_dim), causal=causal)


@pytest.mark.parametrize("place", [3, 100, 300, KEYS - 1])
@pytest.mark.parametrize("factor", [20.0, -20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_from_the_first_ones(dtype, factor, place):
    """One key scores hundreds more, or less, than those from which the reference is taken."""
    query, key, value = inputs(dtype)
    query[..., 0] = 6.0
    key[:, :, place, 0] = 6.0 * factor
    check(query, key, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_scores_far_below_those_of_the_first_tile(dtype):
    query, key, value = inputs(dtype)
    query[..., 0] = 8.0
    key[:, :, 12:, 0] = -100.0
    check(query, key, value)


@pytest.mark.parametrize("scale", [3e4, 1e-4, -2.0])
def test_extreme_scales(scale):
    check(*inputs(torch.float32), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key_that_outweighs_all_gives_its_value(dtype):
    """Exactly where the output's rounding hides float32's: the sum is of weights rounded as for the product."""
    query, key, value = inputs(dtype)
    query[..., 0] = 16.0
    key[..., 0] = 0.0
    key[:, :, 200, 0] = 100.0
    problem = make_problem(query, key, value)
    out = run_backend(cpu, problem)["out"]
    rtol = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0
    torch.testing.assert_close(out, value[:, :, 200:201].expand_as(out), rtol=rtol, atol=0.0)


@pytest.mark.parametrize("place", [0, 5, 130, 516])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F800001, -1], ids=str)
def test_nan_of_any_payload_reaches_every_query(bits, place):
    query, key, value = inputs(torch.float32)
    key.view(torch.int32)[0, 1, place, 7] = bits
    results = run_backend(cpu, make_problem(query, key, value))
    for result in (results["out"], results["lse"]):
        assert result[0, 0].isfinite().all()
        assert result[0, 1].isnan().all()


@pytest.mark.parametrize("place", [0, 130])
def test_infinite_scores(place):
    query, key, value = inputs(torch.float32)
    query[..., 3] = query[..., 3].abs() + 0.1
    key[0, 0, place, 3] = -torch.inf  # weight 0
    key[0, 1, place, 3] = torch.inf  # inf - inf
    results = run_backend(cpu, make_problem(query, key, value))
    expected = run_reference(make_problem(query, key, value))
    torch.testing.assert_close(results["out"].double(), expected["out"], equal_nan=True, rtol=0, atol=1e-5)
    assert results["out"][0, 1].isnan().all()


@pytest.mark.parametrize("place", [0, 3, 140])
@pytest.mark.parametrize("factor", [20.0, -20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_that_score_far_from_the_others(dtype, factor, place):
    """A reference taken from a key out of sight is of no use to those in sight."""
    query, key, value = inputs(dtype)
    query[..., 0] = 6.0
    key[:, :, place, 0] = 6.0 * factor
    mask = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, place] = False
    mask[::5, :200] = False  # nothing in sight in the first block
    mask[::7] = False  # nothing at all
    check(query, key, value, attn_mask=mask)
    bias = torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(2)).masked_fill(~mask, -torch.inf)
    check(query, key, value, attn_mask=bias.to(dtype))


@pytest.mark.parametrize("first", [128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_nothing_of_the_first_blocks_but_all_of_the_others(dtype, first):
    """The blocks that it sees need no mask, and what it could not see scored hundreds more."""
    query, key, value = inputs(dtype)
    key, value = key[:, :, :512], value[:, :, :512]
    query[..., 0] = 16.0
    key[:, :, :first, 0] = 100.0
    mask = torch.ones(QUERIES, 512, dtype=torch.bool)
    mask[::5, :first] = False
    check(query, key, value, attn_mask=mask)


@pytest.mark.parametrize("low", [-1e4, -1e9, -1e38])
def test_biases_that_hide_without_forbidding(low):
    mask = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[::5, :200] = False
    mask[::7] = False
    check(*inputs(torch.float32), attn_mask=torch.zeros(QUERIES, KEYS).masked_fill(~mask, low))


@pytest.mark.parametrize("more_keys", [0, 1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 119, 190])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_band_edge_anywhere_in_a_block(dtype, more_keys):
    """The first query sees one key more than ``more_keys``, each next one a key more."""
    query, key, value = (x[:, :, : QUERIES + more_keys] for x in inputs(dtype))
    check(query, key, value, causal="lower_right")
    check(query, key, value, window=(None, more_keys))
    check(query, key, value, window=(70, more_keys))
    check(query, key, value, window=(None, more_keys), key_lengths=torch.tensor([QUERIES + more_keys // 2]))


@pytest.mark.parametrize("place", [1, 5, 64, 70, 127, 128])
@pytest.mark.parametrize("factor", [20.0, -20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_that_scores_far_from_the_others_and_that_only_later_queries_see(dtype, factor, place):
    query, key, value = (x[:, :, :QUERIES] for x in inputs(dtype))
    query[..., 0] = 6.0
    key[:, :, place, 0] = 6.0 * factor
    check(query, key, value, causal="upper_left")


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [1, 5, 64, 70, 127])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite_do_not_reach_queries_before_them(dtype, place, number):
    query, key, value = (x[:, :, :QUERIES] for x in inputs(dtype))
    clean = make_problem(query, key, value, causal="upper_left")
    key = key.clone()
    key[:, :, place] = number
    actual = run_backend(cpu, make_problem(query, key, value, causal="upper_left"))
    assert actual["out"][:, :, place:].isnan().any()
    results = run_backend(cpu, clean)
    for name, result in results.items():
        result[:, :, :place] = actual[name][:, :, :place]
    assert_within_budget(results, clean, run_reference(clean), run_reference(clean, dtype=None))


@pytest.mark.parametrize("options", [{"window": (None, 1)}, {"window": (None, 2)}, {"causal": "lower_right"}], ids=str)
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_past_a_panels_last_key_does_not_reach_it(dtype, hidden, options):
    """Keys of 16 bits come in pairs, and other panels of the item see the second one of the last pair."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 32, length, 16, generator=generator).to(dtype) for length in (139, 140, 140))
    mask = torch.ones(139, 140, dtype=torch.bool)
    places = [65, 66, 69, 129, 130] if hidden else [66 if options.get("window") == (None, 2) else 65]
    if hidden:
        mask[:, places] = False
        options = options | {"attn_mask": mask}
    reached = 139 if hidden else 64  # queries of the first panel see 65 keys or 66
    expected = run_backend(cpu, make_problem(query, key, value, **options))["out"]
    value[:, :, places] = torch.nan
    actual = run_backend(cpu, make_problem(query, key, value, **options))["out"]
    assert expected.isfinite().all() and torch.equal(actual[:, :, :reached], expected[:, :, :reached])
