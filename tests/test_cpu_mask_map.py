"""Bool masks of all structures: what the engine skips of a mask, and that it never matters how the mask is stored."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest
import torch

from fastattn.backends import cpu
from fastattn.problem import make_problem
from fastattn.testing import assert_within_budget, run_backend, run_reference

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, HEAD_DIM = 2, 2, 1, 150, 333, 16
FIELDS = {
    "alone": {},
    "band and dropout": {
        **{"causal": "lower_right", "window": (200, None), "key_lengths": [333, 97]},
        **{"dropout_p": 0.3, "rng_state": torch.tensor([5, 7])},
    },
}


#: Few queries go another way, and a key head's query heads together.
FEW = {
    "window": lambda: torch.arange(1300).sub(torch.tensor([[700], [705], [1250]])).abs() < 40,
    "of a head": lambda: torch.arange(1300) // 100 == torch.arange(4).mul(3)[:, None, None],
    "holes": lambda: torch.arange(1300) // 150 % 2 == 0,
    "all false": lambda: torch.zeros(1, 1300, dtype=torch.bool),
    "random": lambda: torch.rand(1300, generator=torch.Generator().manual_seed(2)) < 0.01,
}


def documents() -> torch.Tensor:
    """Queries and keys of five documents, cut where no tile ends."""
    query = torch.bucketize(torch.arange(QUERIES), torch.tensor([20, 21, 75, 130]), right=True)
    key = torch.bucketize(torch.arange(KEYS), torch.tensor([31, 150, 167, 300]), right=True)
    return query[:, None] == key


def blocks(queries: int, keys: int) -> torch.Tensor:
    """A chessboard."""
    return (torch.arange(QUERIES)[:, None] // queries + torch.arange(KEYS) // keys) % 2 == 0


def one_element() -> torch.Tensor:
    mask = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    mask[77, 200] = True
    return mask


def one_missing() -> torch.Tensor:
    return ~one_element()


def random(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4


MASKS = {
    "documents": documents,
    "chessboard of 64 x 16": lambda: blocks(64, 16),
    "chessboard of 16 x 128": lambda: blocks(16, 128),
    "chessboard of 7 x 45": lambda: blocks(7, 45),
    "all false": lambda: torch.zeros(QUERIES, KEYS, dtype=torch.bool),
    "all true": lambda: torch.ones(QUERIES, KEYS, dtype=torch.bool),
    "one true": one_element,
    "one false": one_missing,
    "padding": lambda: (torch.arange(KEYS) < torch.tensor([[300], [64]]))[:, None, None],
    "padding in front": lambda: (torch.arange(KEYS) >= torch.tensor([[0], [191]]))[:, None, None],
    "whole queries": lambda: random(QUERIES, 1),
    "of a head": lambda: random(1, HEADS, QUERIES, KEYS),
    "of a batch entry": lambda: documents() & random(BATCH, 1, 1, KEYS),
    "keys first in memory": lambda: random(KEYS, QUERIES).T,
    "every second key in memory": lambda: random(QUERIES, 2 * KEYS)[:, ::2],
    "bytes of 2": lambda: documents().to(torch.uint8).mul(2).view(torch.bool),
}


def problem_of(mask: torch.Tensor, dtype: torch.dtype, fields: dict):
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int, length: int) -> torch.Tensor:
        return torch.randn(BATCH, heads, length, HEAD_DIM, generator=generator).to(dtype)

    query, key, value = tensor(HEADS, QUERIES), tensor(KV_HEADS, KEYS), tensor(KV_HEADS, KEYS)
    return make_problem(query, key, value, mask, enable_gqa=True, **fields), tensor(HEADS, QUERIES)


@cache
def case(mask: str, dtype: torch.dtype, fields: str = "alone"):
    """The problem, a gradient of its output, and both references of its results."""
    problem, grad_out = problem_of(MASKS[mask](), dtype, FIELDS[fields])
    return problem, grad_out, run_reference(problem, grad_out), run_reference(problem, grad_out, dtype=None)


@pytest.mark.parametrize(
    "dtype, fields",
    [
        (torch.float32, "alone"),
        (torch.float32, "band and dropout"),
        (torch.bfloat16, "alone"),
        (torch.float64, "alone"),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", MASKS)
def test_within_budget_and_the_same_bits_for_a_mask_stored_per_head(mask, fields, dtype, isa):
    problem, grad_out, exact, naive = case(mask, dtype, fields)
    results = run_backend(cpu, problem, grad_out)
    assert_within_budget(results, problem, exact, naive, grad_out)
    weights = weights_of(problem, results["lse"])
    stored = problem._replace(attn_mask=problem.attn_mask.contiguous())
    for name, result in run_backend(cpu, stored, grad_out).items():
        assert torch.equal(result, results[name]), name
    assert torch.equal(weights_of(stored, results["lse"]), weights)


@pytest.mark.parametrize("mask", FEW)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_few_queries(mask, dtype, isa):
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((1, 4, 3, 24), (1, 2, 1300, 24), (1, 2, 1300, 24), (1, 4, 3, 24))
    )
    problem = make_problem(query, key, value, FEW[mask](), enable_gqa=True)
    results = run_backend(cpu, problem, grad_out)
    exact, naive = run_reference(problem, grad_out), run_reference(problem, grad_out, dtype=None)
    assert_within_budget(results, problem, exact, naive, grad_out)
    stored = problem._replace(attn_mask=problem.attn_mask.contiguous())
    for name, result in run_backend(cpu, stored, grad_out).items():
        assert torch.equal(result, results[name]), name


#: Makes pages of keys and values that a mask hides from all queries unreadable: who reads them dies.
READS_NOTHING_HIDDEN = """
import ctypes, mmap, sys
import torch
from fastattn.backends import cpu
from fastattn.problem import make_problem

cpu.set_isa(sys.argv[1])
dtype, queries, length, heads = getattr(torch, sys.argv[2]), int(sys.argv[3]), 1024, 2
page = mmap.PAGESIZE // (64 * dtype.itemsize)  # keys
hidden = ((0, 2 * page), (256, 768), (length - page, length))
mask = torch.ones(queries, length, dtype=torch.bool)
for begin, end in hidden:
    mask[:, begin:end] = False

def guarded():
    size = heads * length * 64 * dtype.itemsize
    memory = mmap.mmap(-1, size)
    tensor = torch.frombuffer(memory, dtype=dtype).view(1, heads, length, 64)
    return tensor.copy_(torch.randn(tensor.shape)), ctypes.addressof(ctypes.c_char.from_buffer(memory))

(key, key_address), (value, value_address) = guarded(), guarded()
query = torch.randn(1, heads, queries, 64, dtype=dtype)
problem = make_problem(query, key, value, mask)
copied = make_problem(query, key.clone(), value.clone(), mask)
for address in (key_address, value_address):
    for head in range(heads):
        for begin, end in hidden:
            first = address + (head * length + begin) * 64 * dtype.itemsize
            size = (end - begin) * 64 * dtype.itemsize
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(first), ctypes.c_size_t(size), 0) == 0
results = []
for given in (problem, copied):
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3])
    cpu.forward(given, out, lse)
    results.append(out)
assert torch.equal(*results)
print("read nothing that is hidden")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by the C library's mprotect")
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("queries", (1, 80))
def test_blocks_of_keys_that_the_mask_hides_are_not_read(queries, dtype):
    command = [sys.executable, "-c", READS_NOTHING_HIDDEN, cpu.isa(), dtype, str(queries)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "read nothing that is hidden\n", (done.returncode, done.stderr)


def weights_of(problem, lse: torch.Tensor) -> torch.Tensor:
    weights = torch.full(problem.attn_mask.shape, torch.nan, dtype=problem.lse_dtype)
    cpu.weights(problem, lse, weights, False)
    return weights


@pytest.mark.parametrize("name", ("padding", "padding in front", "one true"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_what_no_query_may_attend_to_changes_nothing(name, dtype, isa):
    problem, grad_out, exact, naive = case(name, dtype)
    hidden = ~problem.attn_mask.any(dim=2)[:, :KV_HEADS]  # [B, Hkv, Lk]; the mask is alike for all heads
    assert hidden.any()
    poisoned = problem._replace(
        key=problem.key.masked_fill(hidden[..., None], torch.nan),
        value=problem.value.masked_fill(hidden[..., None], torch.inf),
    )
    assert_within_budget(run_backend(cpu, poisoned, grad_out), problem, exact, naive, grad_out)


def test_a_shared_mask_gives_the_same_bits_on_any_number_of_threads(isa):
    problem, grad_out = problem_of(documents(), torch.float32, {})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run_backend(cpu, problem, grad_out)
        torch.set_num_threads(3)
        together = run_backend(cpu, problem, grad_out)
    finally:
        torch.set_num_threads(threads)
    for name, result in alone.items():
        assert torch.equal(result, together[name]), name
