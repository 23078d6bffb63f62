"""Swap the attention modules of an existing model: :func:`convert`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from torch import nn

from fastattn.modules import FusedPathGuard, MultiHeadAttention


@dataclass
class Conversion:
    """What :func:`convert` did.

    ``swapped`` holds the names of the modules that now are a :class:`MultiHeadAttention`, and ``kept`` those
    of other kinds of nn.MultiheadAttention with the reason.
    """

    swapped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} of {len(self.swapped) + len(self.kept)} attention modules"]
        lines += [f"  {name or '(the model)'}" for name in self.swapped]
        lines += [f"  kept {name or '(the model)'}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def convert(model: nn.Module) -> Conversion:
    """Make every nn.MultiheadAttention in ``model``, or the model itself, a :class:`MultiHeadAttention`, in place.

    The module objects stay the same and so do their parameters, buffers, hooks, training mode and
    names in the state dict: only their class changes. It can be undone by loading the state dict into a
    model that is not converted.

    In evaluation, the fused forward of nn.TransformerEncoderLayer no longer bypasses the modules. The nested
    tensors of nn.TransformerEncoder reach them as they are: padding costs nothing, and the outputs there are 0.

    Subclasses of nn.MultiheadAttention are kept as they are, because their forward is their own.

    Returns what was swapped; warns if that is nothing.
    """
    report = Conversion()
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiHeadAttention
            module.fused_path_guard = FusedPathGuard()
            report.swapped.append(name)
        elif isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiHeadAttention):
            report.kept[name] = f"{type(module).__name__} is a subclass with a forward of its own"
    if not report.swapped:
        warnings.warn(
            f"fastattn.convert found no nn.MultiheadAttention to swap in {type(model).__name__}",
            RuntimeWarning,
            stacklevel=2,
        )
    return report
