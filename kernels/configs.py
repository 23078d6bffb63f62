"""Tile shapes as data: per kernel, padded head dimension, element size and architecture, each with its origin.

No autotuning at run time: a first call would be slow and results could vary.  ``python -m benchmarks.gpu tune`` ranks
the candidates on a device; what it finds is written here.
"""

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel: its tile, warps and pipeline stages, and whether tiles come by TMA.

    ``chunk``: how many head dimensions a product of rows takes at a time; None for all.  Without tensor cores
    (float32) a thread needs both operands in registers.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    chunk: int | None = None
    origin: str = "compiled only"


#: (kernel, bytes per element, largest padded head dimension): {least architecture: configuration}. Those for 80 fit
#: the 99 KiB of shared memory of capability 8.6 and 8.9.
#: Looked up by the smallest head dimension that holds the problem's, and the newest architecture not above its.
TABLE: dict[tuple[str, int, int], dict[int, Config]] = {
    ("forward", 2, 64): {80: Config(128, 64, 4, 3), 90: Config(128, 128, 8, 3, tma=True)},
    ("forward", 2, 128): {80: Config(128, 64, 8, 2), 90: Config(128, 128, 8, 2, tma=True)},
    ("forward", 2, 256): {80: Config(64, 32, 8, 2), 90: Config(128, 64, 8, 2, tma=True)},
    ("forward", 2, 512): {80: Config(32, 16, 8, 2), 90: Config(64, 16, 8, 2)},
    ("forward", 4, 64): {80: Config(64, 32, 8, 2)},
    ("forward", 4, 128): {80: Config(32, 32, 8, 1)},
    ("forward", 4, 256): {80: Config(32, 16, 8, 2)},
    ("forward", 4, 512): {80: Config(16, 16, 8, 1)},
    ("grad_key_value", 2, 64): {80: Config(64, 128, 8, 2), 90: Config(64, 128, 8, 2)},
    ("grad_key_value", 2, 128): {80: Config(32, 64, 4, 2), 90: Config(64, 128, 8, 2)},
    ("grad_key_value", 2, 256): {80: Config(16, 64, 8, 1), 90: Config(32, 32, 8, 2)},
    ("grad_key_value", 2, 512): {80: Config(16, 16, 8, 1)},
    ("grad_key_value", 4, 64): {80: Config(32, 32, 8, 1)},
    ("grad_key_value", 4, 128): {80: Config(16, 32, 8, 1)},
    ("grad_key_value", 4, 256): {80: Config(16, 16, 8, 1)},
    ("grad_key_value", 4, 512): {80: Config(16, 8, 8, 1)},
    ("grad_query", 2, 64): {80: Config(128, 64, 8, 2), 90: Config(128, 64, 8, 3)},
    ("grad_query", 2, 128): {80: Config(64, 32, 4, 2), 90: Config(128, 64, 8, 2)},
    ("grad_query", 2, 256): {80: Config(32, 32, 4, 1), 90: Config(64, 32, 8, 2)},
    ("grad_query", 2, 512): {80: Config(16, 16, 8, 1)},
    ("grad_query", 4, 64): {80: Config(32, 32, 4, 1, chunk=32)},
    ("grad_query", 4, 128): {80: Config(32, 32, 8, 1, chunk=32)},
    ("grad_query", 4, 256): {80: Config(16, 32, 8, 1, chunk=32)},
    ("grad_query", 4, 512): {80: Config(8, 16, 8, 1, chunk=32)},
    ("grad_bias", 2, 64): {80: Config(64, 64, 4, 1)},
    ("grad_bias", 2, 128): {80: Config(64, 64, 8, 1)},
    ("grad_bias", 2, 256): {80: Config(32, 32, 8, 1)},
    ("grad_bias", 2, 512): {80: Config(16, 16, 8, 1)},
    ("grad_bias", 4, 64): {80: Config(32, 32, 4, 1, chunk=32)},
    ("grad_bias", 4, 128): {80: Config(32, 32, 8, 1, chunk=32)},
    ("grad_bias", 4, 256): {80: Config(16, 16, 8, 1, chunk=32)},
    ("grad_bias", 4, 512): {80: Config(16, 16, 8, 1, chunk=32)},
    ("weights", 2, 128): {80: Config(64, 64, 4, 2)},
    ("weights", 2, 512): {80: Config(32, 32, 4, 1)},
    ("weights", 4, 128): {80: Config(32, 32, 4, 1)},
    ("weights", 4, 512): {80: Config(16, 16, 4, 1)},
    ("decode", 2, 128): {80: Config(16, 64, 4, 3)},
    ("decode", 2, 512): {80: Config(16, 32, 4, 2)},
    ("decode", 4, 128): {80: Config(16, 32, 4, 2)},
    ("decode", 4, 512): {80: Config(16, 16, 4, 1)},
}

#: What takes their place in calls with a mask, a bias or dropout: looking at every element takes registers, and the
#: tiles of a mask and a bias that are loaded ahead take shared memory, twice where a band has loops of its own.
ELEMENTWISE: dict[tuple[str, int, int], dict[int, Config]] = {
    ("forward", 2, 64): {80: Config(128, 32, 8, 2), 90: Config(128, 64, 8, 3, tma=True)},
    ("forward", 2, 128): {80: Config(64, 64, 8, 2), 90: Config(128, 64, 8, 2, tma=True)},
    ("forward", 2, 256): {90: Config(64, 32, 8, 2, tma=True)},
    ("forward", 4, 256): {80: Config(32, 16, 8, 1)},
    ("grad_key_value", 2, 64): {80: Config(32, 32, 4, 2)},
    ("grad_key_value", 2, 128): {80: Config(32, 64, 8, 2), 90: Config(32, 128, 8, 3), 100: Config(64, 128, 8, 2)},
    ("grad_query", 2, 128): {100: Config(128, 32, 8, 2)},
    ("grad_query", 2, 256): {100: Config(64, 32, 8, 1)},
}

#: The same where Triton is newer than 3.6: its compiler keeps other values in registers and would spill.
NEWER: dict[tuple[str, int, int], dict[int, Config]] = {
    ("grad_key_value", 2, 128): {90: Config(32, 128, 8, 3), 100: Config(64, 128, 8, 2)},
    ("decode", 2, 128): {90: Config(16, 64, 8, 3)},
}

#: What ``python -m benchmarks.gpu tune`` ranks beside the chosen configuration, for 2-byte elements on Hopper.
CANDIDATES: dict[tuple[str, int], tuple[Config, ...]] = {
    ("forward", 64): (
        Config(128, 64, 4, 3),
        Config(128, 128, 4, 3),
        Config(128, 128, 8, 3),
        Config(128, 64, 4, 3, tma=True),
        Config(128, 128, 4, 3, tma=True),
        Config(128, 128, 8, 3, tma=True),
    ),
    ("forward", 128): (
        Config(128, 64, 4, 3),
        Config(128, 64, 8, 3),
        Config(128, 128, 8, 2),
        Config(128, 64, 8, 3, tma=True),
        Config(128, 128, 8, 2, tma=True),
        Config(128, 128, 8, 3, tma=True),
        Config(64, 128, 4, 3, tma=True),
    ),
    ("forward", 256): (
        Config(128, 64, 8, 2),
        Config(64, 64, 4, 2),
        Config(128, 64, 8, 2, tma=True),
        Config(128, 32, 8, 3, tma=True),
    ),
    ("grad_key_value", 64): (
        Config(64, 128, 8, 2),
        Config(64, 128, 4, 2),
        Config(128, 128, 8, 2),
        Config(64, 64, 4, 3),
        Config(64, 128, 8, 3, tma=True),
    ),
    ("grad_key_value", 128): (
        Config(64, 128, 8, 2),
        Config(64, 64, 4, 2),
        Config(32, 128, 8, 3),
        Config(64, 128, 8, 2, tma=True),
        Config(64, 64, 4, 2, tma=True),
        Config(128, 64, 8, 2),
    ),
    ("grad_key_value", 256): (Config(32, 64, 8, 2), Config(64, 64, 8, 1), Config(32, 128, 8, 1)),
    ("grad_query", 64): (
        Config(128, 64, 8, 3),
        Config(128, 128, 8, 2),
        Config(128, 64, 4, 3),
        Config(128, 64, 8, 3, tma=True),
        Config(128, 128, 8, 2, tma=True),
    ),
    ("grad_query", 128): (
        Config(128, 64, 8, 2),
        Config(128, 128, 8, 1),
        Config(64, 64, 4, 2),
        Config(128, 64, 8, 2, tma=True),
        Config(128, 64, 8, 3, tma=True),
        Config(64, 128, 4, 2, tma=True),
    ),
    ("grad_query", 256): (Config(64, 32, 8, 2), Config(64, 64, 8, 1), Config(128, 32, 8, 1)),
    ("decode", 128): (
        Config(16, 64, 4, 3),
        Config(16, 128, 4, 3),
        Config(16, 64, 2, 4),
        Config(16, 128, 8, 2),
        Config(16, 64, 4, 5),
    ),
}


def newer_triton() -> bool:
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) > (3, 6)


def choose(kernel: str, element_size: int, head_dim: int, architecture: int, elementwise: bool = False) -> Config:
    """The configuration for a padded head dimension (the larger of D and Dv) on an architecture (80, 90...).

    ``elementwise``: the call has a mask, a bias or dropout.
    Capability 12.x has the matrix instructions and the shared memory of 8.6, so it takes what 8.0 takes.
    """
    fitting = [d for name, size, d in TABLE if name == kernel and size == element_size and d >= head_dim]
    key = kernel, element_size, min(fitting)
    by_architecture = TABLE[key] | (NEWER.get(key, {}) if newer_triton() else {})
    if elementwise:
        by_architecture |= ELEMENTWISE.get(key, {})
    highest = 80 if architecture >= 120 else architecture
    return by_architecture[max(a for a in by_architecture if a <= max(highest, 80))]
