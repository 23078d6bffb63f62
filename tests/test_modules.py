"""MultiHeadAttention and SelfAttention against nn.MultiheadAttention, and where they are better."""

from __future__ import annotations

import copy
import io
import pickle

import numpy
import pytest
import torch
from torch import nn

import fastattn
from fastattn import MultiHeadAttention, SelfAttention
from fastattn.additive import AdditiveAttention, additive_attention
from fastattn.models.attention import Attention

CONSTRUCTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "kdim_vdim": {"kdim": 12, "vdim": 20, "batch_first": True},
    "extra_keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
}

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

N, L, S, E, H = 3, 7, 9, 16, 4


def pair(name="batch_first", **options):
    """(nn.MultiheadAttention, MultiHeadAttention) with the same random parameters, in float64."""
    theirs = nn.MultiheadAttention(E, H, **CONSTRUCTIONS[name], **options, dtype=torch.float64)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiHeadAttention(E, H, **CONSTRUCTIONS[name], **options, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def sequences(module, length=L, keys=S, batch=N):
    """query, key and value with gradients, laid out as the module wants them."""
    sizes = ((length, module.embed_dim), (keys, module.kdim), (keys, module.vdim))
    shapes = ((batch, *size) if module.batch_first else (size[0], batch, size[1]) for size in sizes)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def masks():
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[0, 6:], padding[1, 2] = True, True
    square = torch.rand(L, S) < 0.3
    square[:, 0] = False
    per_head = torch.rand(N * H, L, S) < 0.3
    per_head[..., 0] = False
    ragged = torch.zeros(N, S, dtype=torch.bool)
    ragged[0, 4:], ragged[2, 8:] = True, True

    def as_float(mask):
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf)

    noise = torch.randn(L, S, dtype=torch.float64)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "ragged": {"key_padding_mask": ragged},
        "float_padding": {"key_padding_mask": as_float(ragged)},
        "soft_padding": {"key_padding_mask": torch.randn(N, S, dtype=torch.float64)},
        "square": {"attn_mask": square},
        "per_head": {"attn_mask": per_head},
        "square_and_padding": {"attn_mask": square, "key_padding_mask": padding},
        "square_and_ragged": {"attn_mask": square, "key_padding_mask": ragged},
        "bias": {"attn_mask": noise},
        "bias_and_padding": {"attn_mask": noise, "key_padding_mask": as_float(padding)},
        "bias_and_soft_padding": {
            "attn_mask": torch.randn(N * H, L, S, dtype=torch.float64),
            "key_padding_mask": torch.randn(N, S, dtype=torch.float64),
        },
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_outputs_weights_and_gradients_are_torchs(name, mask, training):
    theirs, ours = (module.train(training) for module in pair(name))
    inputs = sequences(theirs)
    options = masks()[mask]
    for average in (True, False):
        expected = theirs(*inputs, **options, average_attn_weights=average)
        actual = ours(*inputs, **options, average_attn_weights=average)
        for left, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(left, right)
    without, nothing = ours(*inputs, **options, need_weights=False)
    assert nothing is None
    assert torch.equal(without, actual[0])
    grad = torch.randn_like(without)
    leaves = [*inputs, *ours.parameters()]
    gradients = torch.autograd.grad(without, leaves, grad)
    truth = torch.autograd.grad(expected[0], [*inputs, *theirs.parameters()], grad)
    for left, right in zip(gradients, truth, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", ["plain", "batch_first"])
def test_self_and_pair_projections(name):
    theirs, ours = pair(name)
    query, key, _ = sequences(theirs, keys=L)
    for inputs in ((query, query, query), (query, key, key), (key, query, key)):
        expected, expected_weights = theirs(*inputs)
        actual, weights = ours(*inputs)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(weights, expected_weights)
        leaves = [query, *ours.parameters()]
        truth = torch.autograd.grad(expected.sin().sum(), [query, *theirs.parameters()])
        for left, right in zip(torch.autograd.grad(actual.sin().sum(), leaves), truth, strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_unbatched(name):
    theirs, ours = pair(name)
    inputs = [tensor.select(0 if theirs.batch_first else 1, 0) for tensor in sequences(theirs)]
    padding = torch.zeros(S, dtype=torch.bool)
    padding[5:] = True
    for options in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.randn(H, L, S, dtype=torch.float64)}):
        for left, right in zip(ours(*inputs, **options), theirs(*inputs, **options), strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("name", ["plain", "batch_first", "extra_keys"])
def test_is_causal_with_and_without_a_mask(name):
    theirs, ours = pair(name)
    query, _, _ = sequences(theirs)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    expected, expected_weights = theirs(query, query, query, attn_mask=causal)
    for options in ({"is_causal": True}, {"is_causal": True, "attn_mask": causal}, {"attn_mask": causal}):
        actual, weights = ours(query, query, query, **options)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(weights, expected_weights)
    other = torch.rand(L, L) < 0.3
    other.fill_diagonal_(False)
    expected, _ = theirs(query, query, query, attn_mask=causal | other)
    torch.testing.assert_close(ours(query, query, query, attn_mask=other, is_causal=True)[0], expected)


def test_a_four_dimensional_mask():
    theirs, ours = pair()
    inputs = sequences(theirs)
    for shape in ((N, 1, L, S), (1, H, 1, S), (N, H, L, S), (1, 1, L, S)):
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        dense = mask.expand(N, H, L, S).reshape(N * H, L, S)
        expected, actual = theirs(*inputs, attn_mask=dense)[0], ours(*inputs, attn_mask=mask)[0]
        torch.testing.assert_close(actual, expected)
        (left,) = torch.autograd.grad(actual.sin().sum(), mask)
        (right,) = torch.autograd.grad(expected.sin().sum(), mask)
        torch.testing.assert_close(left, right)


def test_true_means_attend_to_the_function_and_masked_out_to_the_module():
    """Each as in torch's counterpart; the same attention takes the one mask inverted."""
    theirs, ours = pair(bias=False)
    x = torch.randn(N, L, E, dtype=torch.float64)
    attend = torch.ones(L, L, dtype=torch.bool).tril()
    query, key, value = (
        projected.unflatten(-1, (H, E // H)).transpose(1, 2)
        for projected in torch.nn.functional.linear(x, ours.in_proj_weight).chunk(3, -1)
    )
    heads = fastattn.scaled_dot_product_attention(query, key, value, attn_mask=attend)
    torch.testing.assert_close(heads, torch.nn.functional.scaled_dot_product_attention(query, key, value, attend))
    expected = ours.out_proj(heads.transpose(1, 2).flatten(2))

    torch.testing.assert_close(theirs(x, x, x, attn_mask=~attend)[0], expected)
    torch.testing.assert_close(ours(x, x, x, attn_mask=~attend)[0], expected)
    itself = SelfAttention(E, H, bias=False, dtype=torch.float64)
    itself.load_state_dict(ours.state_dict())
    torch.testing.assert_close(itself(x, attn_mask=~attend), expected)
    of_models = Attention(E, H).double()
    of_models.load_state_dict(ours.state_dict(), strict=False)  # its biases are 0
    torch.testing.assert_close(of_models(x, mask=attend), expected)


def test_true_means_padding_in_every_key_padding_mask():
    theirs, ours = pair(bias=False)
    x = torch.randn(N, L, E, dtype=torch.float64)
    padding = torch.arange(L) >= torch.tensor([[7], [3], [5]])
    expected = theirs(x, x, x, key_padding_mask=padding)[0]
    torch.testing.assert_close(ours(x, x, x, key_padding_mask=padding)[0], expected)
    itself = SelfAttention(E, H, bias=False, dtype=torch.float64)
    itself.load_state_dict(ours.state_dict())
    torch.testing.assert_close(itself(x, key_padding_mask=padding), expected)
    of_models = Attention(E, H).double()
    of_models.load_state_dict(ours.state_dict(), strict=False)
    torch.testing.assert_close(of_models(x, key_padding_mask=padding), expected)

    additive = AdditiveAttention(E).double()
    query, key = additive.query_proj(x), additive.key_proj(x)
    scores = torch.tanh(query[:, :, None] + key[:, None]) @ additive.weight
    by_hand = scores.masked_fill(padding[:, None], -torch.inf).softmax(-1) @ x
    torch.testing.assert_close(additive(x, x, key_padding_mask=padding)[0], by_hand)
    torch.testing.assert_close(additive_attention(query, key, x, additive.weight, key_mask=~padding), by_hand)


@pytest.mark.parametrize("keys", [0, S])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_masks_of_one_column_or_none_beside_extra_keys(dtype, keys):
    theirs, ours = pair("extra_keys")
    query, key, value = sequences(ours, keys=keys)
    mask = torch.rand(N, H, L, 1) < 0.5 if dtype == torch.bool else torch.randn(N, H, L, 1, dtype=dtype)
    dense = mask.expand(N, H, L, keys)
    expected = theirs(query, key, value, attn_mask=dense.reshape(N * H, L, keys))[0]
    for each in (mask, dense):
        torch.testing.assert_close(ours(query, key, value, attn_mask=each)[0], expected)
    padding = torch.zeros(N, keys, dtype=torch.bool)
    expected = theirs(query, key, value, key_padding_mask=padding)[0]
    torch.testing.assert_close(ours(query, key, value, key_padding_mask=padding)[0], expected)


@pytest.mark.parametrize("average", [True, False])
def test_gradients_through_the_weights(average):
    theirs, ours = pair()
    inputs = sequences(theirs)
    mask = torch.randn(L, S, dtype=torch.float64, requires_grad=True)
    padding = masks()["ragged"]["key_padding_mask"]

    def gradients(module):
        out, weights = module(*inputs, attn_mask=mask, key_padding_mask=padding, average_attn_weights=average)
        loss = out.sin().sum() + weights.square().sum()
        return torch.autograd.grad(loss, [*inputs, mask, *module.parameters()])

    float_padding = torch.zeros(N, S, dtype=torch.float64).masked_fill(padding, -torch.inf)
    ours_gradients = gradients(ours)
    padding = float_padding
    for left, right in zip(ours_gradients, gradients(theirs), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_sample_that_is_all_padding(training, form):
    _, ours = pair()
    ours.train(training)
    inputs = sequences(ours)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    mask = padding if form == "bool" else torch.zeros(N, S, dtype=torch.float64).masked_fill(padding, -torch.inf)
    out, weights = ours(*inputs, key_padding_mask=mask)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E))
    assert weights[1].abs().max() == 0
    loss = out.square().sum() + weights.square().sum()
    gradients = torch.autograd.grad(loss, [*inputs, *ours.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient[1].abs().max() == 0 for gradient in gradients[:3])


def test_dropout_drops_in_training_only_and_the_weights_show_it():
    module = MultiHeadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(N, L, E)
    out, weights = module(x, x, x, average_attn_weights=False)
    share = (weights == 0).double().mean().item()
    assert 0.35 < share < 0.65
    kept = weights != 0
    whole = copy.deepcopy(module).eval()(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(weights[kept], 2.0 * whole[kept])
    value = torch.nn.functional.linear(x, module.in_proj_weight[2 * E :], module.in_proj_bias[2 * E :])
    heads = weights @ value.unflatten(-1, (H, E // H)).transpose(1, 2)
    torch.testing.assert_close(out, module.out_proj(heads.transpose(1, 2).flatten(2)))
    assert (module.eval()(x, x, x)[1] > 0).all()


def test_no_copies_between_the_projections():
    """The engine sees views of the projection; the output projection sees the engine's buffer."""
    for batch_first in (True, False):
        module = MultiHeadAttention(E, H, batch_first=batch_first)
        seen = []
        module.out_proj.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        x = torch.randn(N, L, E)
        query, key, value = module._project(x, x, x, is_batched=True)
        assert query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
        assert query.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        module(x, x, x, need_weights=False)
        assert seen[0].is_contiguous()
        assert seen[0]._base is not None


def test_trailing_padding_becomes_key_lengths():
    from fastattn.masks import combine_masks

    query = torch.zeros(N, H, L, E // H)
    ragged, holes = masks()["ragged"]["key_padding_mask"], masks()["padding"]["key_padding_mask"]
    for padding in (ragged, torch.zeros(N, S).masked_fill(ragged, -torch.inf)):
        combined = combine_masks(query, S, None, padding, is_causal=False)
        assert combined.key_lengths.tolist() == [4, S, 8]
        assert combined.attn_mask is None
        assert combined.bias is None
    combined = combine_masks(query, S, None, holes, is_causal=True)
    assert combined.key_lengths.tolist() == [6, S, S]
    assert torch.equal(combined.attn_mask, ~holes[:, None, None, :])
    assert combined.causal == "upper_left"


def test_state_dicts_go_both_ways():
    for name in CONSTRUCTIONS:
        theirs, ours = pair(name)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_parameters_start_as_torchs(name):
    modules = []
    for constructor in (nn.MultiheadAttention, MultiHeadAttention):
        torch.manual_seed(1)
        module = constructor(E, H, **CONSTRUCTIONS[name])
        initial = [parameter.detach().clone() for parameter in module.parameters()]
        module._reset_parameters()
        modules.append([*initial, *module.parameters()])
    for left, right in zip(*modules, strict=True):
        assert torch.equal(left, right)


def test_copies_pickles_and_checkpoints():
    module = MultiHeadAttention(E, H, kdim=12, vdim=20, add_bias_kv=True, batch_first=True, dtype=torch.float64)
    inputs = sequences(module)
    expected = module(*inputs)[0]
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(*inputs)[0], expected)
        assert other.in_proj_weight is None


def test_self_attention():
    module = SelfAttention(E, H)
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 4:] = True
    wide = MultiHeadAttention(E, H, batch_first=True)
    wide.load_state_dict(module.state_dict())
    for options in ({}, {"key_padding_mask": padding}, {"is_causal": True}, {"attn_mask": torch.randn(L, L)}):
        assert torch.equal(module(x, **options), wide(x, x, x, **options)[0])
    torch.testing.assert_close(module(x)[0], module(x[:1])[0])
    assert module(x[0]).shape == (L, E)


def test_autocast_and_low_precision():
    theirs, ours = pair()
    inputs = [tensor.detach().float() for tensor in sequences(theirs)]
    theirs, ours = theirs.float(), ours.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, weights = ours(*inputs)
        expected, expected_weights = theirs(*inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(weights.float(), expected_weights.float(), rtol=0.05, atol=0.02)
    low = [tensor.bfloat16() for tensor in inputs]
    torch.testing.assert_close(ours.bfloat16()(*low)[0], theirs.bfloat16()(*low)[0], rtol=0.05, atol=0.05)


def test_compiled_module():
    torch._dynamo.reset()
    module = MultiHeadAttention(E, H, batch_first=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(N, L, E)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1, 4:] = True
    for options in ({"is_causal": True}, {"key_padding_mask": padding, "attn_mask": torch.randn(L, L)}):
        for left, right in zip(compiled(x, x, x, **options), module(x, x, x, **options), strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["batch_first", "no_bias", "extra_keys"])
def test_nested_tensors_are_sequences_by_themselves(name, is_causal):
    ours = pair(name)[1] if name != "extra_keys" else MultiHeadAttention(E, H, **CONSTRUCTIONS[name]).double()
    inputs = [torch.randn(length, E, dtype=torch.float64, requires_grad=True) for length in (5, 0, 7, 5)]
    leaves = [*inputs, *ours.parameters()]
    expected = [ours(x, x, x, is_causal=is_causal, average_attn_weights=False) for x in inputs]
    cotangents = [torch.randn_like(x) for x in inputs]
    truth = torch.autograd.grad([out for out, _ in expected], leaves, cotangents)
    for options in ({"need_weights": False}, {"average_attn_weights": False}, {}):
        nested = torch.nested.as_nested_tensor(inputs)
        out, weights = ours(nested, nested, nested, is_causal=is_causal, **options)
        torch.testing.assert_close(list(out.unbind()), [out for out, _ in expected])
        gradients = torch.autograd.grad(out.unbind(), leaves, cotangents, retain_graph=True)
        for left, right in zip(gradients, truth, strict=True):
            torch.testing.assert_close(left, right)
        if options.get("need_weights", True):
            extra = 2 if name == "extra_keys" else 0
            dense = torch.zeros(4, H, 7, 7 + extra, dtype=torch.float64)
            for i, (_, each) in enumerate(expected):
                length = each.shape[1]
                dense[i, :, :length, :length] = each.detach()[..., :length]
                dense[i, :, :length, 7:] = each.detach()[..., length:]
            torch.testing.assert_close(weights, dense if "average_attn_weights" in options else dense.mean(1))


def test_nested_tensors_drop_in_training():
    module = MultiHeadAttention(E, H, dropout=0.5, batch_first=True)
    nested = torch.nested.as_nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    outs = [module(nested, nested, nested, need_weights=False)[0].to_padded_tensor(0.0) for _ in range(2)]
    assert not torch.equal(*outs)
    module.eval()
    outs = [module(nested, nested, nested, need_weights=False)[0].to_padded_tensor(0.0) for _ in range(2)]
    assert torch.equal(*outs)


def test_nested_tensors_that_cannot_be_taken_are_refused_by_name():
    module = MultiHeadAttention(E, H, batch_first=True)
    sequences = [torch.randn(3, E), torch.randn(5, E)]
    nested, other = torch.nested.as_nested_tensor(sequences), torch.nested.as_nested_tensor(sequences)
    dense = torch.randn(2, 5, E)
    with pytest.raises(TypeError, match="key and value must be query itself"):
        module(nested, other, other)
    with pytest.raises(TypeError, match="key must be dense"):
        module(dense, nested, nested)
    jagged = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    with pytest.raises(TypeError, match="layout torch.strided, got torch.jagged"):
        module(jagged, jagged, jagged)
    with pytest.raises(ValueError, match="key_padding_mask must be None"):
        module(nested, nested, nested, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="attn_mask must be None"):
        module(nested, nested, nested, attn_mask=torch.zeros(5, 5))
    with pytest.raises(ValueError, match="batch_first"):
        MultiHeadAttention(E, H)(nested, nested, nested)
    wide = torch.nested.as_nested_tensor([torch.randn(3, E + 1)])
    with pytest.raises(ValueError, match=r"sequences \[length, 16\], got those of \[\[3, 17\]\]"):
        module(wide, wide, wide)
    nothing = torch.nested.nested_tensor([])
    with pytest.raises(ValueError, match=r"sequences \[length, 16\]"):
        module(nothing, nothing, nothing)


@pytest.mark.parametrize("name", ["kdim", "vdim"])
def test_sizes_of_features_that_are_none_are_refused_by_name(name):
    for size in (-1, 0, numpy.int64(0)):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            MultiHeadAttention(E, H, **{name: size})
    for size in (4.0, "4", True):
        with pytest.raises(TypeError, match=f"{name} must be an int or None"):
            MultiHeadAttention(E, H, **{name: size})
    module = MultiHeadAttention(numpy.int64(E), numpy.int32(H), **{name: numpy.int64(12)})
    assert module(*[tensor.float() for tensor in sequences(module)])[0].shape == (L, N, E)


def test_an_explicit_backend_is_kept():
    module = MultiHeadAttention(E, H, batch_first=True, backend="reference")
    x = torch.randn(N, L, E)
    auto = MultiHeadAttention(E, H, batch_first=True)
    auto.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x, x, x)[0], auto(x, x, x)[0])
    assert fastattn.MultiHeadAttention(E, H, backend="triton").backend == "triton"
