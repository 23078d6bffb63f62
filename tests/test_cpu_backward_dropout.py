"""Which elements dropout drops: the engine against a Philox4x32-10 of plain Python."""

from __future__ import annotations

import pytest
import torch

from fastattn.backends import cpu
from fastattn.problem import make_problem
from fastattn.testing import Case, assert_within_budget, run_backend, run_reference

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)

WORD = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 as Salmon et al. (2011) write it: ten rounds on four words, the key bumped between."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = product1 >> 32 ^ c1 ^ k0, product1 & WORD, product0 >> 32 ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    (
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ),
)
def test_known_answers(counter, key, words):
    """The vectors that the Random123 distribution publishes."""
    assert philox(counter, key) == words


def _kept_by_gradient(problem):
    """bool [B, H, Lq, Lk]: the weights that reach dV, one query at a time."""
    batch, heads, queries, dim = problem.query.shape
    keys = problem.key.shape[2]
    out, lse = torch.empty(batch, heads, queries, dim), torch.empty(batch, heads, queries)
    cpu.forward(problem, out, lse)
    kept = torch.empty(batch, heads, queries, keys, dtype=torch.bool)
    for i in range(queries):
        grad_out, grad_value = torch.zeros_like(out), torch.empty_like(problem.value)
        grad_out[:, :, i] = 1
        cpu.backward(problem, out, lse, grad_out, None, None, None, grad_value, None)
        kept[:, :, i] = grad_value[..., 0] > 0
    return kept


@pytest.mark.parametrize(("seed", "offset"), ((0, 0), (123456789012345678, 9), (-5, 2**40 + 3)))
def test_forward_and_backward_drop_what_philox_says(seed, offset, isa):
    problem = Case("dropout", batch=2, heads=3, queries=19, keys=37, head_dim=4, dropout_p=0.4).make()
    problem = problem._replace(rng_state=torch.tensor([seed, offset]))
    key = (seed & WORD, seed >> 32 & WORD)
    expected = torch.tensor(
        [
            [philox((j // 4, i, head, offset & WORD), key)[j % 4] >= int(0.4 * 2**32) for j in range(37)]
            for head in range(6)
            for i in range(19)
        ]
    ).view(2, 3, 19, 37)
    lse, weights = torch.empty(2, 3, 19), torch.empty(2, 3, 19, 37)
    cpu.forward(problem, torch.empty(2, 3, 19, 4), lse)
    cpu.weights(problem, lse, weights, average=False)
    assert torch.equal(weights > 0, expected)
    assert torch.equal(_kept_by_gradient(problem), expected)


def test_threshold_is_exact(isa):
    """Element (0, 0, 0, 0) of seed 0 has the first known answer: dropped from the next float32-free p on."""
    word = 0x6627E8D5
    for threshold, kept in ((word, True), (word + 1, False)):
        problem = Case("one", batch=1, heads=1, queries=1, keys=1, head_dim=4, dropout_p=threshold / 2**32).make()
        problem = problem._replace(rng_state=torch.tensor([0, 0]))
        assert _kept_by_gradient(problem).item() is kept


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("queries", (4, 70))
def test_a_key_that_dropout_takes_from_all_queries_still_has_its_part_of_their_gradients(isa, dtype, queries):
    """Its weights are 0 but not its score gradients: it is no hidden key, whose row may be taken for zeros."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(1, 1, length, 16, generator=generator).to(dtype) for length in (queries, 70, 70, queries)
    )
    options = {"attn_mask": torch.arange(70) < 60, "dropout_p": 0.9, "rng_state": torch.tensor([3, 0])}
    clean = make_problem(query, key, value, **options)
    poisoned = clean._replace(key=torch.where(torch.arange(70)[:, None] < 60, key, torch.nan))
    expected, actual = (run_backend(cpu, problem, grad_out) for problem in (clean, poisoned))
    assert torch.equal(actual["grad_query"], expected["grad_query"])
    references = (run_reference(clean, grad_out, dtype=kind) for kind in (torch.float64, None))
    assert_within_budget(actual, clean, *references, grad_out)
