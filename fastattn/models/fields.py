"""Checking the fields of a configuration: each has the type of its annotation, each number lies in its range."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``, both included unless said otherwise; NaN and infinities lie in none."""

    least: float
    most: float
    without_least: bool = False
    without_most: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.least if self.without_least else value >= self.least
        below = value < self.most if self.without_most else value <= self.most
        return above and below and abs(value) <= sys.float_info.max

    def __str__(self) -> str:
        least = f"{'above' if self.without_least else 'at least'} {self.least}"
        if math.isinf(self.most):
            return f"{least} and finite"
        return f"{least} and {'below' if self.without_most else 'at most'} {self.most}"


#: Types of fields.  The ranges are wide: they keep out what can only be a slip, and what no machine could hold.
Size = Annotated[int, Range(1, 1 << 24)]
Layers = Annotated[int, Range(1, 1000)]
Token = Annotated[int, Range(0, 1 << 24)]
#: A share that may not be all: of what dropout drops, for example.
SHARE = Range(0, 1, without_most=True)
Share = Annotated[float, SHARE]


def check_fields(config: Any) -> None:
    """Raise unless every field of a dataclass is what its annotation says.

    Raises:
        TypeError: one has another type; a bool is no number.
        ValueError: a number lies outside its range.
    """
    hints = _hints(type(config))
    for field in fields(config):
        check_value(field.name, getattr(config, field.name), hints[field.name])


def check_value(name: str, value: Any, hint: Any) -> None:
    """:func:`check_fields` of one value."""
    if get_origin(hint) in (Union, types.UnionType):  # "or None"
        if value is None:
            return
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise TypeError(f"{name} must be a sequence of at least one, got {shown(value)}")
        for i, part in enumerate(value):
            check_value(f"{name}[{i}]", part, get_args(hint)[0])
        return
    kind, allowed = (get_args(hint)[0], get_args(hint)[1]) if get_origin(hint) is Annotated else (hint, None)
    if not is_a(value, kind):
        wanted = {int: "an int", float: "a number"}.get(kind, f"a {kind.__name__}")
        raise TypeError(f"{name} must be {wanted}, got {shown(value)}")
    if allowed is not None and not allowed.holds(value):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")


def is_a(value: Any, kind: type) -> bool:
    """Is it of this type?  An int is a float too, a bool is no number."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else kind)


def shown(value: Any, most: int = 60) -> str:
    """A value in an error: its beginning, where it is long."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an int of {value.bit_length()} bits"  # Python refuses to write out the longest
    if isinstance(value, list) and len(value) < 9 and not any(isinstance(part, (list, dict)) for part in value):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"  # may be deep
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
