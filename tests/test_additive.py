"""Additive attention and attention pooling against the formula written out in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn.additive import AdditiveAttention, additive_attention, additive_weights
from fastattn.backends import additive_cpu, additive_tiles, cpu
from fastattn.pooling import AttentionPooling

SIZES = [  # batch, queries, keys, features, value features
    (1, 1, 1, 1, 1),
    (2, 1, 33, 8, 5),
    (3, 17, 16, 12, 12),
    (2, 40, 65, 20, 7),
    (1, 64, 1, 3, 2),
]


def naive(query, key, value, weight, mask=None):
    """The formula, every tanh stored; a query with nothing to attend to gives 0."""
    score = torch.tanh(query[:, :, None, :] + key[:, None, :, :]) @ weight
    if mask is None:
        return score.softmax(-1) @ value, score.softmax(-1)
    score = score.masked_fill(~mask[:, None, :], float("-inf"))
    weights = score.softmax(-1).nan_to_num(0.0)
    return weights @ value, weights


def inputs(size, dtype=torch.float64, seed=0):
    batch, queries, keys, features, value_features = size
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, features), (batch, keys, features), (batch, keys, value_features), (features,))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def lengths_of(size):
    """The first sequence is full, the last has no key at all where there are several."""
    batch, _, keys, _, _ = size
    lengths = torch.linspace(keys, 0, batch).long()
    return lengths, torch.arange(keys) < lengths[:, None]


def engines():
    """The tiles of PyTorch operations at several sizes, and the C++ engine with each instruction set."""
    tiles = ["tiles of 1", "tiles of 500", "tiles of 262144"]
    missing = additive_cpu.reasons(*(torch.ones(1, 1, 1) for _ in range(3)))
    return tiles if missing else [*tiles, *cpu.available_isas()]


@pytest.fixture(params=engines())
def engine(request, monkeypatch):
    if request.param.startswith("tiles"):
        monkeypatch.setattr(additive_tiles, "TILE_ELEMENTS", int(request.param.split()[-1]))
        monkeypatch.setattr(additive_cpu, "reasons", lambda q, k, v: ["not in this test"])
        yield
    else:
        before = cpu.isa()
        cpu.set_isa(request.param)
        yield
        cpu.set_isa(before)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_output_and_gradients(size, masked, engine):
    tensors = inputs(size)
    lengths, mask = lengths_of(size) if masked else (None, None)
    expected = naive(*tensors, mask)[0]
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, tensors, grad)
    actual = additive_attention(*tensors, key_lengths=lengths)
    torch.testing.assert_close(actual, expected)
    for got, want in zip(torch.autograd.grad(actual, tensors, grad), expected_grads, strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck(engine):
    lengths = torch.tensor([5, 2, 0])
    assert torch.autograd.gradcheck(
        lambda *tensors: additive_attention(*tensors, key_lengths=lengths), inputs((3, 4, 5, 3, 2))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_the_naive_ones(dtype, engine):
    tensors = inputs((2, 30, 50, 16, 8), dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = naive(*exact)[0]
    truth_grads = torch.autograd.grad(truth.sum() + truth.square().sum(), exact)
    figures = []
    for function in (lambda *x: naive(*x)[0], additive_attention):
        out = function(*tensors)
        assert out.dtype == dtype
        grads = torch.autograd.grad(out.sum() + out.square().sum(), tensors)
        assert all(g.dtype == dtype for g in grads)
        pairs = zip((out, *grads), (truth, *truth_grads), strict=True)
        figures.append([(a.double() - b).abs().max().item() for a, b in pairs])
    for of_naive, of_ours, reference in zip(*figures, (truth, *truth_grads), strict=True):
        floor = 2 * torch.finfo(dtype).eps * reference.abs().max().item()
        assert of_ours <= 2 * of_naive + floor


def test_masked_nan_does_not_leak(engine):
    tensors = inputs((2, 3, 6, 4, 4))
    lengths = torch.tensor([6, 2])
    poisoned = [t.detach().clone() for t in tensors]
    poisoned[1][1, 2:], poisoned[2][1, 2:] = float("nan"), float("inf")
    poisoned = [t.requires_grad_() for t in poisoned]
    results = []
    for x in (tensors, poisoned):
        out = additive_attention(*x, key_lengths=lengths)
        results.append([out, *torch.autograd.grad(out.sum(), x)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


def test_a_gradient_that_is_not_finite_does_not_reach_masked_keys(engine):
    tensors, lengths = inputs((2, 3, 6, 4, 4)), torch.tensor([6, 2])
    out = additive_attention(*tensors, key_lengths=lengths)
    grad_out = torch.ones_like(out)
    grad_out[1, 1] = torch.inf
    _, grad_key, grad_value, _ = torch.autograd.grad(out, tensors, grad_out)
    for gradient in (grad_key, grad_value):
        assert (gradient[1, 2:] == 0).all() and gradient[0].isfinite().all()
        assert not gradient[1, :2].isfinite().all()


MEASURE_PEAK = r"""
import re, sys, torch
from pathlib import Path
from fastattn.additive import additive_attention
from fastattn.backends import additive_cpu

if sys.argv[1] == "tiles":
    additive_cpu.reasons = lambda q, k, v: ["not in this test"]

def step(length):
    tensors = [torch.randn(1, length, 8, requires_grad=True) for _ in range(3)] + [torch.randn(8, requires_grad=True)]
    additive_attention(*tensors).sum().backward()

def memory(field):
    return int(re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

step(64)
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
step(2048)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize("engine", ["tiles", "cpu"])
def test_peak_memory_of_forward_and_backward(engine):
    """The tanh of every (query, key, feature) are 128 MiB here, and the scores alone 16."""
    command = [sys.executable, "-c", MEASURE_PEAK, engine]
    measured = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(measured.stdout) < 16


def test_projections_beyond_the_engines_range_are_computed_all_the_same():
    """Where exp(2 q) would overflow, or tell nothing of q + k, the tiles answer."""
    query, key, value, weight = (x.detach() for x in inputs((1, 4, 6, 3, 2), torch.float32))
    query, key = query * 30 + 100, key * 30 - 100
    assert additive_cpu.reasons(query, key, value) or additive_cpu.Call(query, key, value, weight, None).overflows
    expected = naive(*(x.double() for x in (query, key, value, weight)))[0]
    out = additive_attention(query, key, value, weight)
    torch.testing.assert_close(out.double(), expected, atol=2e-7, rtol=2e-7)  # float32's rounding of the result
    assert additive_attention(query.fill_(float("nan")), key, value, weight).isnan().all()


@pytest.mark.skipif(engines()[-1].startswith("tiles"), reason="needs the C++ engine")
def test_the_engine_is_deterministic_over_thread_counts():
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        tensors = inputs((2, 100, 700, 24, 9), torch.float32)
        out = additive_attention(*tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_weights_are_the_softmax():
    size = (3, 9, 14, 6, 2)
    query, key, value, weight = inputs(size)
    lengths, mask = lengths_of(size)
    other = torch.rand(3, 14, generator=torch.Generator().manual_seed(2)) < 0.7
    expected = naive(query, key, value, weight, mask & other)[1]
    torch.testing.assert_close(additive_weights(query, key, weight, lengths, other), expected)


def test_weights_of_no_and_of_one_key():
    query, key, _, weight = inputs((2, 3, 1, 4, 1), torch.float32)
    assert torch.equal(additive_weights(query, key, weight), torch.ones(2, 3, 1))
    assert torch.equal(additive_weights(query, key, weight, torch.tensor([1, 0]))[1], torch.zeros(3, 1))
    assert additive_weights(query, key[:, :0], weight).shape == (2, 3, 0)


def test_module_projects_and_masks():
    torch.manual_seed(0)
    module = AdditiveAttention(query_dim=6, key_dim=4, hidden_dim=10)
    query, key = torch.randn(2, 3, 6), torch.randn(2, 5, 4)
    padding = torch.tensor([[False] * 5, [False, False, True, True, False]])
    out, weights = module(query, key, key_padding_mask=padding, need_weights=True)
    expected = naive(module.query_proj(query), module.key_proj(key), key, module.weight, ~padding)
    torch.testing.assert_close((out, weights), expected)
    assert module(query, key)[1] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(2, 3)}, ValueError, r"query must have 3 dimensions, .* got shape \[2, 3\]"),
        (
            {"key": torch.randn(2, 5, 3)},
            ValueError,
            r"key must be \[B, Lk, D\], \[2, 5, 4\] here, .* got shape \[2, 5, 3\]",
        ),
        ({"value": torch.randn(2, 6, 2)}, ValueError, r"value must be .* \[2, 5, 2\] here, .* got shape \[2, 6, 2\]"),
        ({"weight": torch.randn(5)}, ValueError, r"weight must be \[D\], \[4\] here, .* got shape \[5\]"),
        ({"value": torch.ones(2, 5, 2, dtype=torch.long)}, TypeError, "value must be float32, .* got torch.int64"),
        ({"value": torch.ones(2, 5, 2, dtype=torch.complex64)}, TypeError, "value must be float32, .* got torch.comp"),
        ({"value": torch.ones(2, 5, 2).to(torch.float8_e5m2)}, TypeError, "value must be float32, .* got torch.float8"),
        ({"value": torch.randn(2, 5, 2).double()}, TypeError, "value must be float32, .*float16, because .*float64"),
        ({"weight": torch.randn(4).double()}, TypeError, "weight must be float32, .* got torch.float64"),
        ({"query": torch.randn(2, 3, 4).double()}, TypeError, "key must be float64, because query is torch.float64"),
        ({"key_lengths": torch.tensor([1.0, 2.0])}, ValueError, r"key_lengths must be int \[B\] = \[2\]"),
        (
            {"key_mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"key_mask must be bool .* \[2, 5\], .* \[2, 4\]",
        ),
        ({"query": [[0.0]]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"key_lengths": [5, 5]}, TypeError, "key_lengths must be a torch.Tensor, got list"),
        ({"key_lengths": torch.tensor([True, True])}, ValueError, r"key_lengths must be int .* got torch.bool"),
        ({"key_mask": torch.ones(2, 5, device="meta")}, ValueError, "key_mask must be on query's device cpu, got meta"),
        ({"value": torch.randn(2, 5, 2).to_sparse()}, TypeError, "value must be dense, .* got torch.sparse_coo"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "query": torch.randn(2, 3, 4),
        "key": torch.randn(2, 5, 4),
        "value": torch.randn(2, 5, 2),
        "weight": torch.randn(4),
    }
    with pytest.raises(error, match=message):
        additive_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: AdditiveAttention(0), ValueError, "query_dim must be at least 1, got 0"),
        (lambda m, x: AdditiveAttention(4, 0), ValueError, "key_dim must be at least 1, got 0"),
        (lambda m, x: AdditiveAttention(4, hidden_dim=2.0), TypeError, "hidden_dim must be an int, got 2.0"),
        (lambda m, x: m(x[..., :3], x), ValueError, r"query must be \[batch, length, 4\], got shape \[2, 5, 3\]"),
        (lambda m, x: m(x, x[0]), ValueError, r"key must be \[batch, length, 4\], got shape \[5, 4\]"),
        (lambda m, x: m(x, x.tolist()), TypeError, "key must be a torch.Tensor, got list"),
        (
            lambda m, x: m(x, x, key_padding_mask=x[..., 0]),
            TypeError,
            "key_padding_mask must be a bool tensor .*float32",
        ),
        (
            lambda m, x: m(x, x, key_padding_mask=x[:1, :, 0] > 0),
            ValueError,
            r"key_padding_mask must be .* \[2, 5\], got",
        ),
        (lambda m, x: AttentionPooling(-1), ValueError, "embed_dim must be at least 1, got -1"),
        (lambda m, x: AttentionPooling(4)(x[0]), ValueError, r"x must be \[batch, length, 4\], got shape \[5, 4\]"),
        (lambda m, x: AttentionPooling(4)(x, [1, 2]), TypeError, "lengths must be a torch.Tensor, got list"),
        (lambda m, x: AttentionPooling(4).weights(x, torch.ones(2)), ValueError, r"lengths must be int \[B\] = \[2\]"),
    ],
)
def test_errors_of_the_modules_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(AdditiveAttention(4), torch.randn(2, 5, 4))


@pytest.mark.parametrize("score", ["dot", "additive"])
@pytest.mark.parametrize("attention", ["fastattn", "torch", "naive"])
def test_pooling_ignores_padding_and_says_what_it_weighed(score, attention):
    torch.manual_seed(0)
    pooling = AttentionPooling(8, score, attention)
    x = torch.randn(3, 7, 8)
    lengths = torch.tensor([7, 4, 1])
    pooled, weights = pooling(x, lengths), pooling.weights(x, lengths)
    torch.testing.assert_close(pooled, (weights[:, :, None] * x).sum(1))
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert (weights[1, 4:] == 0).all() and weights[2, 0] == 1
    torch.testing.assert_close(pooled[1], pooling(x[1:2, :4])[0])


def test_pooling_errors():
    with pytest.raises(ValueError, match="'cosine'"):
        AttentionPooling(8, "cosine")
