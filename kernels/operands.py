"""What kernels take as one argument each: tensors with their strides, and what a launch is compiled for.

Triton takes named tuples of run-time values, and frozen dataclasses as compile-time constants.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor [B, H, L, D] whose last stride is 1."""

    data: object
    stride_b: int
    stride_h: int
    stride_l: int


class Scores(NamedTuple):
    """A mask or bias, broadcast to [B, Hq, Lq, Lk] by strides of 0."""

    data: object
    stride_b: int
    stride_h: int
    stride_m: int
    stride_n: int


class Dropout(NamedTuple):
    """``rng_state`` int64 [seed, offset]; ``threshold`` is floor(p * 2^32) - 2^31, ``keep_scale`` 1 / (1 - p)."""

    rng_state: object
    threshold: int
    keep_scale: float


class Sizes(NamedTuple):
    """Queries, keys, query heads, and query heads per key head."""

    Lq: int
    Lk: int
    heads: int
    group: int


class Band(NamedTuple):
    """Query ``i`` may attend to the keys [i + shift - left, i + shift + right] below n; an open side is 0 here."""

    left: int
    right: int
    n: int
    shift: int


class Tiles(NamedTuple):
    """The tiles that a block of queries (or keys) sees of the other side, as bounds in rows.

    Tiles from ``begin`` up to ``full_begin`` and from ``full_end`` up to ``end`` are borders; those between are seen
    whole by all of the block. All are multiples of the tile, but for ``low`` and ``end``: nothing below ``low`` or
    from ``end`` on is seen at all.
    """

    low: int
    begin: int
    full_begin: int
    full_end: int
    end: int


@dataclass(frozen=True)
class Options:
    """What a kernel is compiled for. ``block_d`` and ``block_dv`` are D and Dv padded to powers of two."""

    D: int
    DV: int
    block_d: int
    block_dv: int
    block_m: int
    block_n: int
    has_left: bool
    has_right: bool
    lower_right: bool
    positive_scale: bool
    precision: str
    chunk: int


@triton.jit
def head_of(x, b, h):
    """A pointer to one head [L, D] of :class:`Rows`."""
    return x.data + tl.cast(b, tl.int64) * x.stride_b + tl.cast(h, tl.int64) * x.stride_h
