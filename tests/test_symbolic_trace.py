"""torch.fx.symbolic_trace: modules and functions of the package are single nodes."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import fastattn
from fastattn.additive import AdditiveAttention, additive_attention, additive_weights
from fastattn.models.attention import Attention
from fastattn.pooling import AttentionPooling


class Model(nn.Module):
    """Every module and function, behind one another."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.own = fastattn.SelfAttention(8, 2)
        self.model_attention = Attention(8, 2)
        self.additive = AdditiveAttention(8)
        self.pooling = AttentionPooling(8)
        self.query = nn.Parameter(torch.randn(1, 1, 3, 8))

    def forward(self, x, lengths, weighted):
        x = self.model_attention(self.own(self.encoder(x)), causal=True)
        x = self.cross(x, x, value=x, need_weights=False)[0] + self.additive(x, x)[0]
        heads = x[:, None]
        heads = fastattn.scaled_dot_product_attention(heads, heads, heads, is_causal=True, window=(2, 0))
        out, lse = fastattn.scaled_dot_product_attention(self.query, heads, heads, key_lengths=lengths, return_lse=True)
        x = x + out.mean(2) + lse.mean()
        if weighted:
            weight = self.query[0, 0, 0]
            x = additive_attention(x, x, x, weight) + additive_weights(x, x, weight).mean()
        return self.pooling(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model()
    fastattn.convert(model)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_a_traced_model_gives_the_same(model, training):
    model.train(training)
    x, lengths = torch.randn(2, 5, 8), torch.tensor([3, 5])
    traced = torch.fx.symbolic_trace(model, concrete_args={"weighted": True})
    traced.graph.lint()
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert called == {"encoder", "cross", "own", "model_attention", "additive", "pooling"}
    torch.testing.assert_close(traced(x, lengths, True), model(x, lengths, True), atol=0, rtol=0)
    gradients = [torch.autograd.grad(m(x, lengths, True).sum(), model.query) for m in (traced, model)]
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


def test_a_traced_model_can_be_saved(model):
    x, lengths = torch.randn(2, 5, 8), torch.tensor([3, 5])
    traced = torch.fx.symbolic_trace(model, concrete_args={"weighted": False})
    loaded = pickle.loads(pickle.dumps(traced))
    torch.testing.assert_close(loaded(x, lengths, False), model(x, lengths, False), atol=0, rtol=0)


def test_hooks_run_once_when_the_traced_model_does():
    model = nn.Sequential(fastattn.SelfAttention(8, 2))
    expected = model(torch.ones(1, 3, 8))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(torch.ones(1, 3, 8)), expected * 2)


class Summary(fastattn.MultiHeadAttention):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0].mean(1)


def test_a_subclass_is_one_node_too():
    model = nn.Sequential(Summary(8, 2, batch_first=True), nn.Linear(8, 1))
    x = torch.randn(2, 4, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), atol=0, rtol=0)


@pytest.mark.parametrize("given", ["attn_mask", "key_lengths", "query"])
def test_one_traced_argument_is_enough(given):
    tensors = {name: torch.randn(1, 2, 4, 8) for name in ("query", "key", "value")}
    options = {"attn_mask": torch.rand(4, 4) < 0.7, "key_lengths": torch.tensor([3])}
    options = {name: value for name, value in (tensors | options).items() if name == given}
    constants = {name: value for name, value in tensors.items() if name != given}

    def attend(argument):
        return fastattn.scaled_dot_product_attention(**constants, **{given: argument})

    argument = options[given]
    torch.testing.assert_close(torch.fx.symbolic_trace(attend)(argument), attend(argument), atol=0, rtol=0)
