"""Batched cotangents: the older vmap, of torch.autograd.grad(is_grads_batched=True) and what builds on it."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from fastattn import MultiHeadAttention, SelfAttention, scaled_dot_product_attention
from fastattn.masks import combine_masks

SHAPES = ((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3))


def tensors(*shapes, dtype=torch.float64, requires_grad=True):
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes)


def assert_batched_gradients_are_a_loops(outputs, leaves):
    """Those of three cotangents at once are those of each, and can be differentiated again."""
    grads = [torch.randn(3, *output.shape).to(output.dtype) for output in outputs]
    singles = [
        torch.autograd.grad(outputs, leaves, [grad[i] for grad in grads], create_graph=True, allow_unused=True)
        for i in range(3)
    ]
    expected = [None if one[0] is None else torch.stack(one) for one in zip(*singles, strict=True)]
    tolerance = {"rtol": 0.0, "atol": 32 * torch.finfo(outputs[0].dtype).eps}
    for create_graph in (False, True):
        batched = torch.autograd.grad(
            outputs,
            leaves,
            grads,
            is_grads_batched=True,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
        for actual, truth in zip(batched, expected, strict=True):
            torch.testing.assert_close(actual, truth, **tolerance)
    seconds = [
        torch.autograd.grad(
            sum(g.sin().sum() for g in firsts if g is not None), leaves, retain_graph=True, allow_unused=True
        )
        for firsts in (batched, expected)
    ]
    for actual, truth in zip(*seconds, strict=True):
        torch.testing.assert_close(actual, truth)


BIAS = torch.randn(4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
OPTIONS = {
    "plain": {},
    "mask": {"attn_mask": torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6},
    "bias": {"attn_mask": BIAS},
    "band and lengths": {"causal": "lower_right", "window": (2, None), "key_lengths": [3, 7]},
    "dropout": {"dropout_p": 0.4, "attn_mask": BIAS},
    "torch": {"backend": "torch"},
    "reference": {"backend": "reference"},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("return_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("name", OPTIONS)
def test_batched_gradients_of_the_function(name, return_lse):
    leaves, options = tensors(*SHAPES), OPTIONS[name]
    outputs = scaled_dot_product_attention(*leaves, enable_gqa=True, return_lse=return_lse, **options)
    with_bias = (*leaves, BIAS) if options.get("attn_mask") is BIAS else leaves
    assert_batched_gradients_are_a_loops(outputs if return_lse else (outputs,), with_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_batched_gradients_in_every_dtype(dtype):
    leaves = tensors(*SHAPES, dtype=dtype)
    out = scaled_dot_product_attention(*leaves, enable_gqa=True)
    grads = torch.randn(3, *out.shape).to(dtype)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for index, grad in enumerate(grads):
        expected = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        for actual, truth in zip(batched, expected, strict=True):
            torch.testing.assert_close(actual[index], truth)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_batched_gradients_of_modules(need_weights, training):
    module = MultiHeadAttention(8, 2, dropout=0.3, add_bias_kv=True, dtype=torch.float64).train(training)
    x, bias = tensors((5, 2, 8), (5, 5))
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    out, weights = module(x, x, x, padding, need_weights, bias)
    outputs = (out, weights) if need_weights else (out,)
    assert_batched_gradients_are_a_loops(outputs, (x, bias, *module.parameters()))
    assert_batched_gradients_are_a_loops(
        (SelfAttention(8, 2, 0.3, dtype=torch.float64).train(training)(x, is_causal=True),), (x,)
    )


def dense(query, key, value):
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def test_vectorized_jacobians_and_hessians():
    inputs = tensors((1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 2), requires_grad=False)
    for ours, theirs in zip(
        jacobian(scaled_dot_product_attention, inputs, vectorize=True), jacobian(dense, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)

    def loss(attend):
        return lambda *inputs: attend(*inputs).sin().sum()

    ours, theirs = hessian(loss(scaled_dot_product_attention), inputs, vectorize=True), hessian(loss(dense), inputs)
    for left, right in zip(sum(ours, ()), sum(theirs, ()), strict=True):
        torch.testing.assert_close(left, right)


def test_gradcheck_with_batched_gradients():
    inputs = tensors((1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 2))

    def attend(*inputs):
        return scaled_dot_product_attention(*inputs, enable_gqa=True, is_causal=True, return_lse=True)

    assert torch.autograd.gradcheck(attend, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attend, inputs, check_batched_grad=True)


@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, None), (None, 0, 0)])
def test_the_older_vmap_of_the_forward(mapped):
    inputs = tensors(*((3, *shape) for shape in SHAPES), requires_grad=False)
    inputs = [x if dim == 0 else x[0] for x, dim in zip(inputs, mapped, strict=True)]
    older_vmap = torch._vmap_internals._vmap

    def attend(*inputs):
        return scaled_dot_product_attention(*inputs, enable_gqa=True)

    actual = older_vmap(attend, in_dims=mapped)(*inputs)
    for i in range(3):
        torch.testing.assert_close(
            actual[i], attend(*(x if dim is None else x[i] for x, dim in zip(inputs, mapped, strict=True)))
        )


def test_the_older_vmap_over_masks_alone():
    query, key, value = tensors(*SHAPES, requires_grad=False)

    def attend(mask):
        return scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    for masks in (torch.rand(3, 5, 7) < 0.6, torch.randn(3, 5, 7, dtype=torch.float64)):
        actual = torch._vmap_internals._vmap(attend)(masks)
        torch.testing.assert_close(actual, torch.stack([attend(mask) for mask in masks]))


def test_a_module_does_not_look_at_a_mapped_padding():
    query = torch.randn(1, 2, 4, 3)
    padding = torch.zeros(3, 1, 4)
    padding[0, :, 3:] = -torch.inf

    def bias(padding):
        return combine_masks(query, 4, None, padding, False).bias

    torch.testing.assert_close(torch._vmap_internals._vmap(bias)(padding), padding[:, None, None])
