"""What torch takes and few callers give: odd numbers, nothing kept, no head dimension, heads of all counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastattn import MultiHeadAttention, explain, scaled_dot_product_attention
from fastattn.backends import triton
from fastattn.problem import make_problem
from fastattn.reference import weights

BACKENDS = [
    "auto",
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(triton.unavailable() is not None, reason="no Triton here")),
]


def tensors(*shapes, dtype=torch.float64, requires_grad=True):
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes)


def assert_torchs(inputs, options, **ours):
    """out and gradients are torch's."""
    actual = scaled_dot_product_attention(*inputs, **options, **ours)
    expected = F.scaled_dot_product_attention(*inputs, **options)
    torch.testing.assert_close(actual, expected)
    leaves, grad = [x for x in inputs if x is not None and x.requires_grad], torch.randn_like(expected)
    for left, right in zip(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(left, right)


NUMBERS = {
    "float32 of numpy": np.float32,
    "float16 of numpy": np.float16,
    "int of numpy": lambda x: np.int64(2 * x),
    "tensor": torch.tensor,
    "float64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "bfloat16 tensor": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "integer tensor": lambda x: torch.tensor(int(2 * x)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_every_kind(name):
    inputs, number = tensors((1, 2, 5, 8), (1, 2, 6, 8), (1, 2, 6, 3)), NUMBERS[name](0.5)
    assert_torchs(inputs, {"scale": number})
    torch.manual_seed(3)
    actual = scaled_dot_product_attention(*inputs, dropout_p=number)
    torch.manual_seed(3)
    assert torch.equal(actual, scaled_dot_product_attention(*inputs, dropout_p=float(number)))
    assert explain(*inputs, scale=number, dropout_p=number).backend == explain(*inputs).backend


def test_a_window_and_lengths_of_numpy():
    query, key = tensors((2, 2, 5, 8), (2, 2, 6, 8))
    actual = scaled_dot_product_attention(
        query, key, key, window=(np.int64(2), np.int32(0)), key_lengths=np.uint16([6, 3])
    )
    torch.testing.assert_close(
        actual, scaled_dot_product_attention(query, key, key, window=(2, 0), key_lengths=[6, 3]), rtol=0.0, atol=0.0
    )
    lengths = torch.tensor([6, 3], dtype=torch.uint64)
    assert torch.equal(actual, scaled_dot_product_attention(query, key, key, window=(2, 0), key_lengths=lengths))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_of_everything(dtype, backend):
    query, key, value = tensors((2, 4, 9, 8), (2, 2, 7, 8), (2, 2, 7, 3), dtype=dtype)
    bias = torch.randn(9, 7, dtype=dtype, requires_grad=True)
    leaves = (query, key, value, bias)
    options = {"enable_gqa": True, "return_lse": True, "key_lengths": [7, 4], "backend": backend}
    out, lse = scaled_dot_product_attention(*leaves, dropout_p=1.0, **options)
    assert out.shape == (2, 4, 9, 3)
    assert not out.any()
    kept, expected_lse = scaled_dot_product_attention(*leaves, **options)
    assert kept.all()
    assert torch.equal(lse, expected_lse)
    for gradient in torch.autograd.grad(out.float().sum(), leaves, retain_graph=True):
        assert not gradient.any()
    grad = torch.randn_like(lse)
    of_lse = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), grad))
    expected = torch.autograd.grad((kept, expected_lse), leaves, (torch.zeros_like(out), grad))
    for actual, truth in zip(of_lse, expected, strict=True):
        assert actual.stride() == truth.stride()
        torch.testing.assert_close(actual, truth)
    value.data[0] = torch.nan
    out, lse = scaled_dot_product_attention(*leaves, dropout_p=1.0, **options)
    assert not out.any()
    for gradient in torch.autograd.grad(out.float().sum(), leaves):
        assert not gradient.any()


def test_dropout_of_everything_has_derivatives():
    inputs = tensors((1, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 3))

    def attend(*inputs):
        return scaled_dot_product_attention(*inputs, dropout_p=1.0, return_lse=True)

    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)
    problem = make_problem(*inputs, dropout_p=1.0)
    assert not weights(problem).any()


def test_a_module_that_drops_everything():
    module, theirs = (
        kind(8, 2, dropout=1.0, dtype=torch.float64) for kind in (MultiHeadAttention, torch.nn.MultiheadAttention)
    )
    module.load_state_dict(theirs.state_dict())
    (x,) = tensors((5, 2, 8))
    for need_weights in (True, False):
        results = [m(x, x, x, need_weights=need_weights) for m in (module, theirs)]
        (out, average), (expected, expected_average) = results
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(average, expected_average)
        torch.testing.assert_close(*(torch.autograd.grad(result[0].sum(), x)[0] for result in results))
    assert module.eval()(x, x, x)[1].all()


def test_a_modules_dropout_may_change_and_be_any_number():
    module = MultiHeadAttention(8, 2, dropout=np.float32(0.25), dtype=torch.float64)
    (x,) = tensors((5, 2, 8))
    results = []
    for dropout in (np.float32(0.25), 0.25, torch.tensor(0.25)):
        module.dropout = dropout
        torch.manual_seed(1)
        results.append(module(x, x, x, need_weights=False)[0])
    assert all(torch.equal(result, results[0]) for result in results)
    module.dropout = 1.5
    with pytest.raises(ValueError, match=r"dropout must be at least 0 and at most 1, got 1\.5"):
        module(x, x, x)


@pytest.mark.parametrize("head_dims", [(0, 5), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (2, 4), (2, 2, 4)], ids=str)
def test_head_dimensions_of_nothing(leading, head_dims):
    head_dim, value_dim = head_dims
    inputs = tensors((*leading, 6, head_dim), (*leading, 7, head_dim), (*leading, 7, value_dim))
    for options in ({}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.rand(6, 7, dtype=torch.float64)}):
        assert_torchs(inputs, options)
    out, lse = scaled_dot_product_attention(*inputs, return_lse=True)
    assert out.shape == (*leading, 6, value_dim)
    query, key, _ = inputs
    scale = head_dim**-0.5 if head_dim else 1.0
    torch.testing.assert_close(lse, (query @ key.mT * scale).logsumexp(-1))


@pytest.mark.parametrize("heads", [(8, 4, 2), (8, 2, 4), (8, 1, 4), (8, 8, 2), (6, 2, 3), (6, 3, 2)], ids=str)
def test_key_and_value_heads_of_their_own(heads):
    query_heads, key_heads, value_heads = heads
    inputs = tensors((2, query_heads, 5, 8), (2, key_heads, 6, 8), (2, value_heads, 6, 3))
    assert_torchs(inputs, {"enable_gqa": True})


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_lengths_in_a_list_do_not_lie_on_the_default_device(device):
    inputs = tensors((2, 2, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8))
    expected = scaled_dot_product_attention(*inputs, key_lengths=[6, 3])
    with torch.device(device):
        assert torch.equal(scaled_dot_product_attention(*inputs, key_lengths=[6, 3]), expected)
        general = scaled_dot_product_attention(*inputs, key_lengths=[6, 3], dropout_p=0.5, return_lse=True)
        assert [tensor.device.type for tensor in general] == ["cpu", "cpu"]
        torch.autograd.grad(general, inputs, [torch.ones_like(tensor) for tensor in general])


@pytest.mark.parametrize("shape", [(2, 3, 4, 0), (1, 1, 4, 0), (3, 4, 1), (), (4, 0)], ids=str)
@pytest.mark.parametrize("expanded", [True, False])
def test_a_bias_of_no_keys_has_a_gradient(shape, expanded):
    query, key, value = tensors((2, 3, 4, 8), (2, 3, 0, 8), (2, 3, 0, 8))
    bias = torch.zeros((), dtype=torch.float64).expand(shape) if expanded else torch.zeros(shape, dtype=torch.float64)
    bias = bias.requires_grad_()
    out = scaled_dot_product_attention(query, key, value, bias)
    assert torch.equal(out, torch.zeros(2, 3, 4, 8, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.sum(), bias)
    assert gradient.shape == shape
    assert not gradient.any()


def compiled_graphs(function, calls, backend="aot_eager"):
    """How many graphs a compiled function takes for all calls, each of which has to give what eager gives."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(function, fullgraph=True, backend=count)
    for query, *rest in calls:
        leaf = query.clone().requires_grad_()
        actual, expected = compiled(leaf, *rest), function(leaf, *rest)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), leaf)[0] for out in (actual, expected)))
    return len(graphs)


QUERY = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))


def test_compiled_calls_with_a_scale_that_varies():
    def attend(x, scale):
        return scaled_dot_product_attention(x, x, x, scale=scale, is_causal=True)

    compiled_graphs(attend, [(QUERY, 0.5), (QUERY, 0.25)])
    compiled_graphs(attend, [(QUERY, 1), (QUERY, 3)])
    with pytest.raises(ValueError, match="scale must be finite"):
        torch.compile(attend, fullgraph=True, backend="aot_eager")(QUERY, float("nan"))


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_tensor_as_scale_is_compiled_once():
    def attend(x, scale):
        return scaled_dot_product_attention(x, x, x, scale=scale)

    assert compiled_graphs(attend, [(QUERY, torch.tensor(1.0 / n)) for n in range(1, 4)], "inductor") == 1


@pytest.mark.parametrize("form", ["sqrt", "power"])
def test_a_scale_of_the_length_takes_one_dynamic_graph(form):
    def attend(x):
        length = x.shape[2]
        scale = {"sqrt": lambda: 1.0 / math.sqrt(length), "power": lambda: length**-0.5}
        return scaled_dot_product_attention(x, x, x, scale=scale[form]())

    assert compiled_graphs(attend, [(torch.randn(1, 2, length, 8),) for length in (5, 6, 9)]) <= 2


def test_a_module_attribute_that_anneals_compiled():
    class Annealed(torch.nn.Module):
        scale = 1.0

        def forward(self, x):
            return scaled_dot_product_attention(x, x, x, scale=self.scale, dropout_p=0.0)

    module = Annealed()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for step in range(3):
        module.scale = 0.9**step
        torch.testing.assert_close(compiled(QUERY), module(QUERY))


def test_export_with_a_scale_of_the_length():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return scaled_dot_product_attention(x, x, x, scale=x.shape[2] ** -0.5)

    length = torch.export.Dim("length", min=2, max=100)
    program = torch.export.export(Layer(), (QUERY,), dynamic_shapes={"x": {2: length}})
    longer = torch.randn(1, 2, 40, 8)
    torch.testing.assert_close(program.module()(longer), Layer()(longer))


def test_compiled_dropout_that_varies():
    torch._dynamo.reset()

    def attend(x, dropout_p):
        return scaled_dot_product_attention(x, x, x, dropout_p=dropout_p)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    ones = torch.ones(1, 4, 64, 8)
    for dropout_p in (0.5, 1.0, 0.0):
        torch.manual_seed(0)
        expected = attend(ones, dropout_p)
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(ones, dropout_p), expected)
