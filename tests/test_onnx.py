"""torch.onnx.export by both exporters, against ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastattn
from fastattn.additive import AdditiveAttention
from fastattn.integrations.onnx import decompositions
from fastattn.pooling import AttentionPooling

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def exported(model, inputs, path, **options):
    """A function that runs the exported model."""
    torch.onnx.export(model, tuple(inputs.values()), path, input_names=list(inputs), verbose=False, **options)
    session = onnxruntime.InferenceSession(path)
    taken = {node.name for node in session.get_inputs()}

    def run(**inputs):
        given = {name: tensor.numpy() for name, tensor in inputs.items() if name in taken}
        return tuple(torch.from_numpy(result) for result in session.run(None, given))

    return run


class Calls(nn.Module):
    """Every mask ingredient, over grouped heads."""

    def forward(self, query, key, value, allowed, bias, lengths):
        def attend(**options):
            return fastattn.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)

        return (
            attend(),
            attend(is_causal=True, scale=0.3),
            attend(causal="lower_right", window=(2, None)),
            attend(attn_mask=allowed),
            attend(attn_mask=bias, is_causal=True),
            *attend(key_lengths=lengths, causal="lower_right", return_lse=True),
        )


def call_inputs(batch=2, queries=5, keys=6):
    return {
        "query": torch.randn(batch, 4, queries, 8),
        "key": torch.randn(batch, 2, keys, 8),
        "value": torch.randn(batch, 2, keys, 4),
        "allowed": torch.rand(queries, keys) < 0.3,
        "bias": torch.randn(1, 4, 1, keys),
        "lengths": torch.arange(batch) % 2 * (keys - 1),
    }


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.cross = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
        self.additive = AdditiveAttention(8)
        self.pooling = AttentionPooling(8, "additive")

    def forward(self, x, padding):
        x = self.encoder(x, src_key_padding_mask=padding)
        x, weights = self.cross(x, x, x, key_padding_mask=padding)
        x, more_weights = self.additive(x, x, key_padding_mask=padding, need_weights=True)
        lengths = torch.logical_not(padding).sum(1)
        return self.pooling(x, lengths), weights, more_weights


def module_inputs(batch=2, length=5):
    padding = torch.arange(length).expand(batch, length) >= torch.arange(batch)[:, None] + length - 2
    return {"x": torch.randn(batch, length, 8), "padding": padding}


CASES = {"calls": (Calls, call_inputs), "modules": (Modules, module_inputs)}


def make(model):
    torch.manual_seed(0)
    model = model().eval()
    if list(model.parameters()):
        fastattn.convert(model)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_exporter_that_traces(name, tmp_path):
    model, inputs = make(CASES[name][0]), CASES[name][1]
    axes = {key: {0: "batch"} for key in ("query", "key", "value", "lengths", "x", "padding")}
    run = exported(model, inputs(), str(tmp_path / "model.onnx"), dynamo=False, dynamic_axes=axes)
    for batch in (2, 3):
        given = inputs(batch)
        torch.testing.assert_close(run(**given), model(**given), atol=1e-5, rtol=1e-5)


class SomeCalls(nn.Module):
    """Few, because the exporter of graphs takes seconds for each."""

    def forward(self, query, key, value, allowed, bias, lengths):
        def attend(**options):
            return fastattn.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)

        return (
            attend(attn_mask=bias, is_causal=True),
            *attend(key_lengths=lengths, causal="lower_right", window=(2, None), attn_mask=allowed, return_lse=True),
        )


def test_the_exporter_of_graphs_on_calls(tmp_path):
    model, inputs = make(SomeCalls), call_inputs()
    run = exported(model, inputs, str(tmp_path / "model.onnx"), dynamo=True)
    torch.testing.assert_close(run(**inputs), model(**inputs), atol=1e-5, rtol=1e-5)


def test_the_exporter_of_graphs_on_a_module_with_a_dynamic_batch(tmp_path):
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    fastattn.convert(model)
    batch = torch.export.Dim("batch", min=2)
    inputs = dict.fromkeys(("query", "key", "value"), torch.randn(2, 5, 8))
    run = exported(model, inputs, str(tmp_path / "model.onnx"), dynamo=True, dynamic_shapes=[{0: batch}] * 3)
    given = dict.fromkeys(inputs, torch.randn(3, 5, 8))
    torch.testing.assert_close(run(**given), model(**given), atol=1e-5, rtol=1e-5)


def test_a_program_of_torch_export_keeps_the_operators_until_it_is_decomposed():
    model, inputs = make(SomeCalls), call_inputs()
    program = torch.export.export(model, (), inputs)
    assert "fastattn.attention_forward" in str(program.graph)
    decomposed = program.run_decompositions(decompositions())
    assert "fastattn" not in str(decomposed.graph)
    torch.testing.assert_close(decomposed.module()(**inputs), model(**inputs))


def test_dropout_is_refused(tmp_path):
    model = fastattn.SelfAttention(8, 2, dropout=0.5)
    training = torch.onnx.TrainingMode.TRAINING
    with pytest.raises(ValueError, match=r"dropout_p must be 0.0 in an export to ONNX, got 0.5"):
        exported(model, {"x": torch.randn(1, 3, 8)}, str(tmp_path / "x.onnx"), dynamo=False, training=training)
