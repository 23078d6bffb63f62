"""The reference against independent truths: torch, autograd, published vectors, examples by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastattn import reference
from fastattn.problem import make_problem
from fastattn.testing import CASES, Case


def tensors(*shapes, dtype=torch.float64):
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    """The known answers of Random123 (Salmon et al., 2011) for philox4x32-10."""
    counter, key = torch.tensor(counter), torch.tensor(key)
    assert tuple(int(word) for word in reference.philox((counter,) * 4, (key,) * 2)) == expected


def test_philox_with_mixed_words():
    words = [torch.tensor(word) for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    key = torch.tensor(0xA4093822), torch.tensor(0x299F31D0)
    expected = (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert tuple(int(word) for word in reference.philox(tuple(words), key)) == expected


@pytest.mark.parametrize("is_causal", [False, True])
def test_plain_attention_is_torchs(is_causal):
    query, key, value = tensors((2, 3, 17, 8), (2, 3, 29, 8), (2, 3, 29, 5))
    out, lse = reference.attention(make_problem(query, key, value, is_causal=is_causal))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, is_causal=is_causal))
    scores = query @ key.mT / 8**0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones(17, 29).tril().bool(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_masks_and_groups_are_torchs():
    query, key, value = tensors((2, 6, 9, 8), (2, 2, 13, 8), (2, 2, 13, 8))
    for mask in (torch.rand(2, 1, 9, 13) < 0.6, torch.randn(6, 9, 13, dtype=torch.float64)):
        out, _ = reference.attention(make_problem(query, key, value, mask, enable_gqa=True, scale=0.3))
        expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out, expected)


def band(queries, keys, **ingredients):
    query, key = torch.zeros(len(ingredients.get("key_lengths", [0])), 1, queries, 1), None
    key = torch.zeros(query.shape[0], 1, keys, 1)
    permitted = reference.allowed(make_problem(query, key, key, **ingredients))[:, 0]
    return ["/".join("".join(".x"[int(cell)] for cell in row) for row in sequence) for sequence in permitted]


def test_the_band_by_hand():
    assert band(3, 5, causal="upper_left") == ["x..../xx.../xxx.."]
    assert band(3, 5, causal="lower_right") == ["xxx../xxxx./xxxxx"]
    assert band(5, 3, causal="lower_right") == [".../.../x../xx./xxx"]
    assert band(3, 5, window=(1, 2)) == ["xxx../xxxx./.xxxx"]
    assert band(4, 4, window=(0, 0)) == ["x.../.x../..x./...x"]
    assert band(3, 5, window=(None, 1)) == ["xx.../xxx../xxxx."]
    assert band(2, 4, window=(1, 3), causal="lower_right") == [".xx./..xx"]


def test_the_band_with_key_lengths_by_hand():
    assert band(2, 4, key_lengths=[4, 2, 0]) == ["xxxx/xxxx", "xx../xx..", "..../...."]
    assert band(2, 4, key_lengths=[4, 3, 1], causal="lower_right") == ["xxx./xxxx", "xx../xxx.", "..../x..."]
    assert band(2, 4, key_lengths=[3, 1], causal="upper_left") == ["x.../xx..", "x.../x..."]
    assert band(2, 5, key_lengths=[5, 3], causal="lower_right", window=(1, 0)) == ["..xx./...xx", "xx.../.xx.."]


def test_rows_that_attend_to_nothing():
    query, key, value = tensors((1, 1, 4, 8), (1, 1, 6, 8), (1, 1, 6, 8))
    mask = torch.rand(1, 1, 4, 6) < 0.5
    mask[..., 1, :], mask[..., 2, :] = False, True
    problem = make_problem(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), mask)
    out, lse = reference.attention(problem)
    assert out[0, 0, 1].abs().max() == 0
    assert lse[0, 0, 1] == -torch.inf
    assert reference.weights(problem)[0, 0, 1].abs().max() == 0
    (out.sum() + lse[0, 0, [0, 2, 3]].sum()).backward()
    assert query.grad[0, 0, 1].abs().max() == 0
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))


def test_finfo_min_everywhere_gives_the_mean_and_inf_gives_nothing():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        query, key, value = tensors((1, 1, 2, 8), (1, 1, 6, 8), (1, 1, 6, 8), dtype=dtype)
        bias = torch.full((2, 6), torch.finfo(dtype).min, dtype=dtype)
        out, _ = reference.attention(make_problem(query, key, value, bias))
        torch.testing.assert_close(out[0, 0], value[0, 0].mean(0).expand(2, 8), rtol=0.02, atol=0.02)
        out, _ = reference.attention(make_problem(query, key, value, torch.full_like(bias, -torch.inf)))
        assert out.abs().max() == 0


def test_padding_cannot_leak():
    query, key, value = tensors((2, 2, 4, 8), (2, 2, 6, 8), (2, 2, 6, 8))
    lengths = torch.tensor([4, 6])
    expected, expected_lse = reference.attention(make_problem(query, key, value, key_lengths=lengths))
    key[0, :, 4:], value[0, :, 4:] = torch.nan, torch.inf
    out, lse = reference.attention(make_problem(query, key, value, key_lengths=lengths))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0)


def test_dropout_drops_at_its_rate_and_depends_on_the_position_alone():
    query = torch.zeros(2, 3, 64, 4)
    key = torch.zeros(2, 3, 101, 4)
    state = torch.tensor([12345, 6])
    problem = make_problem(query, key, key, dropout_p=0.3, rng_state=state)
    keep = reference.dropout_keep(problem)
    # 38,784 trials: the standard deviation of the mean is 0.0023.
    assert abs(keep.double().mean().item() - 0.7) < 0.01
    small = make_problem(query[:1, :2, :10], key[:1, :2, :7], key[:1, :2, :7], dropout_p=0.3, rng_state=state)
    assert torch.equal(reference.dropout_keep(small), keep[:1, :2, :10, :7])
    for other in (torch.tensor([12346, 6]), torch.tensor([12345, 7]), torch.tensor([12345 + 2**32, 6])):
        assert not torch.equal(reference.dropout_keep(problem._replace(rng_state=other)), keep)


def test_dropout_scales_what_it_keeps():
    problem = Case("dropout", queries=9, dropout_p=0.25).make(dtype=torch.float64)
    keep = reference.dropout_keep(problem)
    undropped = reference.weights(problem._replace(dropout_p=0.0))
    torch.testing.assert_close(reference.weights(problem), undropped * keep / 0.75)
    out, lse = reference.attention(problem)
    torch.testing.assert_close(out, (undropped * keep / 0.75) @ problem.value)
    torch.testing.assert_close(lse, reference.attention(problem._replace(dropout_p=0.0))[1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gradient_formulas_are_autograds(case):
    problem = case.make(dtype=torch.float64)
    grad_out, grad_lse = case.make_grad_out(dtype=torch.float64), case.make_grad_lse(dtype=torch.float64)
    leaves = [problem.query, problem.key, problem.value] + ([] if problem.bias is None else [problem.bias])
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    problem = problem._replace(**dict(zip(("query", "key", "value", "bias"), leaves, strict=False)))
    expected = torch.autograd.grad(
        reference.attention(problem), leaves, (grad_out, grad_lse), allow_unused=True, materialize_grads=True
    )
    actual = reference.gradients(problem, grad_out, grad_lse)
    for result, truth in zip(actual[: len(leaves)], expected, strict=True):
        torch.testing.assert_close(result, truth)


def test_heads_are_averaged():
    problem = Case("gqa", heads=4, kv_heads=2, queries=5, mask="per_head").make(dtype=torch.float64)
    torch.testing.assert_close(reference.weights(problem, average=True), reference.weights(problem).mean(1))


def test_the_lse_of_finfo_min_everywhere_has_the_weights_as_its_gradient():
    """Beside a number of that size the sum of the weights has no place: exp(score - lse) would be 1."""
    query, key, value = tensors((1, 1, 2, 3), (1, 1, 5, 3), (1, 1, 5, 3))
    bias = torch.full((1, 1, 2, 5), torch.finfo(torch.float64).min, dtype=torch.float64, requires_grad=True)
    reference.attention(make_problem(query, key, value, bias))[1].sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 1 / 5))


@pytest.mark.parametrize("poisoned", ["query", "grad_out"])
def test_what_is_not_finite_in_a_query_stays_out_of_the_gradients_of_hidden_keys(poisoned):
    query, key, value, grad_out = tensors((1, 1, 4, 3), (1, 1, 6, 3), (1, 1, 6, 3), (1, 1, 4, 3))
    (query if poisoned == "query" else grad_out)[0, 0, 1] = torch.nan
    mask = torch.arange(6) != 2
    _, grad_key, grad_value, _ = reference.gradients(make_problem(query, key, value, mask), grad_out)
    for gradient in (grad_key, grad_value):
        assert (gradient[0, 0, 2] == 0).all()
        assert gradient[0, 0, mask].isnan().all()


def test_a_query_of_nan_has_a_gradient_of_nan_beside_a_bias():
    query, key, value = tensors((1, 1, 4, 3), (1, 1, 6, 3), (1, 1, 6, 3))
    query[0, 0, 1] = torch.nan
    query.requires_grad_()
    reference.attention(make_problem(query, key, value, torch.zeros(4, 6, dtype=torch.float64)))[0].sum().backward()
    assert query.grad[0, 0].isnan().all(1).tolist() == [False, True, False, False]
