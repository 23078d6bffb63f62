"""fastattn.convert and unconvert on torch's own layers and on models of one's own, in training and evaluation."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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
    assert fastattn.unconvert(module).swapped == [""]
    with pytest.warns(RuntimeWarning, match="no fastattn.MultiHeadAttention to swap in MultiheadAttention"):
        assert fastattn.unconvert(module).swapped == []


@pytest.mark.parametrize("swap", [fastattn.convert, fastattn.unconvert])
@pytest.mark.parametrize("model", [5, None, nn.Linear, [nn.MultiheadAttention(E, H)]])
def test_what_is_no_module_is_refused_by_name(swap, model):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        swap(model)


def self_attention(module, x):
    return module(x, x, x)[0]


class WithoutForward(nn.MultiheadAttention):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.note = "kept"

    def extra_repr(self):
        return self.note


def parametrized(module):
    parametrizations.weight_norm(module, "in_proj_weight")
    parametrizations.weight_norm(module.out_proj)


def pruned(module):
    prune.l1_unstructured(module, "in_proj_weight", amount=0.3)


VARIANTS = {
    "plain": (nn.MultiheadAttention, lambda module: None),
    "subclass": (WithoutForward, lambda module: None),
    "parametrized": (nn.MultiheadAttention, parametrized),
    "parametrized subclass": (WithoutForward, parametrized),
    "pruned": (nn.MultiheadAttention, pruned),
    "hooks of weight_norm": (nn.MultiheadAttention, lambda m: nn.utils.weight_norm(m, "in_proj_weight")),
    "forward put back": (nn.MultiheadAttention, lambda m: setattr(m, "forward", m.forward)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_module_with_torchs_forward_is_converted_and_back(name):
    kind, prepare = VARIANTS[name]
    theirs, ours = kind(E, H, batch_first=True), kind(E, H, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    for module in (theirs, ours):
        prepare(module)
    assert fastattn.convert(ours).swapped == [""]
    assert isinstance(ours, MultiHeadAttention)
    assert isinstance(ours, kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert type(ours).forward is MultiHeadAttention.forward
    x = torch.randn(N, L, E)
    assert_same(theirs, ours, lambda module: self_attention(module, x))
    if all(weight.is_leaf for weight in vars(ours).values() if isinstance(weight, torch.Tensor)):
        assert_same(theirs, copy.deepcopy(ours), lambda module: self_attention(module, x))
    assert fastattn.unconvert(ours).swapped == [""]
    assert type(ours).__name__ == type(theirs).__name__
    assert type(ours).__mro__[-2:] == type(theirs).__mro__[-2:]
    assert not isinstance(ours, MultiHeadAttention)
    assert vars(ours).keys() - {"forward"} == vars(theirs).keys() - {"forward"}
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert_same(theirs, ours, lambda module: self_attention(module, x))


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, WithoutForward])
def test_parametrizations_come_and_go_after_the_conversion(kind):
    module = kind(E, H, batch_first=True)
    parametrized(module)
    fastattn.convert(module)
    x = torch.randn(N, L, E)
    expected = self_attention(module, x)
    parametrize.remove_parametrizations(module, "in_proj_weight")
    assert type(module).__name__ == ("WithoutForward" if kind is WithoutForward else "MultiHeadAttention")
    assert type(module).forward is MultiHeadAttention.forward
    assert torch.equal(self_attention(module, x), expected)
    parametrizations.weight_norm(module, "in_proj_weight")
    fastattn.unconvert(module)
    assert not isinstance(module, MultiHeadAttention)
    torch.testing.assert_close(self_attention(module, x), expected)
    parametrize.remove_parametrizations(module, "in_proj_weight")
    assert type(module) is kind


def test_a_converted_subclass_is_copied_and_pickled():
    module = WithoutForward(E, H, batch_first=True)
    fastattn.convert(module)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    x = torch.randn(N, L, E)
    for other in (
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        pickle.loads(pickle.dumps(module, protocol=0)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is type(module)
        assert other.extra_repr() == "kept"
        assert torch.equal(self_attention(other, x), self_attention(module, x))
        assert fastattn.unconvert(other).swapped == [""]
        assert type(other) is WithoutForward


def wrapped(module):
    """As libraries do that move weights, or count calls."""
    old = module.forward
    module.forward = functools.update_wrapper(lambda *arguments: old(*arguments), old)


def bound(module):
    module.forward = types.MethodType(lambda self, x, *_, **__: (x, None), module)


class OwnForward(nn.MultiheadAttention):
    def forward(self, query, *_, **__):
        return query, None


class UsesOurName(nn.MultiheadAttention):
    def _project(self, x):
        return x


KEPT = {
    "own forward": (OwnForward(E, H), "OwnForward has a forward of its own"),
    "quantizable": (
        torch.ao.nn.quantizable.MultiheadAttention(E, H),
        "MultiheadAttention has a forward of its own",
    ),
    "name in use": (UsesOurName(E, H), "it has a _project of its own"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_has_its_own_way_is_kept_with_the_reason(name):
    module, reason = KEPT[name]
    model = nn.ModuleList([module, nn.MultiheadAttention(E, H)])
    kind = type(module)
    report = fastattn.convert(model)
    assert type(model[0]) is kind
    assert report.swapped == ["1"]
    assert reason in report.kept["0"]
    assert "swapped 1 of 2" in str(report)
    assert reason in str(report)


def test_an_attribute_named_as_one_of_ours_keeps_the_module():
    module = nn.MultiheadAttention(E, H)
    module.backend = "of another library"
    model = nn.ModuleList([module, nn.MultiheadAttention(E, H)])
    assert "it has a backend of its own" in fastattn.convert(model).kept["0"]
    assert module.backend == "of another library"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_module_is_kept_with_the_reason():
    model = nn.ModuleList([nn.MultiheadAttention(E, H), torch.jit.script(nn.ModuleList([nn.MultiheadAttention(E, H)]))])
    report = fastattn.convert(model)
    assert report.swapped == ["0"]
    assert list(report.kept) == ["1.0"]
    assert "compiled by torch.jit" in report.kept["1.0"]


@pytest.mark.parametrize("replace", [wrapped, bound])
def test_a_replaced_forward_keeps_the_module_and_works_on(replace):
    x = torch.randn(L, N, E)
    module = nn.MultiheadAttention(E, H)
    replace(module)
    expected = self_attention(module, x)
    with pytest.warns(RuntimeWarning, match="no nn.MultiheadAttention"):
        report = fastattn.convert(module)
    assert "its forward was replaced on this object" in report.kept[""]
    assert torch.equal(self_attention(module, x), expected)
    converted = nn.MultiheadAttention(E, H)
    fastattn.convert(converted)
    replace(converted)
    expected = self_attention(converted, x)
    with pytest.warns(RuntimeWarning, match="no fastattn.MultiHeadAttention"):
        report = fastattn.unconvert(converted)
    assert "its forward was replaced on this object" in report.kept[""]
    assert torch.equal(self_attention(converted, x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_what_reads_a_converted_modules_attributes_finds_what_they_say(training):
    """A forward that was saved before, and code that calls torch's function with the module's weights."""
    x = torch.randn(L, N, E)
    for options in ({}, {"kdim": E, "vdim": 8}):
        module = nn.MultiheadAttention(E, H, **options).train(training)
        value = torch.randn(L, N, module.vdim)
        expected, weights = module(x, x, value)
        saved = module.forward
        fastattn.convert(module)
        assert module._qkv_same_embed_dim == (module.in_proj_weight is not None)
        for out in (saved(x, x, value), nn.MultiheadAttention.forward(module, x, x, value), module(x, x, value)):
            torch.testing.assert_close(out, (expected, weights))
        separate = {f"{name}_proj_weight": getattr(module, f"{name}_proj_weight") for name in "qkv"}
        out, _ = F.multi_head_attention_forward(
            *(x, x, value, E, H, module.in_proj_weight, module.in_proj_bias, module.bias_k, module.bias_v),
            *(module.add_zero_attn, 0.0, module.out_proj.weight, module.out_proj.bias, training),
            use_separate_proj_weight=not module._qkv_same_embed_dim,
            **separate,
        )
        torch.testing.assert_close(out, expected)


class LowRankAdapter(nn.Module):
    """Merges an update into the packed weight for each call, as PEFT's layer for nn.MultiheadAttention does."""

    def __init__(self, base_layer):
        super().__init__()
        assert base_layer._qkv_same_embed_dim
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, E)), nn.Parameter(torch.randn(3 * E, 2))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)

    def forward(self, *arguments, **options):
        weight = self.base_layer.in_proj_weight
        del self.base_layer.in_proj_weight
        self.base_layer.in_proj_weight = weight.detach() + self.lora_b @ self.lora_a
        out = self.base_layer(*arguments, **options)
        del self.base_layer.in_proj_weight
        self.base_layer.register_parameter("in_proj_weight", weight)
        return out


@pytest.mark.parametrize("convert_first", [True, False])
def test_low_rank_adapters_work_in_training_and_in_evaluation(convert_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 64, dropout=0.0, batch_first=True)
    if convert_first:
        fastattn.convert(layer)
    layer.self_attn = LowRankAdapter(layer.self_attn)
    layer.double()
    torch_layer = copy.deepcopy(layer)
    if convert_first:
        fastattn.unconvert(torch_layer)
    else:
        fastattn.convert(layer)
    x = torch.randn(N, L, E, dtype=torch.float64)
    expected = torch_layer(x)
    leaves = ("lora_a", "lora_b")
    gradients = [
        torch.autograd.grad(out.sin().sum(), [getattr(module.self_attn, name) for name in leaves])
        for module, out in ((torch_layer, expected), (layer, layer(x)))
    ]
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)


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


def test_models_converted_and_back_are_as_they_were():
    model = nn.ModuleDict({"transformer": nn.Transformer(E, H, 1, 1, 64, batch_first=True), "own": Custom()})
    before = copy.deepcopy(model)
    for _ in range(2):
        report = fastattn.convert(model)
        assert fastattn.unconvert(model).swapped == report.swapped
    for (name, left), (other, right) in zip(model.named_modules(), before.named_modules(), strict=True):
        assert name == other
        assert type(left) is type(right)
        assert vars(left).keys() == vars(right).keys()
    assert model["own"].shared["again"] is model["own"].attention


def test_modules_constructed_as_ours_become_torchs_and_subclasses_of_them_are_kept():
    model = nn.ModuleList([MultiHeadAttention(E, H, backend="reference"), fastattn.SelfAttention(E, H)])
    report = fastattn.unconvert(model)
    assert type(model[0]) is nn.MultiheadAttention
    assert not hasattr(model[0], "backend")
    assert report.kept == {"1": "SelfAttention is a subclass of fastattn.MultiHeadAttention"}


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
