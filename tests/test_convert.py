"""fastattn.convert on torch's own layers and on a model of one's own, in training and evaluation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastattn
from fastattn import MultiHeadAttention
from fastattn.modules import FusedPathGuard

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

N, L, E, H = 3, 10, 32, 4


def padding():
    mask = torch.zeros(N, L, dtype=torch.bool)
    mask[1, 6:], mask[2, 2:] = True, True
    return mask


def pair(model):
    converted = copy.deepcopy(model)
    return converted, fastattn.convert(converted)


def assert_same(model, converted, call, where=None):
    """Outputs in training and evaluation, and the gradients of the parameters, agree."""
    for training in (True, False):
        outputs = []
        for module in (model, converted):
            module.train(training)
            with torch.set_grad_enabled(training):
                outputs.append(call(module))
        left, right = outputs if where is None else (output[where] for output in outputs)
        torch.testing.assert_close(left, right, rtol=2e-6, atol=2e-6)
        if training:
            names = [name for name, _ in model.named_parameters()]
            # Not of the squares: a final layer norm makes their sum constant, and all gradients nothing.
            cotangent = torch.randn(left.shape, generator=torch.Generator().manual_seed(0))
            gradients = [
                torch.autograd.grad(output, list(module.parameters()), cotangent)
                for output, module in ((left, model), (right, converted))
            ]
            for name, theirs, ours in zip(names, *gradients, strict=True):
                rounding = 2e-6 * float(theirs.abs().max())
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=rounding, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_encoder(batch_first, norm_first):
    layer = nn.TransformerEncoderLayer(
        E, H, 64, dropout=0.0, batch_first=batch_first, norm_first=norm_first, activation="gelu"
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)
    converted, report = pair(encoder)
    assert report.swapped == ["layers.0.self_attn", "layers.1.self_attn"]
    assert converted.use_nested_tensor == encoder.use_nested_tensor
    x = torch.randn(N, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    float_padding = torch.zeros(N, L).masked_fill(padding(), -torch.inf)
    x = x if batch_first else x.transpose(0, 1)
    valid = ~padding() if batch_first else ~padding().T
    for options in (
        {},
        {"src_key_padding_mask": padding()},
        {"mask": causal},
        {"mask": causal, "is_causal": True},
        {"mask": causal, "src_key_padding_mask": float_padding},
    ):
        where = valid if "src_key_padding_mask" in options else None
        assert_same(encoder, converted, lambda m, options=options: m(x, **options), where)


def test_transformer():
    model = nn.Transformer(E, H, 2, 2, 64, dropout=0.0, batch_first=True)
    converted, report = pair(model)
    assert len(report.swapped) == 6
    source, target = torch.randn(N, L, E), torch.randn(N, 7, E)
    causal = nn.Transformer.generate_square_subsequent_mask(7)

    def call(module):
        return module(
            source,
            target,
            tgt_mask=causal,
            tgt_is_causal=True,
            src_key_padding_mask=padding(),
            memory_key_padding_mask=padding(),
        )

    assert_same(model, converted, call)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H)
        self.shared = nn.ModuleDict({"again": self.attention})
        self.cross = nn.MultiheadAttention(E, H, kdim=8, vdim=8, add_bias_kv=True, batch_first=True)

    def forward(self, x, memory):
        x = x + self.attention(x, x, x)[0]
        x = (x + self.shared["again"](x, x, x)[0]).transpose(0, 1)
        out, weights = self.cross(x, memory, memory)
        return x + out * weights.sum(-1, keepdim=True)


def test_a_model_of_ones_own():
    model = Custom()
    converted, report = pair(model)
    assert report.swapped == ["attention", "cross"]
    assert converted.shared["again"] is converted.attention
    x, memory = torch.randn(L, N, E), torch.randn(N, 6, 8)
    assert_same(model, converted, lambda module: module(x, memory))


def test_parameters_hooks_and_names_stay():
    model = Custom()
    calls = []
    model.attention.register_forward_hook(lambda *_: calls.append(1))
    parameters, names = list(model.parameters()), list(model.state_dict())
    module = model.attention
    fastattn.convert(model)
    assert model.attention is module
    assert isinstance(module, MultiHeadAttention)
    assert all(left is right for left, right in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == names
    model(torch.randn(L, N, E), torch.randn(N, 6, 8))
    assert len(calls) == 2


def test_the_model_itself_and_a_second_time():
    module = nn.MultiheadAttention(E, H)
    report = fastattn.convert(module)
    assert report.swapped == [""]
    assert isinstance(module, MultiHeadAttention)
    assert "(the model)" in str(report)
    with pytest.warns(RuntimeWarning, match="no nn.MultiheadAttention to swap in MultiHeadAttention"):
        assert fastattn.convert(module).swapped == []


def test_subclasses_with_their_own_forward_are_kept_and_told():
    class Special(nn.MultiheadAttention):
        pass

    model = nn.ModuleList([Special(E, H), nn.MultiheadAttention(E, H)])
    report = fastattn.convert(model)
    assert type(model[0]) is Special
    assert report.swapped == ["1"]
    assert "Special" in report.kept["0"]
    assert "swapped 1 of 2" in str(report)


@pytest.fixture
def seen(monkeypatch):
    """Of each call of MultiHeadAttention, whether its query is nested."""
    calls = []
    original = MultiHeadAttention.forward

    def spy(self, *arguments, **options):
        calls.append(arguments[0].is_nested)
        return original(self, *arguments, **options)

    monkeypatch.setattr(MultiHeadAttention, "forward", spy)
    return calls


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(E, H, 64, batch_first=True, **options)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("how", ["converted", "by hand"])
def test_evaluation_reaches_the_module_and_not_torchs_fused_layer(seen, how, norm_first):
    """In a layer by itself and after every way to copy it; without gradients, where torch would fuse it."""
    layer = encoder_layer(norm_first=norm_first)
    theirs = copy.deepcopy(layer).eval()
    if how == "converted":
        fastattn.convert(layer)
    else:
        layer.self_attn = MultiHeadAttention(E, H, batch_first=True)
        layer.self_attn.load_state_dict(theirs.self_attn.state_dict())
    layer.eval()
    x = torch.randn(N, L, E)
    empty = encoder_layer(norm_first=norm_first, device="meta")
    fastattn.convert(empty)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty.eval()):
        for options in ({}, {"src_key_padding_mask": padding()}):
            seen.clear()
            with torch.no_grad():
                out = other(x, **options)
                expected = theirs(x, **options)
            assert seen == [False]
            where = ~options.get("src_key_padding_mask", torch.zeros(N, L, dtype=torch.bool))
            torch.testing.assert_close(out[where], expected[where])


def test_a_replaced_output_projection_leaves_the_fused_path_closed(seen):
    layer = encoder_layer().eval()
    fastattn.convert(layer)
    layer.self_attn.out_proj = nn.Linear(E, E)
    with torch.no_grad():
        layer(torch.randn(N, L, E))
    assert seen == [False]


@pytest.mark.parametrize("how", ["converted", "by hand"])
def test_an_encoders_nested_tensors_reach_the_module_and_padding_stays_0(seen, how):
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    if how == "converted":
        converted, _ = pair(encoder)
    else:
        layer = encoder_layer()
        layer.self_attn = MultiHeadAttention(E, H, batch_first=True)
        converted = nn.TransformerEncoder(layer, 2).eval()
        converted.load_state_dict(encoder.state_dict())
    assert converted.use_nested_tensor
    x = torch.randn(N, L, E)
    with torch.no_grad():
        out = converted(x, src_key_padding_mask=padding())
        assert seen == [True, True]
        assert out[padding()].abs().max() == 0
        torch.testing.assert_close(out, encoder(x, src_key_padding_mask=padding()))
        holes = padding()
        holes[0, 3] = True
        seen.clear()
        valid = ~holes
        expected = encoder(x, src_key_padding_mask=holes)[valid]
        torch.testing.assert_close(converted(x, src_key_padding_mask=holes)[valid], expected)
        assert seen == [False, False]


def test_an_encoder_whose_later_layers_are_trained_in_evaluation():
    """The first layer is frozen, so torch nests; its own modules would refuse what needs a gradient."""
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    encoder.layers[0].requires_grad_(False)
    converted, _ = pair(encoder)
    encoder.use_nested_tensor = False
    x, cotangent, valid = torch.randn(N, L, E), torch.randn(N, L, E), ~padding()
    gradients = [
        torch.autograd.grad(
            model(x, src_key_padding_mask=padding())[valid], list(model.layers[1].parameters()), cotangent[valid]
        )
        for model in (encoder, converted)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_modules_pickled_by_earlier_versions_are_mended(seen):
    layer = encoder_layer().eval()
    fastattn.convert(layer)
    module = layer.self_attn
    del module.fused_path_guard
    module._qkv_same_embed_dim = False
    module.backend = "auto"
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.self_attn._qkv_same_embed_dim
    assert isinstance(loaded.self_attn.fused_path_guard, FusedPathGuard)
    with torch.no_grad():
        loaded(torch.randn(N, L, E))
    assert seen == [False]


def test_converted_models_copy_pickle_and_compile():
    torch._dynamo.reset()
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 64, batch_first=True), 1).eval()
    fastattn.convert(model)
    x = torch.randn(N, L, E)
    expected = model(x)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.compile(model, backend="aot_eager", fullgraph=True),
    ):
        torch.testing.assert_close(other(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(other(x), expected)


def test_all_padding_is_finite_after_conversion():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
    )
    fastattn.convert(model)
    mask = padding()
    mask[0] = True
    for training in (True, False):
        x = torch.randn(N, L, E, requires_grad=True)
        out = model.train(training)(x, src_key_padding_mask=mask)
        assert out.isfinite().all()
        assert torch.autograd.grad(out.square().sum(), x)[0].isfinite().all()
