"""The plain call of a GPU: what the kernels get is what the general way gives them, and all that is odd goes that way.

CPU tensors stand for a device's, and no kernel runs.
"""

from __future__ import annotations

import pytest
import torch

from fastattn import dispatch, ops, scaled_dot_product_attention
from fastattn.backends import cpu
from fastattn.backends import triton as backend
from fastattn.problem import check_arguments

SHAPES = {
    "square": ((2, 4, 8, 64), (2, 4, 8, 64), (2, 4, 8, 64)),
    "large": ((1, 8, 1024, 64), (1, 8, 16, 64), (1, 8, 16, 64)),
    "decoding": ((2, 4, 1, 64), (2, 4, 300, 64), (2, 4, 300, 64)),
    "grouped": ((2, 6, 3, 64), (2, 2, 20, 64), (2, 2, 20, 64)),
    "one key head": ((2, 6, 3, 64), (2, 1, 20, 64), (2, 1, 20, 64)),
    "another value dimension": ((1, 2, 3, 64), (1, 2, 9, 64), (1, 2, 9, 40)),
    "no keys": ((1, 2, 3, 64), (1, 2, 0, 64), (1, 2, 0, 64)),
}


@pytest.fixture
def launched(monkeypatch):
    """What the backend was called with."""
    found = []
    monkeypatch.setattr(backend, "is_on_gpu", lambda tensor: tensor.is_cpu)
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backend, "forward", lambda *arguments: found.append(arguments))
    monkeypatch.setattr(cpu, "plain_head_dims", lambda *arguments: None)
    monkeypatch.setitem(dispatch.AUTO, "cpu", dispatch.AUTO["cuda"])
    monkeypatch.setattr(dispatch, "_warned", set())
    return found


@pytest.fixture
def general(monkeypatch):
    """The calls that go the general way."""
    seen, function = [], ops.attention_output
    monkeypatch.setattr(ops, "attention_output", lambda *arguments: (seen.append(1), function(*arguments))[1])
    return seen


def tensors(name, dtype=torch.bfloat16):
    return [torch.randn(shape).to(dtype) for shape in SHAPES[name]]


def laid_out(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"backend": "triton"}], ids=str)
@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_the_kernels_get_what_the_general_way_gives_them(launched, general, name, options, layout):
    inputs = tensors(name)
    if layout == "BLHD":
        inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    out = scaled_dot_product_attention(*inputs, enable_gqa=name == "grouped", **options)
    assert not general
    rest = (None, 0.0, options.get("is_causal", False), options.get("scale"), name == "grouped", None, None, None)
    expected = ops.attention_output(*check_arguments(*inputs, *rest), None, "triton")
    (problem, given, lse), (other_problem, other, other_lse) = launched
    assert given is out and laid_out(out) == laid_out(expected) == laid_out(other)
    assert laid_out(lse) == laid_out(other_lse)
    assert all(one is another for one, another in zip(problem[:3], inputs, strict=True))
    assert all(one is another or one == another for one, another in zip(problem, other_problem, strict=True))
    assert [type(each) for each in problem] == [type(each) for each in other_problem]


class Subclass(torch.Tensor):
    pass


def odd_calls():
    query, key, value = tensors("square")
    yield "mask", (query, key, value, torch.ones(8, 8, dtype=torch.bool)), {}
    yield "lengths", (query, key, value), {"key_lengths": [3, 4]}
    yield "gradient", (query.clone().requires_grad_(), key, value), {}
    yield "gradient of value", (query, key, value.clone().requires_grad_()), {}
    yield "rank 3", (query[0], key[0], value[0]), {}
    yield "one batch", (query, key[:1], value[:1]), {}
    yield "last stride", (query, key.mT.contiguous().mT, value), {}
    yield "negated", (torch._neg_view(query), key, value), {}
    yield "subclass", (query, key.as_subclass(Subclass), value), {}
    yield "whole scale", (query, key, value), {"scale": 1}
    yield "dropout", (query, key, value), {"dropout_p": 0.5}
    yield "float64", (query.double(), key.double(), value.double()), {}
    yield "wide", tuple(each.new_zeros(1, 1, 4, 520) for each in (query, key, value)), {}
    yield "no dimension", (query[..., :0], key[..., :0], value), {}


ODD = {name: (arguments, options) for name, arguments, options in odd_calls()}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:fastattn computes with the dense reference")
def test_what_is_odd_goes_the_general_way(launched, general, name):
    arguments, options = ODD[name]
    scaled_dot_product_attention(*arguments, **options)
    assert general


def test_so_does_a_call_that_something_watches(launched, general):
    query, key, value = tensors("square")
    with torch.autocast("cpu", torch.float16):
        scaled_dot_product_attention(query, key, value)
    torch.func.vmap(scaled_dot_product_attention)(query[None], key[None], value[None])
    assert len(general) == 2
    with torch.no_grad():
        scaled_dot_product_attention(query.requires_grad_(), key, value)
    assert len(general) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.zeros(2, 4, 9, 64, dtype=torch.bfloat16)}, "value must have key's length 8"),
        ({"key": torch.zeros(2, 4, 8, 64)}, "key must have query's dtype"),
        ({"key": torch.zeros(2, 2, 8, 64, dtype=torch.bfloat16)}, "value must have key's 2 heads"),
        ({"is_causal": 1}, "is_causal must be a bool"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"query": None}, "query must be a torch.Tensor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_wrong_arguments_are_refused(launched, monkeypatch, change, message, name):
    monkeypatch.setattr(backend, "is_on_gpu", lambda tensor: isinstance(tensor, torch.Tensor))
    inputs = dict(zip(("query", "key", "value"), tensors("square"), strict=True))
    with pytest.raises((TypeError, ValueError), match=message):
        scaled_dot_product_attention(**(inputs | change), backend=name)
    assert not launched


def test_what_the_backend_cannot_take_it_refuses(launched):
    query, key, value = (torch.zeros(1, 1, 4, 520, dtype=torch.bfloat16) for _ in range(3))
    with pytest.raises(ValueError, match="head dimension is 520, over 512"):
        scaled_dot_product_attention(query, key, value, backend="triton")
