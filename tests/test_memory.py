"""Large results lie on huge pages and behave like any tensor."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [memory.LARGE, memory.LARGE + 4096, 3 * memory.LARGE])
def test_large_memory_starts_on_a_huge_page(size, dtype):
    shape = (2, size // dtype.itemsize // 2)
    tensor = memory.new_empty_strided(torch.empty(0), shape, (shape[1], 1), dtype)
    assert tensor.data_ptr() % memory.HUGE_PAGE == 0
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert not tensor._is_view()
    end = tensor.storage_offset() * dtype.itemsize + size
    assert end <= tensor.untyped_storage().nbytes()
    tensor.fill_(1.0)
    assert tensor.sum(dtype=torch.float64) == tensor.numel()


def test_small_memory_is_what_torch_gives():
    tensor = memory.new_empty_strided(torch.empty(0), (3, 5), (5, 1))
    assert tensor.storage_offset() == 0
    assert tensor.untyped_storage().nbytes() == 60


@pytest.mark.parametrize("length", [16, 1024])
def test_an_output_can_be_changed_in_place_and_has_the_layout_of_its_query(length):
    leaf = torch.randn(1, length, 8, 64, requires_grad=True)
    query = leaf.transpose(1, 2)
    out = fastattn.scaled_dot_product_attention(query, query, query)
    assert out.stride() == query.stride()
    expected = out.detach().clone() + 1.0
    out += 1.0
    torch.testing.assert_close(out, expected)


def test_large_gradients_are_right():
    leaves = [torch.randn(1, 8, 1030, 64, requires_grad=True) for _ in range(3)]
    out = fastattn.scaled_dot_product_attention(*leaves)
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves)
    cotangent = torch.randn(out.shape)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
