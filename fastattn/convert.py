"""Swap the attention modules of an existing model: :func:`convert`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from torch import nn

from fastattn.modules import MultiHeadAttention


@dataclass
class Conversion:
    """What :func:`convert` did.

    ``swapped`` holds the names of the modules that now are a :class:`MultiHeadAttention`, ``kept`` those
    of other kinds of nn.MultiheadAttention with the reason, and ``unnested`` those of the
    nn.TransformerEncoder modules that no longer turn padded batches into nested tensors.
    """

    swapped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    unnested: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} of {len(self.swapped) + len(self.kept)} attention modules"]
        lines += [f"  {name or '(the model)'}" for name in self.swapped]
        lines += [f"  kept {name or '(the model)'}: {reason}" for name, reason in self.kept.items()]
        lines += [f"  no nested tensors in {name or '(the model)'}" for name in self.unnested]
        return "\n".join(lines)


def convert(model: nn.Module) -> Conversion:
    """Make every nn.MultiheadAttention in ``model``, or the model itself, a :class:`MultiHeadAttention`, in place.

    The module objects stay the same and so do their parameters, buffers, hooks, training mode and
    names in the state dict: only their class changes. It can be undone by loading the state dict into a
    model that is not converted.

    Two shortcuts of torch would bypass the converted modules in evaluation, and no longer apply:
    nn.TransformerEncoderLayer's fused forward (see :class:`MultiHeadAttention`), and the nested tensors
    of nn.TransformerEncoder, whose ``use_nested_tensor`` is set to False. The latter also means that the
    outputs at padded positions are computed like the others, rather than 0.

    Subclasses of nn.MultiheadAttention are kept as they are, because their forward is their own.

    Returns what was swapped; warns if that is nothing.
    """
    report = Conversion()
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiHeadAttention
            module.backend = "auto"
            module._qkv_same_embed_dim = False
            report.swapped.append(name)
        elif isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiHeadAttention):
            report.kept[name] = f"{type(module).__name__} is a subclass with a forward of its own"
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and _contains_converted(module):
            module.use_nested_tensor = False
            report.unnested.append(name)
    if not report.swapped:
        warnings.warn(
            f"fastattn.convert found no nn.MultiheadAttention to swap in {type(model).__name__}",
            RuntimeWarning,
            stacklevel=2,
        )
    return report


def _contains_converted(module: nn.Module) -> bool:
    return any(isinstance(child, MultiHeadAttention) for child in module.modules())
