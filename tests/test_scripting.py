"""torch.jit.script and torch.jit.trace of the attention modules and of converted models."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import fastattn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def saved_and_loaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def assert_same(scripted, module, *arguments, **options):
    torch.testing.assert_close(scripted(*arguments, **options), module(*arguments, **options))


MODULES = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "other sizes": {"kdim": 3, "vdim": 5},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_a_scripted_module_gives_the_same(options):
    torch.manual_seed(0)
    module = fastattn.MultiHeadAttention(8, 2, **options)
    scripted = saved_and_loaded(torch.jit.script(module))
    query, key, value = torch.randn(3, 2, 8), torch.randn(4, 2, module.kdim), torch.randn(4, 2, module.vdim)
    causal = torch.ones(3, 4, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, True, True], [False] * 4])
    calls = [
        {},
        {"is_causal": True, "average_attn_weights": False},
        {"key_padding_mask": padding},
        {"key_padding_mask": torch.ones_like(padding), "need_weights": False},
        {"key_padding_mask": torch.zeros(2, 4).masked_fill(padding, -torch.inf), "attn_mask": torch.randn(4, 3, 4)},
        {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
        {"attn_mask": torch.randn(3, 4), "key_padding_mask": padding},
    ]
    batched = (query, key, value)
    if module.batch_first:
        batched = tuple(tensor.transpose(0, 1) for tensor in batched)
    for call in calls:
        results = []
        for each in (scripted, module):
            torch.manual_seed(1)
            results.append(each(*batched, **call))
        torch.testing.assert_close(*results)
    if not module.dropout:
        assert_same(scripted, module, query[:, 0], key[:, 0], value[:, 0], key_padding_mask=padding[0])
        scripted.eval()
    assert_same(scripted.eval(), module.eval(), *batched)


def test_a_scripted_self_attention_gives_the_same():
    module = fastattn.SelfAttention(8, 2)
    x = torch.randn(2, 4, 8)
    scripted = torch.jit.script(module)
    assert_same(scripted, module, x, is_causal=True)
    assert_same(scripted, module, x, key_padding_mask=torch.tensor([[False, True, False, True]] * 2))


def transformer():
    return nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)


@pytest.mark.parametrize("make, inputs", [(transformer, 2), (encoder, 1)])
def test_a_scripted_model_gives_the_same_and_leaves_the_model_as_it_was(make, inputs):
    torch.manual_seed(0)
    model = make()
    fastattn.convert(model)
    attention = [module for module in model.modules() if isinstance(module, fastattn.MultiHeadAttention)]
    scripted = torch.jit.script(model)
    loaded = saved_and_loaded(scripted)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    arguments = [torch.randn(2, 3, 8) for _ in range(inputs)]
    for training in (True, False):
        for each in (model, scripted, loaded):
            each.train(training)
        assert_same(scripted, model, *arguments, src_key_padding_mask=padding)
        assert_same(loaded, model, *arguments, src_key_padding_mask=padding)
    gradients = [
        torch.autograd.grad(each(*arguments).square().sum(), list(each.parameters())) for each in (scripted, model)
    ]
    torch.testing.assert_close(*gradients)
    assert attention == [module for module in model.modules() if isinstance(module, fastattn.MultiHeadAttention)]


def test_a_scripted_encoder_gives_a_sequence_of_padding_finite_results():
    """torch's fused path through an encoder layer, which scripts ask for by flags alone, gives NaN."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    fastattn.convert(layer)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[True] * 3, [False] * 3])
    with torch.no_grad():
        assert_same(torch.jit.script(layer), layer, x, src_key_padding_mask=padding)


def test_a_scripted_wrong_call_raises():
    scripted = torch.jit.script(fastattn.SelfAttention(8, 2))
    with pytest.raises(RuntimeError):
        scripted(torch.randn(2, 4, 8), attn_mask=torch.ones(4, 5, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_gives_the_same():
    torch.manual_seed(0)
    model = encoder()
    fastattn.convert(model)
    x = torch.randn(2, 4, 8)
    traced = saved_and_loaded(torch.jit.trace(model, (x,)))
    other = torch.randn(2, 4, 8)
    assert_same(traced, model, other)
    gradients = [torch.autograd.grad(each(other).square().sum(), list(each.parameters())) for each in (traced, model)]
    torch.testing.assert_close(*gradients)
