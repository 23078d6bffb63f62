"""Checks of single arguments: an error names the argument, what was given and what would be right."""

from __future__ import annotations

import math
from numbers import Integral, Real
from types import NoneType

import torch
from torch import Tensor
from torch.compiler import is_compiling

#: A window of this size is open: no sequence is so long, and sums of positions and windows stay far from 2^63.
OPEN_WINDOW = 1 << 60


def shown(value: object) -> str:
    """A wrong argument in few words: a tensor by its dtype, an int that no float holds by its size."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, int) and value.bit_length() > 1023:
        return f"an int of {value.bit_length()} bits"
    return repr(value)


def check_flag(name: str, flag: bool) -> None:
    """Raise TypeError for anything but a bool, as torch does: a word or a tensor would be taken for True."""
    if not isinstance(flag, (bool, torch.SymBool)):
        raise TypeError(f"{name} must be a bool, got {shown(flag)}")


def check_dense(name: str, tensor: Tensor, advice: str = "") -> None:
    """Raise TypeError for a sparse, nested or otherwise laid out tensor.

    A nested one may call itself strided; most that is asked of it is an internal error of torch's.
    """
    if tensor.is_nested or tensor.layout is not torch.strided:
        given = "a nested tensor" if tensor.is_nested else tensor.layout
        raise TypeError(
            f"{name} must be dense, of layout torch.strided, got {given}" + (advice if tensor.is_nested else "")
        )


def check_window(window: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    """(left, right), None where it is open."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right) of ints or None, got {shown(window)}")
    for side, size in zip(("left", "right"), window, strict=True):
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, (Integral, torch.SymInt)):
            raise TypeError(f"window's {side} must be an int or None (open), got {shown(size)}")
        if size < 0:
            raise ValueError(f"window's {side} must be at least 0, or None for open, got {shown(size)}")
    window = (size if isinstance(size, (int, torch.SymInt, NoneType)) else int(size) for size in window)
    left, right = (None if size is None or size >= OPEN_WINDOW else size for size in window)
    return left, right


def check_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    dropout_p = _number(name, dropout_p, "a float")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name} must be at least 0 and at most 1, got {shown(dropout_p)}")
    return float(dropout_p)


def check_scale(scale: float) -> float:
    """A float; symbolic while it is traced, and then finite only if :func:`fastattn.problem.check_problem` says so."""
    scale = _number("scale", scale, "a float or None (1 / sqrt(head_dim))")
    if is_compiling() or isinstance(scale, (torch.SymInt, torch.SymFloat)):
        return scale * 1.0 if isinstance(scale, (int, torch.SymInt)) else scale
    try:
        number = float(scale)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"scale must be finite as a float, got {shown(scale)}")
    return number


def _number(name: str, value: object, right: str) -> float:
    """What torch takes for a float: a number of Python or numpy, a symbolic one, or a tensor without dimensions."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} must be {right}, got a tensor that requires a gradient, which {name} does not get: give "
            f"its detach()" + (", or multiply query by it" if name == "scale" else "")
        )
    numbers = (Real, torch.SymInt, torch.SymFloat)
    number = value if isinstance(value, numbers) or getattr(value, "shape", None) != () else value.item()
    if isinstance(number, bool) or not isinstance(number, numbers):
        raise TypeError(f"{name} must be {right}, got {shown(value)}")
    return number


def check_sequences(name: str, tensor: Tensor, features: int) -> None:
    """Raise TypeError or ValueError for anything but a floating tensor [batch, length, features]."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.dim() != 3 or tensor.shape[2] != features:
        raise ValueError(f"{name} must be [batch, length, {features}], got shape {list(tensor.shape)}")


def check_size(name: str, size: int) -> None:
    """Raise TypeError or ValueError for anything but an int of at least 1."""
    if isinstance(size, bool) or not isinstance(size, Integral):
        raise TypeError(f"{name} must be an int, got {shown(size)}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(size)}")


def check_module_sizes(embed_dim: int, num_heads: int, dropout: float) -> None:
    """What a multi-head attention module is made of."""
    for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        if not isinstance(size, Integral):
            raise TypeError(f"{name} must be an int, got {shown(size)}")
    if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads != 0:
        raise ValueError(
            f"embed_dim must be a positive multiple of num_heads, got embed_dim={embed_dim}, num_heads={num_heads}"
        )
    check_dropout(dropout, "dropout")
