"""fastattn.convert on models that call torch's scaled_dot_product_attention themselves: found, and what to write."""

from __future__ import annotations

import collections
import dis
import functools
import importlib.util
import inspect
import json
import textwrap
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastattn
from fastattn.convert import Conversion

HERE = Path(__file__).name


class ByF(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class ByImportedName(nn.Module):
    def forward(self, x):
        return scaled_dot_product_attention(x, x, x)


class ByOtherName(nn.Module):
    def forward(self, x):
        return sdpa(x, x, x)


class ByFullName(nn.Module):
    def forward(self, x):
        if self.training:
            return x
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class ByImportInForward(nn.Module):
    def forward(self, x):
        from torch.nn.functional import scaled_dot_product_attention as attend

        return attend(x, x, x)


def attend(x):
    return _attend(x, scale=1.0)


def _attend(x, scale):
    return F.scaled_dot_product_attention(x, x, x, scale=scale)


class ByHelper(nn.Module):
    def forward(self, x):
        return attend(x)


class ByMethod(nn.Module):
    def forward(self, x):
        return x + self.attend(x)

    @staticmethod
    def attend(x):
        return [F.scaled_dot_product_attention(part, part, part) for part in (x,)][0]


def decorated(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


class ByDecoratedForward(nn.Module):
    @decorated
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class BySuper(ByF):
    def forward(self, x):
        return super().forward(x)


def closing_over(function):
    class ByClosure(nn.Module):
        def forward(self, x):
            return function(x, x, x)

    return ByClosure


class OnObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.forward = types.MethodType(ByF.forward, self)


class ReplacedOnObject(ByF):
    """As by what adds hooks to a model."""

    def __init__(self):
        super().__init__()
        replacement = functools.partial(lambda module, x: x, self)
        self.forward = functools.update_wrapper(replacement, self.forward)


def two_away(x):
    return attend(x)


def three_away(x):
    return two_away(x)


def four_away(x):
    return three_away(x)


class ByLongAndShortPath(nn.Module):
    """Torch's function is six calls away by the first helper, two by the second."""

    def forward(self, x):
        x = four_away(x)
        return attend(x)


class ByCallMethod(nn.Module):
    def __call__(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class ByForwardAfterCallMethod(ByF):
    def __call__(self, x):
        return super().__call__(x)


class ByObject(nn.Module):
    class Attend:
        def __call__(self, x):
            return self.attend(x)

        def attend(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    def __init__(self):
        super().__init__()
        self.forward = self.Attend()


class ByMethodInNestedFunction(nn.Module):
    """As with checkpointing."""

    def forward(self, x):
        def run(y):
            return [self.attend(part) for part in y]

        return run(x)

    def attend(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class ByMethodBesideNestedFunction(ByMethodInNestedFunction):
    def forward(self, x):
        return self.attend(x), lambda: self


causal = functools.partial(F.scaled_dot_product_attention, is_causal=True)


class ByPartialCall(nn.Module):
    def forward(self, x):
        return causal(x, x, x)  # scaled_dot_product_attention


def undeclared(function):
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


class ByUndeclaredDecoration(ByMethodInNestedFunction):
    forward = undeclared(ByMethodInNestedFunction.forward)


CALLERS = (
    ByF,
    ByImportedName,
    ByOtherName,
    ByFullName,
    ByImportInForward,
    ByHelper,
    ByMethod,
    ByDecoratedForward,
    BySuper,
    closing_over(F.scaled_dot_product_attention),
    OnObject,
    ReplacedOnObject,
    ByLongAndShortPath,
    ByCallMethod,
    ByForwardAfterCallMethod,
    ByObject,
    ByMethodInNestedFunction,
    ByMethodBesideNestedFunction,
    ByPartialCall,
    ByUndeclaredDecoration,
)


class Nothing(nn.Module):
    def forward(self, x):
        return x.exp()


class WithFastattn(nn.Module):
    def forward(self, x):
        return fastattn.scaled_dot_product_attention(x, x, x)


class AnotherOfThatName(nn.Module):
    def forward(self, x):
        return self.scaled_dot_product_attention(x)

    def scaled_dot_product_attention(self, x):
        return x.softmax(-1)


class WithoutItsBasesForward(ByF):
    def forward(self, x):
        return x


class MeaningSomethingElse(nn.Module):
    def forward(self, F):
        return F.scaled_dot_product_attention


def converted(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = fastattn.convert(model)
    return report, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("cls", CALLERS, ids=lambda cls: cls.__name__)
def test_a_call_in_the_forward_or_near_it_is_found(cls):
    model = nn.Sequential(nn.Linear(4, 4), cls())
    report, (warning,) = converted(model)
    assert report.calls.keys() == {"1"}
    file, line = report.calls["1"].rsplit(":", 1)
    assert Path(file).name == HERE
    named = inspect.getsource(inspect.getmodule(ByF)).splitlines()[int(line) - 1]
    assert any(name in named for name in ("scaled_dot_product_attention", "sdpa(", "function(x, x, x)"))
    for text in (warning, str(report)):
        assert report.calls["1"] in text
        assert "fastattn.scaled_dot_product_attention takes the same arguments" in text
    assert "found no nn.MultiheadAttention" in warning


@pytest.mark.parametrize(
    "model",
    [
        Nothing(),
        WithFastattn(),
        AnotherOfThatName(),
        WithoutItsBasesForward(),
        MeaningSomethingElse(),
        fastattn.SelfAttention(8, 2),
        torch.jit.script(nn.Linear(4, 4)),
        nn.Sequential(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_what_does_not_call_it_is_not_named(model):
    report, (warning,) = converted(model)
    assert not report.calls
    assert warning == f"fastattn.convert found no nn.MultiheadAttention to swap in {type(model).__name__}"
    assert str(report) == "swapped 0 of 0 attention modules"


def test_torchs_own_layers_are_not_named():
    """F.multi_head_attention_forward calls it for them, and conversion has taken its place."""
    model = nn.Transformer(8, 2, 1, 1, 16)
    report, said = converted(model)
    assert len(report.swapped) == 3 and not report.calls and not said
    assert not fastattn.convert(nn.ModuleList([nn.MultiheadAttention(8, 2)])).calls


def test_beside_modules_that_are_swapped_calls_are_named_in_the_report():
    model = nn.ModuleDict({"blocks": nn.ModuleList(ByF() for _ in range(6)), "layer": nn.TransformerEncoderLayer(8, 2)})
    report, said = converted(model)
    assert report.swapped == ["layer.self_attn"]
    assert list(report.calls) == [f"blocks.{i}" for i in range(6)]
    assert not said
    assert str(report).splitlines()[2] == (
        f"  blocks.0, blocks.1, blocks.2 and 3 more call F.scaled_dot_product_attention: {report.calls['blocks.0']}"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_module_is_named():
    model = nn.Sequential(torch.jit.script(ByF()), torch.jit.script(Nothing()))
    report, _ = converted(model)
    assert report.calls == {"0": "compiled by torch.jit"}
    scripted = torch.jit.script(nn.TransformerEncoderLayer(8, 2, batch_first=True))
    assert not converted(scripted)[0].calls


def test_an_attention_interface_of_transformers_is_named():
    model = Nothing()
    model.config = types.SimpleNamespace(_attn_implementation="sdpa")
    report, (warning,) = converted(model)
    assert report.interface == "sdpa"
    for text in (warning, str(report)):
        assert "config._attn_implementation is 'sdpa'" in text and "AttentionInterface" in text
    model.config._attn_implementation = "eager"
    assert converted(model)[0].interface is None


def test_the_function_itself_as_a_forward_is_named():
    class Model(nn.Module):
        forward = staticmethod(F.scaled_dot_product_attention)

    (place,) = converted(Model())[0].calls.values()
    assert place.startswith("the forward of ") and place.endswith(".Model")


RAN = []


class Alive:
    """Notes which of its hooks ran."""

    def __getattribute__(self, name):
        RAN.append(name)
        return object.__getattribute__(self, name)

    def __getattr__(self, name):
        raise KeyError(name)

    @property
    def __class__(self):
        raise RuntimeError("out of context")

    def __get__(self, instance, owner):
        RAN.append("__get__")
        raise ValueError("not ready")


ALIVE = Alive()


def alive_models():
    """Models with an attention layer each, and something that notes when it runs."""
    alive = ALIVE
    spec = importlib.util.find_spec("this")
    unloaded = importlib.util.module_from_spec(spec)
    importlib.util.LazyLoader(spec.loader).exec_module(unloaded)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return x

    class Config(Layer):
        @property
        def config(self):
            RAN.append("config")
            raise RuntimeError("no config yet")

    class AliveConfig(Layer):
        def __init__(self):
            super().__init__()
            vars(self)["config"] = alive

    class Global(Layer):
        def forward(self, x):
            return ALIVE["scale"] * ALIVE.scale * x

    class Closure(Layer):
        def forward(self, x):
            return alive.attend(unloaded.d, unloaded.scaled_dot_product_attention(x))

    class Forward(Layer):
        forward = alive

    class PropertyForward(Layer):
        @property
        def forward(self):
            RAN.append("forward")

    class Property(Layer):
        @property
        def attend(self):
            RAN.append("attend")

        def forward(self, x):
            return self.attend(x)

    class Attributes(Layer):
        def __getattr__(self, name):
            RAN.append(name)
            return super().__getattr__(name)

    class Wrapped(Layer):
        def forward(self, x):
            return x

        forward.__wrapped__ = forward

    return [
        cls() for cls in (Config, AliveConfig, Global, Closure, Forward, PropertyForward, Property, Attributes, Wrapped)
    ]


def test_looking_runs_nothing(capsys):
    for model in alive_models():
        RAN.clear()
        report, said = converted(model)
        assert RAN == [] and not said
        assert report == Conversion(swapped=["layer"])
        assert type(vars(model)["_modules"]["layer"]) is fastattn.MultiHeadAttention
    assert capsys.readouterr().out == ""  # of the module "this"


def test_a_config_of_transformers_keeps_it_behind_a_property():
    class Config:
        _attn_implementation_internal = "eager"

        @property
        def _attn_implementation(self):
            return self._attn_implementation_internal

    model = Nothing()
    model.config = Config()
    assert converted(model)[0].interface is None
    model.config._attn_implementation_internal = "sdpa"
    assert converted(model)[0].interface == "sdpa"


def test_what_cannot_be_looked_at_costs_no_conversion(monkeypatch):
    get_instructions = dis.get_instructions

    def refusing(code):
        if code is Nothing.forward.__code__:
            raise RecursionError("of whatever kind")
        return get_instructions(code)

    monkeypatch.setattr(dis, "get_instructions", refusing)
    report, said = converted(nn.Sequential(Nothing(), ByF(), nn.MultiheadAttention(8, 2)))
    assert report.swapped == ["2"] and report.calls.keys() == {"1"} and not said
    assert report.unread == {"0": "RecursionError"}
    line = "0 was not looked at for calls of F.scaled_dot_product_attention (RecursionError)"
    assert report.advice()[-1] == line and line in str(report)


def test_what_many_classes_share_is_read_once(monkeypatch):
    read = []
    get_instructions = dis.get_instructions
    monkeypatch.setattr(dis, "get_instructions", lambda code: read.append(code) or get_instructions(code))

    def chain(i):
        class Model(nn.Module):
            def forward(self, x):
                return textwrap.dedent(x) + json.dumps(x)

        return Model()

    assert not converted(nn.Sequential(*map(chain, range(20))))[0].calls
    counts = collections.Counter(read)
    assert textwrap.dedent.__code__ in counts and len(counts) > 3
    forward = next(code for code in counts if code.co_name == "forward")
    assert counts.pop(forward) == 20 and set(counts.values()) == {1}


def test_unconvert_has_no_advice():
    with pytest.warns(RuntimeWarning, match="no fastattn.MultiHeadAttention to swap in ByF$"):
        assert not fastattn.unconvert(ByF()).calls
