"""torch.utils.flop_counter: what the operators count, against pairs that a dense mask counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fastattn
from fastattn import reference
from fastattn.integrations.flops import visible_pairs
from fastattn.problem import make_problem


def counted(function, *arguments, **options):
    with FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return counter.get_total_flops()


def tensors(batch=2, heads=4, key_heads=2, queries=7, keys=9, head_dim=8, value_dim=16):
    return (
        torch.randn(batch, heads, queries, head_dim),
        torch.randn(batch, key_heads, keys, head_dim),
        torch.randn(batch, key_heads, keys, value_dim),
    )


@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
@pytest.mark.parametrize("window", [(None, None), (0, 0), (2, None), (None, 1), (30, 3)])
def test_visible_pairs_are_those_of_the_dense_mask(causal, window):
    for queries in (0, 1, 5, 12):
        for keys in (0, 1, 6, 12):
            query, key = torch.randn(1, 1, queries, 1), torch.randn(1, 1, keys, 1)
            problem = make_problem(query, key, key, causal=causal, window=window)
            assert visible_pairs(queries, keys, causal, *window) == int(reference.allowed(problem).sum())


@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 9])])
def test_forward_and_backward_count_visible_pairs(causal, lengths):
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    options = {"causal": causal, "key_lengths": lengths, "enable_gqa": True, "window": (5, None)}
    problem = make_problem(query, key, value, **options)
    pairs = int(reference.allowed(problem).expand(2, 4, 7, 9).sum())
    assert counted(fastattn.scaled_dot_product_attention, query, key, value, **options) == 2 * pairs * (8 + 16)
    out = fastattn.scaled_dot_product_attention(query, key, value, **options)
    every_product = 2 * pairs * (3 * 8 + 2 * 16)
    assert counted(torch.autograd.grad, out.sum(), (query, key, value)) == every_product


def test_a_call_without_masks_counts_as_much_as_torch_s():
    inputs = [tensor.requires_grad_() for tensor in tensors(key_heads=4)]
    shapes = [tensor.shape for tensor in inputs]
    out = fastattn.scaled_dot_product_attention(*inputs)
    assert counted(fastattn.scaled_dot_product_attention, *inputs) == sdpa_flop_count(*shapes)
    assert counted(out.sum().backward) == sdpa_backward_flop_count(out.shape, *shapes)


def test_gradients_that_are_not_needed_do_not_count():
    query, key, value = tensors(key_heads=4)
    value.requires_grad_()
    out = fastattn.scaled_dot_product_attention(query, key, value)
    assert counted(out.sum().backward) == 2 * 2 * 4 * 7 * 9 * (8 + 16)


def test_a_module_counts_its_weights():
    module = fastattn.MultiHeadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    attention = 2 * 2 * 5 * 5 * 8 * 2
    assert counted(module, x, x, x) - counted(module, x, x, x, need_weights=False) == attention // 2
    projections = 2 * 2 * 5 * 8 * (24 + 8)
    assert counted(module, x, x, x, need_weights=False) == attention + projections


def test_a_compiled_call_counts():
    query, key, value = tensors(key_heads=4)
    compiled = torch.compile(fastattn.scaled_dot_product_attention, backend="aot_eager")
    compiled(query, key, value, is_causal=True)
    pairs = 2 * 4 * visible_pairs(7, 9, "upper_left", None, None)
    assert counted(compiled, query, key, value, is_causal=True) == 2 * pairs * (8 + 16)
