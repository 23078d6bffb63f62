"""Swap the attention modules of an existing model, and swap them back: :func:`convert`, :func:`unconvert`."""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastattn.checks import shown
from fastattn.modules import FusedPathGuard, MultiHeadAttention
from fastattn.torch_calls import attention_calls, attention_interface

#: What a subclass of nn.MultiheadAttention must not define by itself: the module computes with its own.
_NAMES_IN_USE = {"backend", "fused_path_guard"} | {
    name for name in vars(MultiHeadAttention) if not hasattr(nn.MultiheadAttention, name)
}
_NAMES_IN_USE.remove("_qkv_same_embed_dim")  # every nn.MultiheadAttention has this attribute; ours is a property


@dataclass
class Conversion:
    """What :func:`convert` or :func:`unconvert` did.

    ``swapped`` holds the names of the modules whose class is now another, and ``kept`` those of the other
    attention modules with the reason. ``calls`` names the modules that :func:`convert` found to call
    F.scaled_dot_product_attention themselves, with the file and line, and ``interface`` what
    ``model.config._attn_implementation`` says if that leads to torch's function (as in Hugging Face's transformers):
    both are left to be changed by hand. ``unread`` names the modules whose code could not be looked at for such calls,
    with the exception.
    """

    swapped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    calls: dict[str, str] = field(default_factory=dict)
    interface: str | None = None
    unread: dict[str, str] = field(default_factory=dict)

    def advice(self) -> list[str]:
        """What to write for ``calls`` and ``interface``, and where to look for more (``unread``)."""
        places: dict[str, list[str]] = {}
        for name, place in self.calls.items():
            places.setdefault(place, []).append(name or "(the model)")
        lines = [f"{_listed(names)} call F.scaled_dot_product_attention: {place}" for place, names in places.items()]
        if lines:
            lines.append(
                "fastattn.scaled_dot_product_attention takes the same arguments: replace F.scaled_dot_product_attention"
                " by it there"
            )
        if self.interface is not None:
            lines.append(
                f"config._attn_implementation is {self.interface!r}: register a function that calls "
                "fastattn.scaled_dot_product_attention (transformers.AttentionInterface.register), and name it there"
            )
        lines += [
            f"{name or '(the model)'} was not looked at for calls of F.scaled_dot_product_attention ({error})"
            for name, error in self.unread.items()
        ]
        return lines

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} of {len(self.swapped) + len(self.kept)} attention modules"]
        lines += [f"  {name or '(the model)'}" for name in self.swapped]
        lines += [f"  kept {name or '(the model)'}: {reason}" for name, reason in self.kept.items()]
        lines += [f"  {line}" for line in self.advice()]
        return "\n".join(lines)


def _listed(names: list[str]) -> str:
    """The names, the first few of many."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def convert(model: nn.Module) -> Conversion:
    """Make every nn.MultiheadAttention in ``model``, or the model itself, a :class:`MultiHeadAttention`, in place.

    The module objects stay the same and so do their parameters, buffers, hooks, parametrizations, training mode
    and names in the state dict: only their class changes, and they get a submodule without parameters (see
    :class:`MultiHeadAttention`). :func:`unconvert` takes that back.

    Subclasses are converted too, parametrized modules among them, and stay instances of their class. Kept as
    they are, with the reason, are modules whose forward is another than nn.MultiheadAttention's. Modules that call
    F.scaled_dot_product_attention themselves are found by their code and named, with what to write there instead.

    In evaluation, the fused forward of nn.TransformerEncoderLayer no longer bypasses the modules. The nested
    tensors of nn.TransformerEncoder reach them as they are: padding costs nothing, and the outputs there are 0.

    Returns what was swapped; warns if that is nothing. Raises TypeError if ``model`` is no nn.Module.
    """
    return _swap(model, "convert", "nn.MultiheadAttention", _why_not_converted, _convert)


def unconvert(model: nn.Module) -> Conversion:
    """Make every :class:`MultiHeadAttention` in ``model`` an nn.MultiheadAttention, in place.

    The inverse of :func:`convert`: the model needs fastattn no longer. Modules that were constructed as
    MultiHeadAttention become nn.MultiheadAttention too, and forget their ``backend``; subclasses of it, as
    :class:`SelfAttention`, are kept.

    Returns what was swapped; warns if that is nothing. Raises TypeError if ``model`` is no nn.Module.
    """
    return _swap(model, "unconvert", "fastattn.MultiHeadAttention", _why_not_unconverted, _unconvert)


def _swap(
    model: nn.Module,
    verb: str,
    sought: str,
    why_not: Callable[[nn.Module], str | None],
    swap: Callable[[nn.Module], None],
) -> Conversion:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    report = Conversion()
    modules = list(model.named_modules())
    for name, module in modules:
        reason = why_not(module)
        if reason is None:
            swap(module)
            report.swapped.append(name)
        elif reason:
            report.kept[name] = reason
    if verb == "convert":
        report.calls = attention_calls(modules, report.unread)
        report.interface = attention_interface(model, report.unread)
    if not report.swapped:
        message = f"fastattn.{verb} found no {sought} to swap in {type(model).__name__}"
        warnings.warn("; ".join([message, *report.advice()]), RuntimeWarning, stacklevel=3)
    return report


def _why_not_converted(module: nn.Module) -> str | None:
    """The reason to keep the module; None if there is none, "" if it is no other attention module."""
    if isinstance(module, torch.jit.ScriptModule):
        is_attention = getattr(module, "original_name", "") == nn.MultiheadAttention.__name__
        return "it is compiled by torch.jit: convert the model before" if is_attention else ""
    if not isinstance(module, nn.MultiheadAttention) or isinstance(module, MultiHeadAttention):
        return ""
    cls = type(module)
    if cls.forward is not nn.MultiheadAttention.forward:
        return f"{cls.__name__} has a forward of its own"
    if _has_replaced_forward(module):
        return "its forward was replaced on this object by one that may hold on to the old one: convert before that"
    taken = sorted(name for name in _NAMES_IN_USE if name in module.__dict__ or hasattr(cls, name))
    if taken:
        return f"it has a {taken[0]} of its own, a name that MultiHeadAttention uses"
    return None


def _why_not_unconverted(module: nn.Module) -> str | None:
    if not isinstance(module, MultiHeadAttention):
        return ""
    if _original_class(module) is None:
        return f"{type(module).__name__} is a subclass of fastattn.MultiHeadAttention"
    if _has_replaced_forward(module):
        return "its forward was replaced on this object by one that may hold on to the old one: unconvert before that"
    return None


def _has_replaced_forward(module: nn.Module) -> bool:
    """Does the object have another forward than its class? What undoes a replacement may leave the class's there."""
    forward = vars(module).get("forward")
    is_the_class_s = getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    return forward is not None and not is_the_class_s


def _convert(module: nn.MultiheadAttention) -> None:
    module.__class__ = _converted_class(module)
    for name in ("forward", "_qkv_same_embed_dim"):
        vars(module).pop(name, None)
    module.backend = "auto"
    module.fused_path_guard = FusedPathGuard()


def _unconvert(module: MultiHeadAttention) -> None:
    module.__class__ = _original_class(module)
    module._qkv_same_embed_dim = module.kdim == module.embed_dim == module.vdim
    del module.fused_path_guard
    del module.backend
    vars(module).pop("forward", None)


def _converted_class(module: nn.MultiheadAttention) -> type:
    cls = parametrize.type_before_parametrizations(module)
    return _parametrized(module, MultiHeadAttention if cls is nn.MultiheadAttention else _converted_subclass(cls))


def _original_class(module: MultiHeadAttention) -> type | None:
    cls = parametrize.type_before_parametrizations(module)
    if cls is MultiHeadAttention:
        return _parametrized(module, nn.MultiheadAttention)
    return _parametrized(module, cls.__bases__[1]) if cls.__bases__[0] is _Converted else None


def _parametrized(module: nn.Module, cls: type) -> type:
    """``cls`` with the parametrizations that the module's class has.

    Those are properties of a class made for this module, whose base is the class that the module had before.
    """
    if not parametrize.is_parametrized(module):
        return cls
    namespace = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{cls.__name__}", (cls,), namespace)


class _Converted:
    """Comes first among the bases of a subclass of nn.MultiheadAttention that is converted.

    No module holds such a class, so it is made again where a module is copied or unpickled.
    """

    def __reduce_ex__(self, protocol: int):
        construct, arguments, *state = super().__reduce_ex__(max(2, protocol))
        if construct is not copyreg.__newobj__:
            return construct, arguments, *state
        cls, *arguments = arguments
        return _new_converted, (cls.__bases__[1], *arguments), *state


@cache
def _converted_subclass(cls: type) -> type:
    """``cls``, whose forward is MultiHeadAttention's."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Converted, cls, MultiHeadAttention), names)


def _new_converted(cls: type, *arguments) -> MultiHeadAttention:
    converted = _converted_subclass(cls)
    return converted.__new__(converted, *arguments)
