"""Additive attention as a citizen of PyTorch: derivatives, transforms, compile, what is saved, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from fastattn.additive import AdditiveAttention, additive_attention, additive_weights
from fastattn.backends import cpu
from fastattn.pooling import AttentionPooling

LENGTHS = torch.tensor([5, 0, 2])
NAMES = ("query", "key", "value", "weight")


def make_tensors(dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, 3), (3, 5, 3), (3, 5, 2), (3,))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def attend(query, key, value, weight):
    return additive_attention(query, key, value, weight, key_lengths=LENGTHS)


def naive(query, key, value, weight, lengths=LENGTHS):
    score = torch.tanh(query[:, :, None] + key[:, None]) @ weight
    mask = (torch.arange(key.shape[1]) < lengths[:, None])[:, None]
    score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    return (score.softmax(-1) * mask) @ value


def test_opcheck():
    operators = torch.ops.fastattn
    query, key, value, weight = make_tensors()
    mask = torch.arange(5) < LENGTHS[:, None]
    inputs = query, key, value, weight, mask
    # The rest, PyTorch's tracing with dynamic sizes, is what the compiled module below is for.
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.additive_forward.default, inputs, test_utils=quick)
    out, lse = (tensor.detach() for tensor in operators.additive_forward(*inputs))
    grad_out = torch.randn_like(out).requires_grad_()
    torch.library.opcheck(operators.additive_backward.default, (grad_out, out, lse, *inputs), test_utils=quick)
    torch.library.opcheck(operators.additive_weights.default, (query, key, weight, mask), test_utils=quick)


def test_derivatives_of_both_orders_batched_and_not():
    assert torch.autograd.gradcheck(attend, make_tensors(), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attend, make_tensors(), check_batched_grad=True)


def test_vectorized_jacobian_and_hessian():
    tensors = tuple(make_tensors())
    torch.testing.assert_close(jacobian(attend, tensors, vectorize=True), jacobian(naive, tensors))

    def loss(function):
        return lambda *inputs: function(*inputs).square().sum()

    torch.testing.assert_close(hessian(loss(attend), tensors, vectorize=True), hessian(loss(naive), tensors))


def test_batched_cotangents_reach_the_module():
    pooling = AttentionPooling(4, "additive").double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    written_out = AttentionPooling(4, "additive", attention="naive").double()
    written_out.load_state_dict(pooling.state_dict())
    actual, expected = (
        jacobian(lambda x, m=m: m(x, LENGTHS.clamp(min=1)), x, vectorize=True) for m in (pooling, written_out)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mapped", [(0,), (1, 2), (3,), (0, 1, 2, 3)], ids=str)
def test_vmap(mapped):
    tensors = make_tensors(requires_grad=False)
    dims = tuple(-1 if index in mapped else None for index in range(4))
    examples = [torch.stack([x, 0.5 * x], dim=-1) if dim else x for x, dim in zip(tensors, dims, strict=True)]

    def gradients(function):
        return lambda *inputs: grad(lambda *x: function(*x).square().sum(), argnums=(0, 1, 2, 3))(*inputs)

    for ours, truth in ((attend, naive), (gradients(attend), gradients(naive))):
        torch.testing.assert_close(vmap(ours, dims)(*examples), vmap(truth, dims)(*examples))
    weigh = vmap(lambda q, k, w: additive_weights(q, k, w, LENGTHS), (dims[0], dims[1], dims[3]))
    for index in range(2) if set(mapped) & {0, 1, 3} else ():
        one = [x.select(dim, index) if dim else x for x, dim in zip(examples, dims, strict=True)]
        expected = additive_weights(one[0], one[1], one[3], LENGTHS)
        torch.testing.assert_close(weigh(examples[0], examples[1], examples[3])[index], expected)


def test_nested_transforms():
    tensors = make_tensors(requires_grad=False)
    for outer, inner in ((0, 1), (3, 2), (1, 3)):
        actual, expected = (jacrev(jacrev(f, argnums=inner), argnums=outer)(*tensors) for f in (attend, naive))
        torch.testing.assert_close(actual, expected)


def test_gradients_of_each_sample():
    pooling = AttentionPooling(4, "additive").double()
    parameters = dict(pooling.named_parameters())
    x = torch.randn(3, 5, 4, dtype=torch.float64)

    def loss(parameters, sample):
        return functional_call(pooling, parameters, (sample[None],)).square().sum()

    actual = vmap(grad(loss), (None, 0))(parameters, x)
    for index in range(3):
        for name, expected in grad(loss)(parameters, x[index]).items():
            torch.testing.assert_close(actual[name][index], expected)


def test_compile_in_one_graph_with_dynamic_sizes():
    module = AdditiveAttention(6, 4, 10)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, queries, keys in ((2, 3, 5), (3, 7, 4)):
        inputs = torch.randn(batch, queries, 6), torch.randn(batch, keys, 4)
        options = {"key_lengths": torch.randint(1, keys, (batch,)), "need_weights": True}
        actual, expected = compiled(*inputs, **options), module(*inputs, **options)
        torch.testing.assert_close(actual, expected)
        parameters = list(module.parameters())
        gradients = (torch.autograd.grad(result[0].square().sum(), parameters) for result in (actual, expected))
        torch.testing.assert_close(*gradients)


def test_export_with_dynamic_sizes():
    module = AttentionPooling(4, "additive").eval()
    length = torch.export.Dim("length", min=2, max=1000)
    shapes = {"x": {1: length}, "lengths": None}
    exported = torch.export.export(module, (torch.randn(3, 5, 4), LENGTHS), dynamic_shapes=shapes)
    assert "fastattn.additive_forward" in exported.graph_module.code
    x = torch.randn(3, 9, 4)
    assert torch.equal(exported.module()(x, LENGTHS), module(x, LENGTHS))


@pytest.mark.parametrize("changed", [*NAMES, "key_mask", "out"])
def test_a_change_in_place_before_the_backward_is_an_error(changed):
    tensors = dict(zip(NAMES, make_tensors(torch.float32), strict=True))
    mask = torch.arange(5) < LENGTHS[:, None]
    out = additive_attention(**tensors, key_mask=mask)
    with torch.no_grad():
        (tensors | {"key_mask": mask, "out": out})[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_hooks_see_all_that_is_saved():
    """What comes back may lie elsewhere, and in another order."""
    tensors = make_tensors(torch.float32)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor.detach().clone()

    def unpack(tensor):
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor

    expected = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = attend(*tensors)
    assert sorted(saved) == sorted([*(tensor.numel() for tensor in tensors), 3 * 5, out.numel(), 3 * 4])
    actual = torch.autograd.grad(out.square().sum(), tensors)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    tensors = make_tensors(torch.float32)
    expected = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    checkpoint(attend, *tensors, use_reentrant=use_reentrant).square().sum().backward()
    assert all(torch.equal(tensor.grad, truth) for tensor, truth in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("needing", NAMES)
def test_only_what_needs_a_gradient_gets_one(needing):
    tensors = make_tensors(torch.float32, requires_grad=False)
    index = NAMES.index(needing)
    tensors[index].requires_grad_()
    attend(*tensors).sum().backward()
    expected = torch.autograd.grad(naive(*tensors).sum(), tensors[index])[0]
    torch.testing.assert_close(tensors[index].grad, expected)
    assert all(tensor.grad is None for tensor in tensors if tensor is not tensors[index])


def test_the_result_may_be_changed_in_place_where_nothing_saves_it():
    out = attend(*make_tensors(torch.bfloat16))
    out.mul_(2).sum().backward()


@pytest.mark.parametrize("size", ["batch", "queries", "keys", "features", "value features"])
def test_sizes_of_0(size):
    sizes = {"batch": 2, "queries": 3, "keys": 5, "features": 4, "value features": 6} | {size: 0}
    b, lq, lk, d, dv = sizes.values()
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((b, lq, d), (b, lk, d), (b, lk, dv), (d,))]
    lengths = torch.full((b,), 3)
    actual, expected = additive_attention(*tensors, key_lengths=lengths), naive(*tensors, lengths=lengths)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_views_that_do_not_lie_as_they_read():
    """Strided, broadcast, negated lazily, and known to be zero."""
    query, key, value, weight = make_tensors(torch.float32, requires_grad=False)
    strided = torch.randn(3, 5, 4, 3)[..., 0, :], torch.randn(2, 5, 3).mT[0].expand(3, -1, -1)
    forms = {
        "query": torch.randn(4, 3, 3).transpose(0, 1),
        "key": strided[0],
        "value": torch.randn(3, 5, 2, dtype=torch.complex64).conj().imag,
        "weight": torch.randn(6)[::2],
    }
    assert forms["value"].is_neg()
    tensors = {"query": query, "key": key, "value": value, "weight": weight}
    for name, tensor in forms.items():
        given = tensors | {name: tensor}
        expected = naive(*(x.clone().resolve_neg() for x in given.values()))
        torch.testing.assert_close(attend(**given), expected)
    zero = torch._efficientzerotensor(3, 5, 2)
    assert torch.equal(attend(query, key, zero, weight), torch.zeros(3, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [1.0, 50.0], ids=["engine", "tiles"])
def test_autocast_does_not_round_what_is_computed_in_float32(dtype, large):
    tensors = [(x * large).to(dtype) for x in make_tensors(requires_grad=False)]
    tensors = [x.requires_grad_() for x in tensors]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = attend(*tensors)
            weights = additive_weights(tensors[0], tensors[1], tensors[3])
            results.append([out, weights, *torch.autograd.grad(out.square().sum(), tensors)])
    for off, on in zip(*results, strict=True):
        assert on.dtype == off.dtype and torch.equal(on, off)


def test_dtypes_of_16_and_32_bits_mix():
    """As under autocast, where projections are 16-bit and values and the weight need not be."""
    query, key, value, weight = make_tensors(torch.float32, requires_grad=False)
    tensors = query.bfloat16().requires_grad_(), key.half().requires_grad_(), value.requires_grad_(), weight
    out = attend(*tensors)
    assert out.dtype == torch.bfloat16
    expected = naive(*(x.float() for x in tensors))
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=0)
    gradients = torch.autograd.grad(out.sum(), tensors[:3])
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.skipif(bool(cpu.unavailable()), reason="needs the C++ engine")
@pytest.mark.parametrize("table", [True, False])
def test_the_engine_refuses_what_would_lead_it_astray(table):
    """Whoever calls the extension by hand gets an error, never a read or a write past an end."""

    def make(dtype=torch.float32):
        shapes = ((2, 3, 16), (2, 5, 16), (2, 5, 32), (16,))
        return [*(torch.ones(shape, dtype=dtype) for shape in shapes), torch.ones(2, 5, dtype=torch.bool), 0.0]

    def outputs():
        return [torch.empty(shape) for shape in ((2, 3, 32), (2, 3), (2, 3))]

    def gradients():
        shapes = ((2, 3), (2, 3), (2, 3, 32), (1, 2, 3, 16), (2, 5, 16), (2, 5, 32), (1, 2, 16))
        return [torch.zeros(shape) for shape in shapes]

    def wrong(tensor):
        yield tensor.double()
        yield tensor[:-1]
        yield tensor[None]
        if tensor.numel() > 1:
            yield (
                torch.empty(2 * tensor.numel(), dtype=tensor.dtype)[::2].view_as(tensor)
                if tensor.dim() == 1
                else (torch.empty(*tensor.shape, 2, dtype=tensor.dtype)[..., 0])
            )
        yield tensor.to("meta")

    before = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    cpu._C.use_torch(torch, before if table else None)
    calls = ((cpu._C.additive_forward, outputs), (cpu._C.additive_backward, gradients))
    try:
        for function, arguments in calls:
            function(tuple(make()), *arguments(), 1)
            for index, tensor in enumerate(make()[:5]):
                for instead in wrong(tensor):
                    problem = make()
                    problem[index] = instead
                    with pytest.raises((ValueError, RuntimeError, BufferError)):
                        function(tuple(problem), *arguments(), 1)
            for index, tensor in enumerate(arguments()):
                for instead in wrong(tensor):
                    given = arguments()
                    given[index] = instead
                    with pytest.raises((ValueError, RuntimeError, BufferError)):
                        function(tuple(make()), *given, 1)
            with pytest.raises(ValueError, match="malformed"):
                function(tuple(make()[:-1]), *arguments(), 1)
    finally:
        cpu._C.use_torch(torch, before)
