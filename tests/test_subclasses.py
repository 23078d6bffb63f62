"""Tensors whose values are not in their memory: causal biases, and subclasses with rules of their own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map

from fastattn import MultiHeadAttention, SelfAttention, explain, scaled_dot_product_attention
from fastattn.problem import make_problem

BIASES = {"upper_left": causal_upper_left, "lower_right": causal_lower_right}
pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias")


def tensors(*shapes, dtype=torch.float64):
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def dense(name, queries, keys):
    """What the bias means, as torch documents it: True = attend."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(0 if name == "upper_left" else keys - queries)


#: With what a causal bias is given; all of it restricts.
OPTIONS = {
    "alone": {},
    "is_causal": {"is_causal": True},
    "lower_right": {"causal": "lower_right"},
    "window": {"window": (2, 1)},
    "lower_right window": {"causal": "lower_right", "window": (2, 1)},
    "lengths": {"key_lengths": [3, 5]},
    "lower_right lengths": {"causal": "lower_right", "key_lengths": [3, 5]},
    "all": {"causal": "lower_right", "key_lengths": [3, 5], "window": (1, None)},
    "torch": {"backend": "torch"},
    "reference": {"backend": "reference"},
    "dropout": {"dropout_p": 0.5},
}


@pytest.mark.parametrize("sizes", [(5, 7), (6, 6), (7, 5)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", BIASES)
def test_a_causal_bias_is_the_mask_that_it_means(name, options, sizes):
    query, key = tensors((2, 4, sizes[0], 8), (2, 2, sizes[1], 8))
    results = []
    for mask in (BIASES[name](*sizes), dense(name, *sizes)):
        torch.manual_seed(0)
        leaf = query.clone().requires_grad_()
        out, lse = scaled_dot_product_attention(
            leaf, key, key, mask, enable_gqa=True, return_lse=True, **OPTIONS[options]
        )
        assert type(out) is torch.Tensor
        results.append((out, lse, *torch.autograd.grad(out.sum(), leaf)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_a_causal_bias_alone_costs_no_mask(name, dtype):
    query, key = tensors((2, 2, 5, 8), (2, 2, 7, 8), dtype=dtype)
    bias = BIASES[name](5, 7)
    problem = make_problem(query, key, key, bias)
    assert problem.attn_mask is None
    assert problem.bias is None
    assert problem.causal == name
    expected = scaled_dot_product_attention(query, key, key, causal=name)
    assert torch.equal(scaled_dot_product_attention(query, key, key, bias), expected)
    assert explain(query, key, key, bias).backend == explain(query, key, key).backend
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            scaled_dot_product_attention(query, key, key, bias),
            scaled_dot_product_attention(query, key, key, causal=name),
        )


def test_a_causal_bias_of_other_sizes_is_refused():
    query, key = tensors((2, 2, 5, 8), (2, 2, 7, 8))
    for function in (scaled_dot_product_attention, explain):
        for sizes in ((5, 5), (7, 5), (4, 7)):
            with pytest.raises(ValueError, match=r"attn_mask.* \[5, 7\], got \[\d, \d\]"):
                function(query, key, key, causal_lower_right(*sizes))
    module = MultiHeadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \[5, 5\].* got \[5, 6\]"):
        module(x, x, x, attn_mask=causal_upper_left(5, 6))


@pytest.mark.parametrize("name", BIASES)
def test_a_causal_bias_for_a_module(name):
    module = MultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    x, y = tensors((2, 5, 8), (2, 7, 8))
    for need_weights in (True, False):
        results = [module(x, y, y, padding, need_weights, mask) for mask in (BIASES[name](5, 7), ~dense(name, 5, 7))]
        torch.testing.assert_close(*results)
    alone = SelfAttention(8, 2, dtype=torch.float64)
    torch.testing.assert_close(alone(x, attn_mask=BIASES[name](5, 5)), alone(x, is_causal=True))


@pytest.mark.parametrize("name", BIASES)
def test_a_compiled_causal_bias(name):
    query, key = tensors((2, 2, 5, 8), (2, 2, 7, 8))
    module = MultiHeadAttention(8, 2, batch_first=True, dtype=torch.float64)
    (x,) = tensors((2, 5, 8))

    def attend(query, key, x, bias, square):
        return scaled_dot_product_attention(query, key, key, bias), module(x, x, x, attn_mask=square)[0]

    inputs = (query, key, x, BIASES[name](5, 7), BIASES[name](5, 5))
    torch._dynamo.reset()
    out, projected = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(out, scaled_dot_product_attention(query, key, key, dense(name, 5, 7)))
    torch.testing.assert_close(projected, module(x, x, x, attn_mask=~dense(name, 5, 5))[0])


class Ordinary(torch.Tensor):
    """Read like any tensor."""


class Watched(torch.Tensor):
    """Its memory holds the values, and it watches functions; those of masks could be anywhere."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapper(torch.Tensor):
    """Its memory holds no values: its rules pass the tensor inside on."""

    @staticmethod
    def __new__(cls, inner):
        result = torch.Tensor._make_subclass(cls, torch.full_like(inner, 1))
        result.inner = inner
        return result

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        seen.append(function)
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        return tree_map(lambda x: Wrapper(x) if isinstance(x, torch.Tensor) else x, function(*args, **kwargs))


seen = []
QUERY = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
GIVEN = {
    "query": QUERY,
    "key": QUERY.flip(0),
    "value": QUERY.flip(1),
    "attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(0)),
    "key_lengths": torch.tensor([5, 3]),
}


def as_ordinary(tensor):
    return tensor.as_subclass(Ordinary)


def as_two(tensor):
    return TwoTensor(tensor, tensor)


@pytest.mark.parametrize("given", [*GIVEN, "all", "query and key_lengths"])
@pytest.mark.parametrize("wrap", [as_ordinary, Wrapper, as_two], ids=["ordinary", "wrapper", "two tensors"])
def test_every_argument_may_be_a_subclass(wrap, given):
    names = GIVEN if given == "all" else given.split(" and ")
    seen.clear()
    call = GIVEN | {name: wrap(GIVEN[name]) for name in names}
    for return_lse in (False, True):
        result = scaled_dot_product_attention(**call, return_lse=return_lse)
        expected = scaled_dot_product_attention(**GIVEN, return_lse=return_lse)
        for actual, truth in zip(result, expected, strict=True) if return_lse else ((result, expected),):
            plain = {Wrapper: lambda x: x.inner, as_two: lambda x: x.a}.get(wrap, lambda x: x.as_subclass(torch.Tensor))
            assert torch.equal(plain(actual), truth)
    assert (scaled_dot_product_attention in seen) == (wrap is Wrapper)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_subclass_that_watches_is_asked_first_and_read(name):
    actual = scaled_dot_product_attention(**(GIVEN | {name: GIVEN[name].as_subclass(Watched)}))
    assert type(actual) is Watched
    assert torch.equal(actual.as_subclass(torch.Tensor), scaled_dot_product_attention(**GIVEN))


@pytest.mark.parametrize("name", ["attn_mask", "key_lengths"])
def test_a_mask_with_rules_that_do_not_know_attention_is_refused(name):
    call = GIVEN | {name: GIVEN[name].as_subclass(Watched)}
    for function in (scaled_dot_product_attention, explain):
        with pytest.raises(TypeError, match=f"{name} must .* memory, got Watched.*__torch_function__"):
            function(**call)


@pytest.mark.filterwarnings("ignore:.*MaskedTensors")
def test_a_masked_tensor_as_mask_is_refused():
    mask = torch.masked.masked_tensor(torch.randn(5, 5), torch.rand(5, 5) < 0.5)
    with pytest.raises(TypeError, match="attn_mask must .* got MaskedTensor"):
        scaled_dot_product_attention(QUERY, QUERY, QUERY, mask)


def test_masks_with_rules_are_refused_by_modules():
    module, x = MultiHeadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    for name, mask in (("attn_mask", torch.zeros(5, 5)), ("key_padding_mask", torch.zeros(2, 5))):
        with pytest.raises(TypeError, match=f"{name} must .* memory, got Watched"):
            module(x, x, x, **{name: mask.as_subclass(Watched)})


def test_parameters_and_buffers_are_ordinary():
    query, bias = torch.nn.Parameter(QUERY), torch.nn.Parameter(GIVEN["attn_mask"])
    out = scaled_dot_product_attention(query, QUERY, QUERY, bias)
    expected = scaled_dot_product_attention(QUERY, QUERY, QUERY, GIVEN["attn_mask"])
    assert type(out) is torch.Tensor
    assert torch.equal(out, expected)
    buffer = torch.nn.Buffer(GIVEN["attn_mask"])
    assert torch.equal(scaled_dot_product_attention(torch.nn.Buffer(QUERY), QUERY, QUERY, buffer), expected)
