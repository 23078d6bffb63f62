"""scaled_dot_product_attention: torch's calls unchanged, the added keywords, layouts, limits."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
import torch.nn.functional as F

from fastattn import reference, scaled_dot_product_attention
from fastattn.ops import attention_forward
from fastattn.problem import check_arguments, make_problem
from fastattn.testing import CASES, assert_within_budget, run_reference


def tensors(*shapes, dtype=torch.float32, requires_grad=False):
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_through_autograd(case, dtype, monkeypatch):
    problem = case.make(dtype=dtype)
    monkeypatch.setattr("fastattn.functional.draw_rng_state", lambda device: problem.rng_state)
    inputs = [tensor.detach().requires_grad_() for tensor in (problem.query, problem.key, problem.value)]
    mask, bias = unexpanded(problem.attn_mask), unexpanded(problem.bias)
    if bias is not None:
        inputs.append(bias.requires_grad_())
    options = {
        "dropout_p": problem.dropout_p,
        "scale": problem.scale,
        "causal": problem.causal,
        "window": (problem.window_left, problem.window_right),
        "key_lengths": problem.key_lengths,
    }
    if mask is None or bias is None:
        attn_mask = mask if bias is None else bias
        out, lse = scaled_dot_product_attention(*inputs[:3], attn_mask, enable_gqa=True, return_lse=True, **options)
    else:  # only MultiHeadAttention gives both to the operator
        arguments = check_arguments(*inputs[:3], mask, is_causal=False, enable_gqa=True, **options)
        out, lse = attention_forward(*arguments._replace(bias=bias), problem.rng_state, "auto")
    grad_out, grad_lse = case.make_grad_out(dtype=dtype), case.make_grad_lse(dtype=lse.dtype)
    gradients = torch.autograd.grad((out, lse), inputs, (grad_out, grad_lse))
    names = ("grad_query", "grad_key", "grad_value", "grad_bias")
    actual = {"out": out.detach(), "lse": lse.detach()} | dict(zip(names, gradients, strict=False))
    exact = run_reference(problem, grad_out, grad_lse)
    naive = run_reference(problem, grad_out, grad_lse, dtype=None)
    assert out.dtype == dtype
    assert_within_budget(actual, problem, exact, naive, grad_out)


def unexpanded(mask):
    """The mask as a caller would give it, with size 1 where it broadcasts."""
    if mask is None:
        return None
    for dim, (size, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if stride == 0:
            mask = mask.narrow(dim, 0, min(1, size))
    return mask.clone()


@pytest.mark.parametrize(
    "shapes",
    [
        ((17, 8), (29, 8), (29, 5)),
        ((4, 17, 8), (4, 29, 8), (4, 29, 5)),
        ((2, 3, 17, 8), (2, 3, 29, 8), (2, 3, 29, 5)),
        ((2, 4, 3, 17, 8), (2, 4, 3, 29, 8), (2, 4, 3, 29, 5)),
        ((2, 1, 4, 3, 7, 8), (2, 1, 4, 3, 9, 8), (2, 1, 4, 3, 9, 5)),
        ((1, 3, 17, 8), (4, 3, 29, 8), (4, 3, 29, 5)),
        ((4, 3, 17, 8), (1, 3, 29, 8), (1, 1, 29, 5)),
        ((2, 1, 3, 17, 8), (1, 4, 3, 29, 8), (4, 3, 29, 5)),
        ((4, 3, 17, 8), (3, 29, 8), (29, 5)),
    ],
    ids=str,
)
def test_ranks_and_broadcast_batches_are_torchs(shapes):
    query, key, value = tensors(*shapes, dtype=torch.float64, requires_grad=True)
    actual = scaled_dot_product_attention(query, key, value)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (query, key, value), grad),
        torch.autograd.grad(expected, (query, key, value), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    _, lse = scaled_dot_product_attention(query, key, value, return_lse=True)
    assert lse.shape == expected.shape[:-1]


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_masks_of_every_broadcastable_shape(rank):
    leading = {3: (4,), 4: (2, 3), 5: (2, 4, 3)}[rank]
    query, key, value = tensors((*leading, 7, 8), (*leading, 9, 8), (*leading, 9, 8), dtype=torch.float64)
    full = (*leading, 7, 9)
    shapes = {full, full[-2:], full[-1:], (), (7, 1), (1,) * (rank - 2) + (7, 9), (*leading, 1, 9)}
    if rank == 5:
        shapes |= {(2, 1, 1, 7, 9), (1, 4, 1, 1, 9), (4, 1, 7, 9), (3, 7, 1)}
    for shape in shapes:
        for mask in (torch.rand(shape) < 0.7, torch.randn(shape, dtype=torch.float64, requires_grad=True)):
            actual = scaled_dot_product_attention(query, key, value, mask)
            dense = mask.expand(full)
            torch.testing.assert_close(actual, F.scaled_dot_product_attention(query, key, value, dense))
            if mask.dtype != torch.bool:
                grad = torch.randn_like(actual)
                expected = F.scaled_dot_product_attention(query, key, value, dense)
                (theirs,) = torch.autograd.grad(expected, mask, grad)
                (ours,) = torch.autograd.grad(actual, mask, grad)
                torch.testing.assert_close(ours, theirs)


def test_a_bias_that_the_caller_expanded_has_the_gradient_of_each_element():
    query, key, value = tensors((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 8), dtype=torch.float64)
    bias = torch.randn(5, 6, dtype=torch.float64).expand(2, 3, 5, 6).requires_grad_()
    dense = bias.detach().contiguous().requires_grad_()
    grad = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    (ours,) = torch.autograd.grad(scaled_dot_product_attention(query, key, value, bias), bias, grad)
    (theirs,) = torch.autograd.grad(F.scaled_dot_product_attention(query, key, value, dense), dense, grad)
    torch.testing.assert_close(ours, theirs)


def test_a_float32_bias_for_low_precision_inputs():
    query, key, value = tensors((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), dtype=torch.bfloat16)
    bias = torch.randn(2, 9, 9, requires_grad=True)
    out = scaled_dot_product_attention(query, key, value, bias)
    (gradient,) = torch.autograd.grad(out.float().sum(), bias)
    assert out.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    problem = make_problem(query.double(), key.double(), value.double(), bias.detach().double())
    torch.testing.assert_close(out.double(), reference.attention(problem)[0], rtol=0.02, atol=0.02)


def test_attn_mask_and_is_causal_mean_both():
    query, key, value = tensors((2, 2, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    mask = torch.rand(9, 9) < 0.7
    actual = scaled_dot_product_attention(query, key, value, mask, is_causal=True)
    both = mask & torch.ones(9, 9).tril().bool()
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(query, key, value, both))


def test_keyword_and_positional_calls_are_torchs():
    query, key, value = tensors((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    for positional in ((), (None, 0.0, True), (None, 0.0, False, 0.2)):
        torch.testing.assert_close(
            scaled_dot_product_attention(query, key, value, *positional, enable_gqa=True),
            F.scaled_dot_product_attention(query, key, value, *positional, enable_gqa=True)
            if len(positional) < 4
            else F.scaled_dot_product_attention(query, key, value, scale=0.2, enable_gqa=True),
        )


def test_the_output_lies_as_the_query_does():
    query = torch.randn(2, 9, 3 * 24).view(2, 9, 3, 3, 8)[:, :, 0].transpose(1, 2)
    key, value = tensors((2, 3, 11, 8), (2, 3, 11, 5))
    batch_first = scaled_dot_product_attention(query, key, value)
    assert batch_first.transpose(1, 2).is_contiguous()
    length_first = scaled_dot_product_attention(torch.randn(9, 2, 3, 8).permute(1, 2, 0, 3), key, value)
    assert length_first.permute(2, 0, 1, 3).is_contiguous()
    assert scaled_dot_product_attention(query.contiguous(), key, value).is_contiguous()


def test_gradients_flow_only_where_they_are_needed():
    shapes = ((1, 2, 9, 8), (1, 2, 7, 8), (1, 2, 7, 8), (9, 7))
    for index in range(4):
        inputs = list(tensors(*shapes, dtype=torch.float64))
        inputs[index].requires_grad_()
        (ours,) = torch.autograd.grad(scaled_dot_product_attention(*inputs).sin().sum(), inputs[index])
        (theirs,) = torch.autograd.grad(F.scaled_dot_product_attention(*inputs).sin().sum(), inputs[index])
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_lse_alone_and_of_out_alone():
    query, key, value = tensors((1, 2, 9, 8), (1, 2, 7, 8), (1, 2, 7, 8), dtype=torch.float64, requires_grad=True)
    out, lse = scaled_dot_product_attention(query, key, value, return_lse=True)
    expected = (query @ key.mT / 8**0.5).logsumexp(-1)
    grad = torch.randn_like(lse)
    ours = torch.autograd.grad(lse, (query, key), grad)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (query, key), grad))


def test_an_expanded_incoming_gradient():
    query, key, value = tensors((1, 2, 9, 8), (1, 2, 7, 8), (1, 2, 7, 8), dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(scaled_dot_product_attention(query, key, value).sum(), (query, key, value))
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(query, key, value).sum(), (query, key, value))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)


def test_dropout_repeats_with_the_generator_and_only_then():
    query, key, value = tensors((1, 2, 33, 8), (1, 2, 33, 8), (1, 2, 33, 8))
    torch.manual_seed(3)
    first = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    second = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(3)
    again = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_dropout_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    query, key, value = tensors((1, 2, 33, 8), (1, 2, 33, 8), (1, 2, 33, 8), requires_grad=True)

    def attend(*inputs):
        return scaled_dot_product_attention(*inputs, dropout_p=0.5)

    torch.manual_seed(3)
    plain = torch.autograd.grad(attend(query, key, value).sum(), (query, key, value))
    torch.manual_seed(3)
    out = checkpoint(attend, query, key, value, use_reentrant=False)
    for left, right in zip(torch.autograd.grad(out.sum(), (query, key, value)), plain, strict=True):
        assert torch.equal(left, right)


def test_no_dropout_draws_nothing():
    query, key, value = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    before = torch.get_rng_state()
    scaled_dot_product_attention(query, key, value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mask", [None, torch.ones(5, 7, dtype=torch.bool)], ids=["plain", "masked"])
@pytest.mark.parametrize("kv_heads", [0, 2])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_no_query_heads(backend, queries, kv_heads, mask):
    query, key, value = tensors((2, 0, queries, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 6), requires_grad=True)
    mask = mask if mask is None else mask[:queries]
    out, lse = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True, backend=backend, return_lse=True)
    assert out.shape == (2, 0, queries, 6)
    assert lse.shape == (2, 0, queries)
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), (query, key, value)), (query, key, value), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("size", [1 << 30, sys.maxsize, 1 << 70])
@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
def test_a_window_wider_than_any_sequence_is_open(causal, size):
    query, key, value = tensors((1, 2, 20, 8), (1, 2, 30, 8), (1, 2, 30, 8))
    for side, window in (("left", (size, 3)), ("right", (3, size)), ("both", (size, size))):
        expected = tuple(None if width == size else width for width in window)
        out = scaled_dot_product_attention(query, key, value, causal=causal, window=window)
        assert torch.equal(out, scaled_dot_product_attention(query, key, value, causal=causal, window=expected)), side


def test_nan_in_padding_changes_nothing():
    query, key, value = tensors((2, 2, 9, 8), (2, 2, 20, 8), (2, 2, 20, 8))
    lengths = torch.tensor([13, 20])

    def run():
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
        out = scaled_dot_product_attention(*inputs, key_lengths=lengths)
        return out.detach(), *torch.autograd.grad(out.square().sum(), inputs)

    clean = run()
    for poison in (torch.nan, torch.inf, -torch.inf):
        key[0, :, 13:], value[0, :, 13:] = poison, poison
        for actual, expected in zip(run(), clean, strict=True):
            assert torch.equal(actual, expected)


def test_nan_in_the_data_is_not_hidden():
    query, key, value = tensors((1, 1, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8))
    value[0, 0, 2, 3] = torch.nan
    out = scaled_dot_product_attention(query, key, value)
    assert out[..., 3].isnan().all()
    assert out[..., :3].isfinite().all()
    query[0, 0, 1] = torch.nan
    out = scaled_dot_product_attention(query, key, torch.ones_like(value))
    assert out[0, 0, 1].isnan().all()
    assert out[0, 0, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_of_finfo_min_give_the_mean(dtype, backend):
    """The scores are lost in the rounding of the sum, and nothing is forbidden."""
    query, key, value = tensors((1, 1, 2, 8), (1, 1, 6, 8), (1, 1, 6, 8), dtype=dtype)
    bias = torch.full((2, 6), torch.finfo(dtype).min, dtype=dtype)
    bias[1] = -torch.inf
    out, lse = scaled_dot_product_attention(query, key, value, bias, backend=backend, return_lse=True)
    torch.testing.assert_close(out[0, 0, 0], value[0, 0].mean(0), rtol=0.02, atol=0.02)
    assert out[0, 0, 1].abs().max() == 0
    assert lse[0, 0].isfinite().tolist() == [True, False]


def test_rows_of_float16_finfo_min_keep_the_scores():
    """-65504 leaves the scores, which are float32, two decimals."""
    query, key, value = tensors((1, 1, 2, 8), (1, 1, 6, 8), (1, 1, 6, 8), dtype=torch.float16)
    bias = torch.full((2, 6), torch.finfo(torch.float16).min, dtype=torch.float16)
    out = scaled_dot_product_attention(query, key, value, bias)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a sparse anonymous mapping")
def test_views_past_two_to_the_31_elements_are_not_read_beyond_what_they_name():
    """A key whose rows lie 2^30 elements apart in a mapping that is never touched elsewhere."""
    rows, head_dim, distance = 4, 8, 2**30
    map_noreserve = 0x4000  # of Linux; the mmap module has no name for it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve
    memory = mmap.mmap(-1, 4 * ((rows - 1) * distance + head_dim), flags=flags)
    storage = torch.frombuffer(memory, dtype=torch.float32)
    key = storage.as_strided((1, 1, rows, head_dim), (0, 0, distance, 1))
    key.copy_(torch.randn(1, 1, rows, head_dim))
    query, value = tensors((1, 1, 3, head_dim), (1, 1, rows, head_dim))
    actual = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(query, key.contiguous(), value))


def test_a_batch_of_two_to_the_31_scores_is_described_without_memory():
    query = torch.zeros(1, 1, 1, 1).expand(2**20, 8, 2**16, 1)
    problem = make_problem(query, query, query, torch.ones((), dtype=torch.bool), key_lengths=None)
    assert problem.attn_mask.shape == (2**20, 8, 2**16, 2**16)
    assert problem.attn_mask.untyped_storage().nbytes() == 1


def test_results_repeat_bit_by_bit():
    query, key, value = tensors((2, 2, 130, 40), (2, 2, 257, 40), (2, 2, 257, 40), requires_grad=True)
    bias = torch.randn(130, 257, requires_grad=True)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(1)
            out = scaled_dot_product_attention(query, key, value, bias, dropout_p=0.1)
            return out, *torch.autograd.grad(out.square().sum(), (query, key, value, bias))
        finally:
            torch.set_num_threads(before)

    first = run(1)
    for threads in (1, 2, 3):
        for left, right in zip(run(threads), first, strict=True):
            assert torch.equal(left, right)


def test_inference_mode_and_parameters():
    query = torch.nn.Parameter(torch.randn(1, 2, 5, 8))
    with torch.inference_mode():
        out = scaled_dot_product_attention(query, query, query)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, query, query).detach())


def test_meta_tensors_have_shapes():
    query = torch.empty(2, 3, 9, 8, device="meta")
    out, lse = scaled_dot_product_attention(query, query, query, return_lse=True)
    assert out.shape == query.shape
    assert out.device.type == "meta"
    assert lse.shape == (2, 3, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_asking_for_lse_changes_nothing_else(backend, dtype):
    """A call that does not want it takes shorter paths, with and without gradients."""
    leaves = [torch.randn(2, 3, 9, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    grad = torch.randn(2, 3, 9, 8, dtype=dtype)
    alone = scaled_dot_product_attention(*leaves, backend=backend)
    beside, _ = scaled_dot_product_attention(*leaves, backend=backend, return_lse=True)
    assert torch.equal(alone, beside)
    for one, other in zip(
        torch.autograd.grad(alone, leaves, grad), torch.autograd.grad(beside, leaves, grad), strict=True
    ):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(scaled_dot_product_attention(*leaves, backend=backend), beside)


@pytest.mark.parametrize("negated", ["query", "key", "value", "attn_mask", "grad_out"])
def test_a_lazily_negated_tensor_counts_with_its_sign(negated):
    """A view of memory that holds the negative values, as x.conj().imag is."""
    shapes = {"query": (2, 3, 5, 8), "key": (2, 3, 7, 8), "value": (2, 3, 7, 8), "attn_mask": (2, 3, 5, 7)}
    values = {name: torch.randn(shape) for name, shape in (shapes | {"grad_out": (2, 3, 5, 8)}).items()}
    given = values | {negated: torch._neg_view(-values[negated])}
    results = []
    for tensors in (given, values):
        leaves = [tensors[name].detach().requires_grad_() for name in shapes]
        out, lse = scaled_dot_product_attention(*leaves, return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out, leaves, tensors["grad_out"])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
