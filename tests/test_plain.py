"""The plain call: the general way's results on fewer steps, and the general way for everything that is odd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastattn import dispatch, ops, plain, scaled_dot_product_attention
from fastattn.backends import cpu
from fastattn.problem import check_arguments

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="no call is plain without the extension, or before torch 2.10",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors(*shapes, dtype=torch.float32, requires_grad=False):
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes)


def attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    key_lengths=None,
):
    return plain.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, key_lengths)


def general_attention(
    query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, key_lengths=None
):
    options = (0.0, is_causal, scale, enable_gqa, None, None, key_lengths)
    return ops.attention_output(*check_arguments(query, key, value, attn_mask, *options), None, "auto")


def assert_out_is_close(out, truth):
    """To a unit of a 16-bit dtype, which is rounded once; else to those of a sum's terms."""
    _assert_close(out, truth, 1 if out.dtype.itemsize == 2 else 16)


def assert_gradient_is_close(gradient, truth):
    _assert_close(gradient, truth, 2 if gradient.dtype.itemsize == 2 else 48)


def _assert_close(actual, truth, units):
    tolerance = units * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), truth.double(), rtol=tolerance, atol=tolerance)


def dense(query, key, value, attn_mask=None, is_causal=False, scale=None, key_lengths=None):
    """Independent of fastattn, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    mask = torch.zeros(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.float64)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = mask.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        mask = mask + attn_mask.double()
    if is_causal:
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -torch.inf)
    if key_lengths is not None:
        padding = torch.arange(key.shape[2]) >= torch.as_tensor(key_lengths)[:, None, None, None]
        mask = mask.masked_fill(padding, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


@pytest.fixture
def general_calls(monkeypatch):
    """What goes the general way, forward or backward, by name."""
    seen = []

    def watch(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: (seen.append(name), function(*arguments))[1])

    watch(ops, "attention_output")
    watch(plain, "attention_gradients")
    return seen


class Subclass(torch.Tensor):
    pass


PLAIN = torch.randn(2, 4, 6, 8)
SHAPES = {
    "tiny": ((1, 8, 16, 64), (1, 8, 16, 64), (1, 8, 16, 64)),
    "one query": ((2, 4, 1, 32), (2, 4, 64, 32), (2, 4, 64, 32)),
    "odd": ((2, 3, 17, 5), (2, 3, 33, 5), (2, 3, 33, 7)),
    "grouped": ((2, 6, 9, 16), (2, 2, 20, 16), (2, 2, 20, 16)),
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_plain_calls_equal_general_ones(name, dtype, layout, options, general_calls):
    inputs = tensors(*SHAPES[name], dtype=dtype)
    if layout == "BLHD":
        inputs = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs]
    given = options | {"enable_gqa": name == "grouped"}
    out = scaled_dot_product_attention(*inputs, **given)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    differentiable = scaled_dot_product_attention(*leaves, **given)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(differentiable, leaves, grad_out)
    assert general_calls == []

    expected = general_attention(*leaves, **given)
    for result in (out, differentiable):
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()
    for one, other in zip(grads, torch.autograd.grad(expected, leaves, grad_out), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert_out_is_close(out, dense(*inputs, **options))
    exact = torch.autograd.grad(dense(*leaves, **options), leaves, grad_out.double())
    for one, other in zip(grads, exact, strict=True):
        assert_gradient_is_close(one, other)


def first_key_open(*shape):
    """A random bool mask under which every query may attend to the first key."""
    mask = torch.rand(shape) < 0.5
    mask[..., 0] = True
    return mask


#: Masks of a plain call on SHAPES["odd"], (2, 3, 17, 33) scores.
MASKS = {
    "bool": lambda dtype: {"attn_mask": first_key_open(17, 33)},
    "bool of each head": lambda dtype: {"attn_mask": first_key_open(3, 17, 33)},
    "bool of each sequence's keys": lambda dtype: {"attn_mask": first_key_open(2, 1, 1, 33)},
    "bool in another order": lambda dtype: {"attn_mask": first_key_open(33, 17).mT | first_key_open(17, 33)},
    "bias": lambda dtype: {"attn_mask": torch.randn(17, 33, dtype=dtype)},
    "bias of each score": lambda dtype: {"attn_mask": torch.randn(2, 3, 17, 33, dtype=dtype)},
    "one bias": lambda dtype: {"attn_mask": torch.randn((), dtype=dtype)},
    "bias of a parameter's copy": lambda dtype: {
        "attn_mask": torch.nn.Parameter(torch.randn(3, 1, 33).to(dtype)).detach()
    },
    "lengths": lambda dtype: {"key_lengths": torch.tensor([33, 5])},
    "lengths in 32 bits": lambda dtype: {"key_lengths": torch.tensor([1, 33], dtype=torch.int32)},
    "a list of lengths": lambda dtype: {"key_lengths": [17, 16]},
    "all": lambda dtype: {"attn_mask": first_key_open(17, 33), "key_lengths": [20, 9], "is_causal": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_plain_calls_with_masks_equal_general_ones(name, dtype, general_calls):
    torch.manual_seed(0)
    options = MASKS[name](dtype)
    leaves = tensors(*SHAPES["odd"], dtype=dtype, requires_grad=True)
    with torch.no_grad():
        out = scaled_dot_product_attention(*leaves, **options)
    differentiable = scaled_dot_product_attention(*leaves, **options)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(differentiable, leaves, grad_out)
    assert general_calls == []

    expected = general_attention(*leaves, **options)
    assert torch.equal(out, expected)
    assert torch.equal(differentiable, expected)
    truth = dense(*leaves, **options)
    assert_out_is_close(out, truth)
    exact = torch.autograd.grad(truth, leaves, grad_out.double())
    for one, other, true in zip(grads, torch.autograd.grad(expected, leaves, grad_out), exact, strict=True):
        assert torch.equal(one, other)
        assert_gradient_is_close(one, true)


#: Masks that are general, on PLAIN, and still give what torch gives.
GENERAL_MASKS = {
    "float32 for float16": (torch.float16, torch.randn(6, 6)),
    "float32 for float64": (torch.float64, torch.randn(6, 6)),
    "lazily negated": (torch.float32, torch._neg_view(torch.randn(6, 6))),
    "a subclass": (torch.float32, torch.randn(6, 6).as_subclass(Subclass)),
    "zeros that are not stored": (torch.float32, torch._efficientzerotensor((6, 6))),
}


@pytest.mark.parametrize("name", GENERAL_MASKS)
def test_masks_that_have_to_be_looked_at_are_not_plain_and_right(name):
    dtype, mask = GENERAL_MASKS[name]
    inputs = (PLAIN.to(dtype),) * 3
    assert attention(*inputs, mask) is None
    actual = scaled_dot_product_attention(*inputs, mask).as_subclass(torch.Tensor)
    expected = dense(*inputs, mask.as_subclass(torch.Tensor).clone())
    assert_out_is_close(actual, expected)


def test_a_bias_that_needs_a_gradient_gets_one():
    inputs, bias = tensors(*SHAPES["odd"]), torch.randn(17, 33, requires_grad=True)
    assert attention(*inputs, bias) is None
    (grad,) = torch.autograd.grad(scaled_dot_product_attention(*inputs, bias).sum(), bias)
    (expected,) = torch.autograd.grad(dense(*inputs, bias).sum(), bias)
    torch.testing.assert_close(grad, expected, rtol=0.0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(attention(*inputs, bias), scaled_dot_product_attention(*inputs, bias.detach()))


def test_queries_that_may_attend_to_nothing():
    leaves = tensors(*SHAPES["odd"], requires_grad=True)
    mask = torch.ones(17, 33, dtype=torch.bool)
    mask[3] = False
    out = scaled_dot_product_attention(*leaves, mask, key_lengths=[33, 0])
    grads = torch.autograd.grad(out.sum(), leaves)
    assert (out[1] == 0).all() and (out[:, :, 3] == 0).all() and (out[0, :, :3] != 0).all()
    assert (grads[0][:, :, 3] == 0).all() and all((grad[1] == 0).all() for grad in grads)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed(needed, general_calls):
    inputs = [tensor.requires_grad_(need) for tensor, need in zip(tensors(*SHAPES["odd"]), needed, strict=True)]
    (leaf,) = (tensor for tensor in inputs if tensor.requires_grad)
    grad_out = torch.randn(2, 3, 17, 7)
    (grad,) = torch.autograd.grad(scaled_dot_product_attention(*inputs), leaf, grad_out)
    assert general_calls == []
    assert torch.equal(grad, torch.autograd.grad(general_attention(*inputs), leaf, grad_out)[0])
    with torch.no_grad():
        assert not scaled_dot_product_attention(*inputs).requires_grad


#: What is not plain: changes of a plain call, which must still give what torch gives.
ODD = {
    "a subclass": {"key": PLAIN.as_subclass(Subclass)},
    "three dimensions": dict.fromkeys(("query", "key", "value"), PLAIN[0]),
    "five dimensions": dict.fromkeys(("query", "key", "value"), PLAIN[None]),
    "a batch that broadcasts": {"key": PLAIN[:1]},
    "a head that broadcasts": {"key": PLAIN[:, :1], "value": PLAIN[:, :1]},
    "a last stride of two": {"query": torch.randn(2, 4, 6, 16)[..., ::2]},
    "a transposed value": {"value": torch.randn(2, 4, 8, 6).mT},
    "no queries": {"query": PLAIN[:, :, :0]},
    "no batch": dict.fromkeys(("query", "key", "value"), PLAIN[:0]),
    "a lazily negated query": {"query": torch._neg_view(PLAIN)},
    "lazily negated keys": {"key": torch.complex(PLAIN, PLAIN).conj().imag},
    "lazily negated values": {"value": torch._neg_view(PLAIN)},
    "an integer dropout": {"dropout_p": 0},
    "an integer scale": {"scale": 1},
    "a tensor as scale": {"scale": torch.tensor(0.3)},
    "a scale of numpy": {"scale": np.float32(0.3)},
    "other heads of value": {"value": PLAIN[:, :2], "enable_gqa": True},
    "other heads of key": {"key": PLAIN[:, :2], "value": PLAIN[:, :1], "enable_gqa": True},
    "no head_dim": {"query": PLAIN[..., :0], "key": PLAIN[..., :0]},
    "no head_dim of value": {"value": PLAIN[..., :0]},
    "no head_dim at all": dict.fromkeys(("query", "key", "value"), PLAIN[..., :0]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_calls_are_not_plain_and_right(name):
    call = {"query": PLAIN, "key": PLAIN, "value": PLAIN} | ODD[name]
    assert attention(**call) is None
    actual = scaled_dot_product_attention(**call)
    expected = F.scaled_dot_product_attention(**(call | {"dropout_p": 0.0}))
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))


#: Wrong arguments: the general way has the messages (test_bad_input.py).
WRONG = {
    "no tensor": {"value": None},
    "a list": {"query": [[0.0]]},
    "another dtype": {"key": PLAIN.double()},
    "an integer dtype": {name: PLAIN.int() for name in ("query", "key", "value")},
    "a complex dtype": {name: PLAIN.to(torch.complex64) for name in ("query", "key", "value")},
    "another device": {"key": PLAIN.to("meta")},
    "another length": {"value": PLAIN[:, :, :5]},
    "another head_dim": {"key": PLAIN[..., :4]},
    "another batch": {"key": PLAIN[:1].expand(3, -1, -1, -1)},
    "heads that are no multiple": {"key": PLAIN[:, :3], "value": PLAIN[:, :3], "enable_gqa": True},
    "groups without enable_gqa": {"key": PLAIN[:, :2], "value": PLAIN[:, :2]},
    "a sparse tensor": {"query": PLAIN.to_sparse()},
    "a dropout that is not a number": {"dropout_p": float("nan")},
    "a bool for dropout": {"dropout_p": False},
    "an infinite scale": {"scale": float("inf")},
    "a word for scale": {"scale": "1"},
    "a word for is_causal": {"is_causal": "no"},
    "a tensor for enable_gqa": {"enable_gqa": torch.tensor([True, False])},
    "a mask that does not broadcast": {"attn_mask": torch.ones(6, 5, dtype=torch.bool)},
    "a mask of five dimensions": {"attn_mask": torch.ones(1, 2, 4, 6, 6, dtype=torch.bool)},
    "an integer mask": {"attn_mask": torch.ones(6, 6, dtype=torch.int64)},
    "a bias in another dtype": {"attn_mask": torch.zeros(6, 6, dtype=torch.float64)},
    "a list for a mask": {"attn_mask": [[True]]},
    "a mask elsewhere": {"attn_mask": torch.ones(6, 6, dtype=torch.bool, device="meta")},
    "a sparse mask": {"attn_mask": torch.ones(6, 6).to_sparse()},
    "a nested mask": {"attn_mask": torch.nested.nested_tensor([torch.ones(6), torch.ones(6)])},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_not_plain(name):
    call = {"query": PLAIN, "key": PLAIN, "value": PLAIN} | WRONG[name]
    assert attention(**call) is None
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        scaled_dot_product_attention(**call)


def test_wrong_lengths_are_refused_on_the_short_way_too():
    for lengths, words in (
        ([7, 1], "between 0"),
        ([-1, 1], "between 0"),
        ([1], "one length"),
        ([1.0, 2.0], "integers"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            attention(PLAIN, PLAIN, PLAIN, key_lengths=lengths)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_watches_a_call_makes_it_general():
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    with Mode():
        assert attention(PLAIN, PLAIN, PLAIN) is None
        scaled_dot_product_attention(PLAIN, PLAIN, PLAIN)
    assert torch.ops.fastattn.attention_forward.default in seen
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(PLAIN, PLAIN, PLAIN) is None
    with torch.autograd.forward_ad.dual_level():
        assert attention(PLAIN, PLAIN, PLAIN) is None
    mapped = torch.func.vmap(lambda query: torch.tensor(attention(query, query, query) is None))(PLAIN[None])
    assert mapped.all()
    traced = torch.jit.trace(lambda query: scaled_dot_product_attention(query, query, query), PLAIN)
    assert "fastattn::attention_forward" in str(traced.graph)


def test_a_function_mode_sees_the_same_result():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    expected = scaled_dot_product_attention(PLAIN, PLAIN, PLAIN)
    with Mode():
        assert torch.equal(scaled_dot_product_attention(PLAIN, PLAIN, PLAIN), expected)


def test_a_backend_that_refuses_is_not_overruled(monkeypatch):
    class Tired:
        @staticmethod
        def unavailable():
            return "too tired"

    original = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda name: Tired if name == "cpu" else original(name))
    warnings = []
    monkeypatch.setattr(dispatch, "_warn_once", lambda message, _: warnings.append(message))
    assert attention(PLAIN, PLAIN, PLAIN) is None
    scaled_dot_product_attention(PLAIN, PLAIN, PLAIN)
    assert "too tired" in warnings[0]


def leaves_and_grad(dtype=torch.float32):
    return tensors(*SHAPES["odd"], dtype=dtype, requires_grad=True), torch.randn(2, 3, 17, 7, dtype=dtype)


def test_a_change_of_a_saved_tensor_is_detected():
    (query, key, value), grad_out = leaves_and_grad()
    for index in range(4):
        inputs = [tensor.clone() for tensor in (query, key, value)]
        out = scaled_dot_product_attention(*inputs)
        [*inputs, out][index].detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(grad_out)


@pytest.mark.parametrize("changed", ["attn_mask", "key_lengths"])
def test_a_change_of_a_saved_mask_is_detected(changed):
    leaves, grad_out = leaves_and_grad()
    masks = {"attn_mask": first_key_open(17, 33), "key_lengths": torch.tensor([33, 4])}
    out = scaled_dot_product_attention(*leaves, **masks)
    masks[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad_out)


def test_hooks_see_the_masks_as_given_and_may_return_others(general_calls):
    leaves, grad_out = leaves_and_grad()
    for mask in (first_key_open(17, 33), torch.randn(3, 1, 33)):
        expected = torch.autograd.grad(dense(*leaves, mask, key_lengths=[33, 4]), leaves, grad_out.double())
        packed = []

        def pack(tensor, packed=packed):
            packed.append(tuple(tensor.shape))
            return tensor.detach()

        def negate_lazily(tensor, mask=mask):
            is_bias = tensor.shape == mask.shape and tensor.is_floating_point()
            return torch._neg_view(-tensor) if is_bias else tensor

        for unpack in (torch.clone, negate_lazily):
            packed.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                out = scaled_dot_product_attention(*leaves, mask, key_lengths=torch.tensor([33, 4]))
            assert packed == [*SHAPES["odd"], (2, 3, 17, 7), (2, 3, 17), tuple(mask.shape), (2,)]
            for actual, truth in zip(torch.autograd.grad(out, leaves, grad_out), expected, strict=True):
                torch.testing.assert_close(actual, truth.float(), rtol=0.0, atol=1e-5)
    assert general_calls == ["attention_gradients"]  # of the lazily negated bias


def test_the_graph_can_be_kept_and_is_freed():
    leaves, grad_out = leaves_and_grad()
    out = scaled_dot_product_attention(*leaves)
    first = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(out, leaves, grad_out), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, grad_out)


def test_out_can_be_changed_in_place_behind_a_copy():
    leaves, _ = leaves_and_grad()
    out = scaled_dot_product_attention(*leaves)
    assert not out._is_view()
    out.clone().mul_(2.0).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


#: Gradients of out that the engine does not read as they are.
GRADS_OUT = {
    "expanded": lambda grad: grad[:1, :1, :1, :1].expand_as(grad),
    "with a last stride of two": lambda grad: torch.stack((grad, grad), -1)[..., 0],
    "lazily negated": torch._neg_view,
    "of a subclass": lambda grad: grad.as_subclass(Subclass),
    "of zeros that are not stored": lambda grad: torch._efficientzerotensor(grad.shape, dtype=grad.dtype),
}


@pytest.mark.parametrize("name", GRADS_OUT)
def test_odd_gradients_of_out(name, general_calls):
    leaves, grad_out = leaves_and_grad()
    given = GRADS_OUT[name](grad_out)
    expected = torch.autograd.grad(dense(*leaves), leaves, given.as_subclass(torch.Tensor).double().clone())
    for actual, truth in zip(
        torch.autograd.grad(scaled_dot_product_attention(*leaves), leaves, given), expected, strict=True
    ):
        torch.testing.assert_close(actual.as_subclass(torch.Tensor), truth.float(), rtol=0.0, atol=1e-5)
    assert general_calls == ["attention_gradients"]


@pytest.mark.parametrize(
    "masks", [{}, {"attn_mask": first_key_open(17, 33), "key_lengths": [33, 4]}], ids=["", "masks"]
)
def test_second_derivatives(masks):
    leaves, _ = leaves_and_grad(torch.float64)

    def call(*leaves):
        return scaled_dot_product_attention(*leaves, **masks)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_a_mode_around_the_backward_sees_its_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen = []
    leaves, grad_out = leaves_and_grad()
    out = scaled_dot_product_attention(*leaves)
    with Mode():
        out.backward(grad_out)
    assert torch.ops.fastattn.attention_backward.default in seen


def test_hooks_see_five_saved_tensors_and_may_return_others(general_calls):
    leaves, grad_out = leaves_and_grad()
    expected = torch.autograd.grad(general_attention(*leaves), leaves, grad_out)
    general_calls.clear()
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach()

    def spread(tensor):
        return torch.stack((tensor, tensor), -1)[..., 0]

    for unpack, names in ((torch.clone, []), (spread, ["attention_gradients"])):
        packed.clear()
        general_calls.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            out = scaled_dot_product_attention(*leaves)
        assert [tuple(tensor.shape) for tensor in packed] == [*SHAPES["odd"], (2, 3, 17, 7), (2, 3, 17)]
        grads = torch.autograd.grad(out, leaves, grad_out)
        assert general_calls == names
        for actual, truth in zip(grads, expected, strict=True):
            torch.testing.assert_close(actual, truth)


@pytest.mark.parametrize("change", [torch.Tensor.double, lambda saved: saved[..., :1]], ids=["dtype", "shape"])
@pytest.mark.parametrize("place", [3, 4], ids=["out", "lse"])
def test_a_saved_tensor_that_comes_back_as_another_is_refused(place, change):
    packed = []

    def pack(tensor):
        packed.append(tensor.detach())
        return len(packed) - 1

    def unpack(index):
        return change(packed[index]) if index == place else packed[index]

    leaves, grad_out = leaves_and_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = scaled_dot_product_attention(*leaves)
    with pytest.raises(ValueError, match="forward's shape and dtype"):
        torch.autograd.grad(out, leaves, grad_out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.half() if saved.shape == (17, 33) else saved, "bias .* got torch.float16"),
        (lambda saved: saved.int() if saved.shape == (2,) else saved, "key_lengths .* int64"),
        (lambda saved: saved + 10**7 if saved.shape == (2,) else saved, "key_lengths .* between 0"),
    ],
    ids=["bias", "dtype of lengths", "lengths"],
)
def test_saved_masks_that_come_back_as_others_are_refused(change, message):
    leaves, grad_out = leaves_and_grad()
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, change):
        out = scaled_dot_product_attention(*leaves, torch.randn(17, 33), key_lengths=torch.tensor([33, 4]))
    with pytest.raises(ValueError, match=message):
        torch.autograd.grad(out, leaves, grad_out)


def test_saved_lengths_that_come_back_strided():
    leaves, grad_out = leaves_and_grad()
    lengths = torch.tensor([33, 4])
    expected = torch.autograd.grad(scaled_dot_product_attention(*leaves, key_lengths=lengths), leaves, grad_out)

    def spread(saved):
        return torch.stack((saved, saved), -1)[..., 0] if saved.shape == (2,) else saved

    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, spread):
        out = scaled_dot_product_attention(*leaves, key_lengths=lengths)
    for actual, truth in zip(torch.autograd.grad(out, leaves, grad_out), expected, strict=True):
        assert torch.equal(actual, truth)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    leaves, grad_out = leaves_and_grad()
    expected = torch.autograd.grad(scaled_dot_product_attention(*leaves), leaves, grad_out)
    checkpoint(scaled_dot_product_attention, *leaves, use_reentrant=use_reentrant).backward(grad_out)
    for leaf, truth in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, truth)


def test_an_unused_output_gets_no_gradient():
    leaves, _ = leaves_and_grad()

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None, grad

    other = torch.randn(3, requires_grad=True)
    grads = torch.autograd.grad(
        Stop.apply(scaled_dot_product_attention(*leaves), other).sum(), (*leaves, other), allow_unused=True
    )
    assert grads[:3] == (None, None, None)
    assert torch.equal(grads[3], torch.ones(3))


def test_without_torchs_exchange_table_no_call_is_plain():
    cpu._C.use_torch(torch, None)
    try:
        assert attention(PLAIN, PLAIN, PLAIN) is None
    finally:
        cpu._C.use_torch(torch, torch.Tensor.__dlpack_c_exchange_api__)
    assert attention(PLAIN, PLAIN, PLAIN) is not None
