"""The operators as citizens of PyTorch: opcheck, compile, export, vmap, func, derivatives, autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from fastattn import scaled_dot_product_attention
from fastattn.backends import cpu
from fastattn.problem import Arguments, check_arguments


def tensors(*shapes, dtype=torch.float64, requires_grad=False):
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes)


SHAPES = ((2, 2, 5, 3), (2, 2, 6, 3), (2, 2, 6, 4))


def check_derivatives(function, inputs):
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


INGREDIENTS = {
    "plain": {},
    "causal": {"causal": "lower_right", "window": (3, None)},
    "mask": {"attn_mask": torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.7},
    "lengths": {"key_lengths": torch.tensor([4, 0])},
}


def operator_arguments(requires_grad=True, dropout_p=0.0, dtype=torch.float64, **ingredients):
    query, key, value = tensors(*SHAPES, requires_grad=requires_grad, dtype=dtype)
    given = {
        "attn_mask": None,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
        "causal": None,
        "window": None,
        "key_lengths": None,
    } | ingredients
    arguments = check_arguments(query, key, value, dropout_p=dropout_p, **given)
    rng_state = torch.tensor([5, 9]) if dropout_p > 0.0 else None
    return (*arguments, rng_state, "auto")


CHECKED = {
    "plain": {},
    "rounded": {"dtype": torch.bfloat16},
    "everything": {
        "attn_mask": torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True),
        "causal": "lower_right",
        "window": (3, None),
        "key_lengths": torch.tensor([4, 6]),
        "dropout_p": 0.3,
    },
}


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name):
    arguments = operator_arguments(**CHECKED[name])
    operators = torch.ops.fastattn
    torch.library.opcheck(operators.attention_forward.default, arguments)
    out, lse, residual = (tensor.detach() for tensor in operators.attention_forward(*arguments))
    needs = (True, True, False, arguments[4] is not None)
    torch.library.opcheck(
        operators.attention_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), out, lse, residual, *arguments, *needs),
    )
    torch.library.opcheck(operators.attention_weights.default, (lse, True, *arguments))


@pytest.mark.parametrize("name", INGREDIENTS)
def test_gradcheck_and_gradgradcheck(name):
    query, key, value = tensors(*SHAPES, requires_grad=True)

    def attend(*inputs):
        out, lse = scaled_dot_product_attention(*inputs, **INGREDIENTS[name], return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    check_derivatives(attend, (query, key, value))


@pytest.mark.parametrize("shape", [(2, 2, 5, 6), (1, 2, 1, 6), (5, 1), ()])
def test_gradcheck_of_a_bias(shape):
    query, key, value = tensors(*SHAPES, requires_grad=True)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    check_derivatives(scaled_dot_product_attention, (query, key, value, bias))


def test_gradcheck_with_dropout(monkeypatch):
    monkeypatch.setattr("fastattn.functional.draw_rng_state", lambda device: torch.tensor([7, 8]))
    inputs = tensors(*SHAPES, requires_grad=True)

    def attend(*inputs):
        return scaled_dot_product_attention(*inputs, dropout_p=0.4)

    check_derivatives(attend, inputs)


def test_gradcheck_of_groups():
    inputs = tensors((1, 4, 3, 2), (1, 2, 5, 2), (1, 2, 5, 2), requires_grad=True)

    def attend(*inputs):
        return scaled_dot_product_attention(*inputs, enable_gqa=True, is_causal=True)

    check_derivatives(attend, inputs)


def loss(query, key, value, bias):
    return scaled_dot_product_attention(query, key, value, bias, is_causal=True).sin().sum()


@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (0, None, 0, None), (None, 2, None, None), (1, 0, 0, 3)])
def test_vmap_of_grad_is_a_loop(dims):
    shapes = (*SHAPES, (2, 5, 6))
    inputs = [
        torch.randn(shape if dim is None else (*shape[:dim], 3, *shape[dim:]), dtype=torch.float64)
        for shape, dim in zip(shapes, dims, strict=True)
    ]
    mapped = vmap(grad(loss, argnums=(0, 1, 2, 3)), in_dims=dims)(*inputs)
    for example in range(3):
        chosen = [x if dim is None else x.select(dim, example) for x, dim in zip(inputs, dims, strict=True)]
        expected = grad(loss, argnums=(0, 1, 2, 3))(*chosen)
        for actual, truth in zip(mapped, expected, strict=True):
            torch.testing.assert_close(actual[example], truth)
    plain = torch.autograd.grad(loss(*(x.requires_grad_() for x in chosen)), chosen)
    for actual, truth in zip(mapped, plain, strict=True):
        torch.testing.assert_close(actual[-1], truth)


def test_vmap_of_masks_and_lengths():
    query, key, value = tensors((3, 2, 2, 5, 8), (3, 2, 2, 6, 8), (3, 2, 2, 6, 8))
    mask = torch.rand(3, 2, 1, 5, 6) < 0.7
    lengths = torch.tensor([[6, 1], [0, 3], [2, 6]])

    def attend(query, key, value, mask, lengths):
        return scaled_dot_product_attention(query, key, value, mask, key_lengths=lengths, return_lse=True)

    for mapped, single in ((mask, None), (mask[0], 0)):
        dims = (0, 0, 0, None if single is not None else 0, 0)
        actual = vmap(attend, in_dims=dims)(query, key, value, mapped, lengths)
        for example in range(3):
            chosen = mapped if single is not None else mapped[example]
            expected = attend(query[example], key[example], value[example], chosen, lengths[example])
            for left, right in zip(actual, expected, strict=True):
                torch.testing.assert_close(left[example], right)


def test_vmap_of_dropout_follows_its_randomness():
    query = torch.randn(1, 2, 33, 8)

    def attend(query):
        return scaled_dot_product_attention(query, query, query, dropout_p=0.5)

    same = vmap(attend, randomness="same")(query.expand(3, -1, -1, -1, -1))
    assert torch.equal(same[0], same[1])
    different = vmap(attend, randomness="different")(query.expand(3, -1, -1, -1, -1))
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(attend)(query.expand(3, -1, -1, -1, -1))


def test_func_second_derivatives_and_jacobians():
    query, key, value = tensors((1, 1, 3, 2), (1, 1, 4, 2), (1, 1, 4, 2))

    def twice(attend):
        return grad(lambda q: grad(lambda q: attend(q, key, value).sin().sum())(q).square().sum())(query)

    def dense(query, key, value):
        return (query @ key.mT / 2**0.5).softmax(-1) @ value

    torch.testing.assert_close(twice(scaled_dot_product_attention), twice(dense))
    torch.testing.assert_close(
        jacrev(scaled_dot_product_attention)(query, key, value), jacrev(dense)(query, key, value)
    )


def test_per_sample_gradients_of_a_module():
    import fastattn

    module = fastattn.MultiHeadAttention(8, 2, batch_first=True).double()
    batch = torch.randn(3, 5, 8, dtype=torch.float64)

    def sample_loss(parameters, sample):
        return functional_call(module, parameters, (sample, sample, sample))[0].square().sum()

    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    mapped = vmap(grad(sample_loss), in_dims=(None, 0))(parameters, batch)
    for index, sample in enumerate(batch):
        module.zero_grad()
        module(sample, sample, sample)[0].square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(mapped[name][index], parameter.grad)


MISFITS = {
    "key's dtype": ("key", torch.randn(2, 2, 6, 3)),
    "value's length": ("value", torch.randn(2, 2, 5, 4).double()),
    "value's heads": ("value", torch.randn(2, 1, 6, 4).double()),
    "more key heads": ("query", torch.randn(2, 1, 5, 3).double()),
    "batches": ("query", torch.randn(3, 2, 5, 3).double()),
    "head_dims": ("query", torch.randn(2, 2, 5, 4).double()),
    "too few lengths": ("key_lengths", torch.tensor([3])),
    "short lengths": ("key_lengths", torch.tensor([3, 3], dtype=torch.int32)),
}


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the engine checks what the operators were given")
@pytest.mark.parametrize("name", MISFITS)
def test_an_operator_called_by_hand_reads_nothing_that_does_not_fit(name):
    field, misfit = MISFITS[name]
    *arguments, rng_state, backend = operator_arguments(requires_grad=False)
    arguments = Arguments(*arguments)._replace(**{field: misfit})
    with pytest.raises(ValueError, match="fit one another|one length per sequence|int64"):
        torch.ops.fastattn.attention_forward(*arguments, rng_state, backend)


#: On query [2, 2, 5, 3] float64 and key [2, 2, 6, 3]: what would be read as something else, or past its end.
WRONG_VALUES = {
    "a bias in another dtype": ({"bias": torch.zeros(1, 1, 5, 6)}, "bias .* torch.float64, got torch.float32"),
    "a mask that is no bool": ({"attn_mask": torch.zeros(1, 1, 5, 6)}, "attn_mask .* bool, got torch.float32"),
    "lengths past the keys": ({"key_lengths": torch.tensor([3, 10**7])}, r"between 0 .* 6, got \[3, 10000000\]"),
    "a length below 0": ({"key_lengths": torch.tensor([-1, 3])}, r"between 0 .* 6, got \[-1, 3\]"),
    "short lengths": ({"key_lengths": torch.tensor([3, 3], dtype=torch.int32)}, "int64, got torch.int32"),
    "an unknown causality": ({"causal": "left"}, "causal .* 'upper_left'.* got 'left'"),
    "a window below 0": ({"window_left": -3}, "window .* at least 0 .* got -3"),
    "a dropout above 1": ({"dropout_p": 1.5}, "at most 1, got 1.5"),
    "an infinite scale": ({"scale": float("inf")}, "scale must be finite, got inf"),
    "dropout without a state": ({"dropout_p": 0.5}, r"rng_state .* int64 \[2\], got None"),
    "a state of one word": (
        {"dropout_p": 0.5, "rng_state": torch.zeros(1, dtype=torch.int64)},
        r"got torch.int64 \[1\]",
    ),
    "a state of floats": ({"dropout_p": 0.5, "rng_state": torch.zeros(2)}, r"got torch.float32 \[2\]"),
}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", WRONG_VALUES)
def test_an_operator_called_by_hand_refuses_what_it_cannot_read(name, backend):
    change, message = WRONG_VALUES[name]
    query, key = tensors((2, 2, 5, 3), (2, 2, 6, 3))
    plain = Arguments(query, key, key, None, None, None, None, None, None, None, 0.0)
    out, lse, residual = torch.ops.fastattn.attention_forward(*plain, None, backend)
    rng_state = change.get("rng_state")
    wrong = plain._replace(**{field: value for field, value in change.items() if field != "rng_state"})
    calls = (
        lambda: torch.ops.fastattn.attention_forward(*wrong, rng_state, backend),
        lambda: torch.ops.fastattn.attention_backward(
            *(out, None, out, lse, residual, *wrong, rng_state, backend), *(True, True, True, False)
        ),
        lambda: torch.ops.fastattn.attention_weights(lse, False, *wrong, rng_state, backend),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_strided_lengths_are_read_with_their_stride():
    arguments = Arguments(
        *tensors((2, 1, 5, 3), (2, 1, 6, 3), (2, 1, 6, 3)), None, None, None, None, None, None, None, 0.0
    )
    lengths = torch.tensor([[5, 1], [2, 6]])
    for column in lengths.t():
        strided, packed = (arguments._replace(key_lengths=given) for given in (column, column.clone()))
        results = [torch.ops.fastattn.attention_forward(*given, None, "auto") for given in (strided, packed)]
        torch.testing.assert_close(*results, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    torch._dynamo.reset()

    def attend(query, key, value, bias, lengths):
        out, lse = scaled_dot_product_attention(
            query, key, value, bias, is_causal=True, window=(9, None), key_lengths=lengths, return_lse=True
        )
        return out.transpose(1, 2).flatten(2), lse

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (8, 11) if dynamic else (8,):
        shapes = ((2, length, 2, 8), (2, 2, length, 8), (2, 2, length, 8), (2, length, length))
        query, key, value, bias = tensors(*shapes, requires_grad=True)
        lengths = torch.tensor([length, 3])
        inputs = (query.transpose(1, 2), key, value, bias, lengths)
        results = []
        for function in (attend, compiled):
            out, lse = function(*inputs)
            results.append((out, lse, *torch.autograd.grad((out.sin().sum() + lse.sum()), (query, key, value, bias))))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
            assert traced.stride() == eager.stride()


def test_compile_with_inductor():
    torch._dynamo.reset()
    linear = nn.Linear(16, 48)

    def layer(x):
        query, key, value = linear(x).view(2, 9, 3, 2, 8).unbind(2)
        out = scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        return out.transpose(1, 2).flatten(2).relu()

    x = torch.randn(2, 9, 16)
    eager = layer(x)
    (expected,) = torch.autograd.grad(eager.sum(), linear.weight)
    compiled = torch.compile(layer, fullgraph=True)(x)
    (actual,) = torch.autograd.grad(compiled.sum(), linear.weight)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(actual, expected)


def test_compiled_dropout_follows_the_generator():
    torch._dynamo.reset()
    query = torch.randn(1, 2, 33, 8)
    compiled = torch.compile(
        lambda x: scaled_dot_product_attention(x, x, x, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(compiled(query))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_compiled_calls_still_check_key_lengths():
    torch._dynamo.reset()
    query = torch.randn(2, 1, 4, 8)
    compiled = torch.compile(
        lambda x, lengths: scaled_dot_product_attention(x, x, x, key_lengths=lengths),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(query, torch.tensor([4, 2]))
    with pytest.raises(ValueError, match="key_lengths must be between 0"):
        compiled(query, torch.tensor([5, 2]))


def test_export_with_dynamic_length():
    class Layer(nn.Module):
        def forward(self, query, key, value):
            return scaled_dot_product_attention(query, key, value, is_causal=True, window=(3, None))

    length = torch.export.Dim("length", min=2, max=100)
    shapes = {name: {2: length} for name in ("query", "key", "value")}
    program = torch.export.export(Layer(), tensors(*((1, 2, 17, 8),) * 3), dynamic_shapes=shapes)
    assert "fastattn.attention_forward" in str(program.graph)
    query, key, value = tensors(*((1, 2, 30, 8),) * 3)
    torch.testing.assert_close(program.module()(query, key, value), Layer()(query, key, value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    query, key, value = tensors(*SHAPES, dtype=torch.float32, requires_grad=True)
    bias = torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = scaled_dot_product_attention(query, key.to(dtype), value, bias)
    assert out.dtype == dtype
    low = [tensor.detach().to(dtype) for tensor in (query, key, value, bias)]
    assert torch.equal(out, scaled_dot_product_attention(*low))
    gradients = torch.autograd.grad(out.float().sum(), (query, key, value, bias))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_autocast_leaves_float64_and_the_disabled_region_alone():
    query, key, value = tensors(*SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scaled_dot_product_attention(query, key, value).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            single = (tensor.float() for tensor in (query, key, value))
            assert scaled_dot_product_attention(*single).dtype == torch.float32


def test_forward_mode_is_refused_rather_than_ignored():
    query, key, value = tensors(*SHAPES)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises((RuntimeError, NotImplementedError)):
            scaled_dot_product_attention(dual, key, value)
