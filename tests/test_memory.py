"""Large results lie on huge pages, behave like any tensor, and leave their memory to later ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import fastattn
from fastattn import memory
from fastattn.backends import cpu

needs_engine = pytest.mark.skipif(
    not cpu.makes_results(), reason="results are kept by the extension, from torch 2.10 on"
)


@pytest.fixture
def nothing_kept():
    memory.keep_at_most(0)
    memory.keep_at_most(64)
    yield
    memory.keep_at_most(0)
    memory.keep_at_most(128)


def result(mebibytes: int) -> torch.Tensor:
    return memory.new_empty_strided(torch.empty(0), (mebibytes, 1 << 18), (1 << 18, 1))


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
    assert tensor.untyped_storage().nbytes() >= size
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("last_size", [64, 80])
def test_results_of_contiguous_tensors_are_contiguous_in_one_call(dtype, last_size):
    like = torch.empty(2, 8, 1024, 64, dtype=dtype)
    tensor = memory.new_contiguous(like, last_size)
    if not cpu.makes_results():
        assert tensor is None
        return
    expected = torch.empty(2, 8, 1024, last_size, dtype=dtype)
    assert (tensor.shape, tensor.stride(), tensor.dtype) == (expected.shape, expected.stride(), dtype)
    assert tensor.data_ptr() % memory.HUGE_PAGE == 0
    assert memory.new_contiguous(like.transpose(1, 2), last_size) is None
    assert memory.new_contiguous(like[:, :, ::2], last_size) is None
    assert memory.new_contiguous(like[:1, :1], last_size) is None  # small
    assert memory.new_contiguous(like.to("meta"), last_size) is None


@needs_engine
def test_memory_of_a_freed_result_serves_the_next(nothing_kept):
    first = result(8)
    place = first.data_ptr()
    view = first[3:]
    del first
    assert memory.kept() == 0  # a view still lives
    del view
    assert memory.kept() == 8 << 20
    assert result(16).data_ptr() != place  # too large
    kept = memory.kept()
    assert result(2).data_ptr() != place  # would waste three quarters
    assert result(8).data_ptr() == place
    assert memory.kept() >= kept


@needs_engine
def test_no_more_is_kept_than_allowed(nothing_kept):
    blocks = [result(16) for _ in range(6)]
    places = [block.data_ptr() for block in blocks]
    while blocks:
        blocks.pop(0)
    assert memory.kept() == 64 << 20
    again = [result(16) for _ in range(4)]
    assert {block.data_ptr() for block in again} == set(places[2:])  # the oldest are gone
    del again
    memory.keep_at_most(40)
    assert memory.kept() == 32 << 20
    memory.keep_at_most(0)
    assert memory.kept() == 0
    large = result(4)
    del large
    assert memory.kept() == 0


@needs_engine
def test_any_limit_of_at_least_zero_will_do(nothing_kept):
    memory.keep_at_most(1 << 60)
    block = result(4)
    del block
    assert memory.kept() == 4 << 20
    with pytest.raises(ValueError, match="mebibytes must be at least 0, got -1"):
        memory.keep_at_most(-1)
    assert memory.kept() == 4 << 20


@needs_engine
def test_a_result_larger_than_all_that_is_kept_leaves_the_others_in_place(nothing_kept):
    small = result(16)
    del small
    large = result(80)
    del large
    assert memory.kept() == 16 << 20


@needs_engine
def test_threads_share_what_is_kept(nothing_kept):
    wrong = []

    def work(mark: float) -> None:
        for _ in range(200):
            mine = result(2)
            mine.fill_(mark)
            if not bool((mine == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert memory.kept() <= 64 << 20


@needs_engine
@pytest.mark.parametrize(("given", "expected"), [("0", "0"), ("4", str(4 << 20)), (None, str(8 << 20))])
def test_the_environment_says_how_much_is_kept(given, expected):
    program = """
import torch
from fastattn import memory
block = memory.new_empty_strided(torch.empty(0), (1 << 20,), (1,))
pair = memory.new_empty_strided(torch.empty(0), (1 << 20,), (1,))
del block, pair
print(memory.kept())
"""
    environment = {name: value for name, value in os.environ.items() if name != "FASTATTN_KEPT_MIB"}
    if given is not None:
        environment["FASTATTN_KEPT_MIB"] = given
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == expected


@needs_engine
@pytest.mark.parametrize("given", ["-1", "1.5"])
def test_a_wrong_environment_is_an_error_that_names_it(given):
    done = subprocess.run(
        [sys.executable, "-c", "import fastattn.memory"],
        capture_output=True,
        text=True,
        env=os.environ | {"FASTATTN_KEPT_MIB": given},
    )
    assert done.returncode != 0
    assert "FASTATTN_KEPT_MIB must be a whole number of MiB" in done.stderr


@needs_engine
def test_a_forked_child_computes_on_with_what_was_kept(nothing_kept):
    kept = result(8)
    kept.fill_(3.0)
    place = kept.data_ptr()
    del kept
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own threads are not in the child
        mine = result(8)
        good = mine.data_ptr() == place
        mine.fill_(5.0)
        os._exit(0 if good and bool((mine == 5.0).all()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = result(8)
    assert again.data_ptr() == place
    assert bool((again == 3.0).all())  # the child's writes are its own
