"""Tile shapes and switches of the Hopper kernels, as data."""

import dataclasses
from dataclasses import dataclass

#: The columns that a tile can have: powers of two, as Triton takes them.
TILE_COLUMNS = (64, 128, 256)


def tile_columns(head_dim: int) -> int:
    """The columns of the tiles for a head dimension of up to 256.

    TMA fills the columns past the head dimension with zeros, which add nothing to any product, and stores none of
    them: D = 96 and 192 pay for 128 and 256.
    """
    return next(columns for columns in TILE_COLUMNS if columns >= head_dim)


def keys_of_program(head_dim: int) -> int:
    """Keys for which a program of the backward accumulates dK and dV in registers."""
    return 64 if tile_columns(head_dim) == 256 else 128


@dataclass(frozen=True)
class ForwardConfig:
    """One way to run the forward kernel.

    ``consumers`` warpgroups of 64 queries each (2 or 3); tiles of ``block_n`` keys in a ring of ``stages``.
    The switches: ``ping_pong`` lets one warpgroup at a time issue its products; ``overlap`` keeps P V of the
    previous tile in flight under the softmax; ``maxima_first`` keeps the compiler from starting the exponentials of a
    thread's first row before it has the maximum of its second; ``persistent`` launches one program per multiprocessor;
    ``heads_inner`` deals tiles longest first over the heads that fit in L2 (None: for causal bands);
    ``own_out`` stages the output in its own shared memory, so that the next tile's queries arrive meanwhile.
    """

    consumers: int = 2
    block_n: int = 128
    stages: int = 2
    ping_pong: bool = True
    overlap: bool = True
    maxima_first: bool = False
    persistent: bool = True
    heads_inner: bool | None = None
    own_out: bool = True

    @property
    def registers(self) -> int:
        """Registers per consumer thread after setmaxnreg."""
        return 240 if self.consumers == 2 else 160

    @property
    def entry_registers(self) -> int:
        """Registers per thread at launch: 65536 over 12 or 16 warps (a partition of one warp takes four)."""
        return 168 if self.consumers == 2 else 128

    @property
    def most_registers(self) -> int:
        """Registers per thread of the first consumer, to which Triton gives what the others leave."""
        others = self.registers * (self.consumers - 1) + 24
        return self.entry_registers * (self.consumers + 1) - others


#: How the fused backward's programs go through keys, and each through its queries: see backward_fused.py.
WALKS = ("first keys first", "last keys first", "shifted")


@dataclass(frozen=True)
class BackwardConfig:
    """One way to run the backward kernels.

    dK and dV: :func:`keys_of_program` keys per program, tiles of ``block_m`` queries in a ring of ``keys_stages``.  dQ:
    128 queries per program, tiles of ``block_n`` keys in a ring of ``queries_stages``.  The switches as in
    :class:`ForwardConfig`.

    ``fused`` computes dQ in the sweep for dK and dV, adding its parts across programs: in a fixed order with
    ``ordered``, else in any, which makes the last bits of dQ change from run to run (never under
    ``torch.use_deterministic_algorithms``).  ``walk``, one of WALKS, is the way of its programs through keys and
    queries (backward_fused.py); "shifted" has no fixed order.  ``writers`` warps (1 or 2) add the parts, which wait in
    a ring of ``dq_stages``.  About ``programs_of_head`` programs of a head run at a time (0: as many as it takes for
    the heads in flight to fit in L2).
    """

    block_m: int = 64
    keys_stages: int = 2
    block_n: int = 64
    queries_stages: int = 2
    persistent: bool = True
    heads_inner: bool | None = None
    keys_own_out: bool = True
    queries_own_out: bool = True
    fused: bool = False
    ordered: bool = True
    walk: str = "first keys first"
    writers: int = 1
    dq_stages: int = 2
    programs_of_head: int = 0

    def __post_init__(self):
        if self.walk not in WALKS:
            raise ValueError(f"walk is one of {WALKS}, not {self.walk!r}")
        if self.ordered and self.walk == "shifted":
            raise ValueError("programs that walk shifted would wait for later ones: they take ordered=False")
        if not 1 <= self.writers <= min(2, self.dq_stages):
            raise ValueError(f"writers is 1 or 2, at most dq_stages = {self.dq_stages}, not {self.writers}")

    def deterministic(self) -> "BackwardConfig":
        """The same with a fixed order of additions."""
        walk = "first keys first" if self.walk == "shifted" else self.walk
        return dataclasses.replace(self, ordered=True, walk=walk)

    @property
    def entry_registers(self) -> int:
        """Registers per thread at launch: 65536 over 12 warps."""
        return 168

    @property
    def most_registers(self) -> int:
        """Registers per consumer thread after setmaxnreg."""
        return 240


#: (columns of a tile, causal band or window) -> configuration, chosen by prediction (README.md), compiled for sm_90.
FORWARD = {
    (64, False): ForwardConfig(consumers=3, stages=3, maxima_first=True),
    (64, True): ForwardConfig(consumers=3, stages=3, maxima_first=True),
    (128, False): ForwardConfig(),
    (128, True): ForwardConfig(),
    (256, False): ForwardConfig(block_n=64, own_out=False),
    (256, True): ForwardConfig(block_n=64, own_out=False),
}

#: What ``python -m benchmarks.gpu`` ranks, by columns of a tile.
FORWARD_CANDIDATES = {
    64: {
        "128x128": ForwardConfig(stages=3, maxima_first=True),
        "128x128 4 stages": ForwardConfig(stages=4),
        "192x128": FORWARD[64, False],
        "192x128 4 stages": ForwardConfig(consumers=3, stages=4, maxima_first=True),
        "192x128 rows as they come": ForwardConfig(consumers=3, stages=3),
        "192x128 no ping-pong": ForwardConfig(consumers=3, stages=3, ping_pong=False, maxima_first=True),
        "192x64": ForwardConfig(consumers=3, block_n=64, stages=4, maxima_first=True),
        "128x128 one tile per program": ForwardConfig(stages=3, persistent=False),
        "128x128 no ping-pong": ForwardConfig(stages=3, ping_pong=False),
        "128x128 no overlap": ForwardConfig(stages=3, overlap=False),
    },
    128: {
        "128x128": ForwardConfig(),
        "128x128 no ping-pong": ForwardConfig(ping_pong=False),
        "128x128 no overlap": ForwardConfig(overlap=False),
        "128x128 maxima first": ForwardConfig(maxima_first=True),
        "128x128 one tile per program": ForwardConfig(persistent=False),
        "128x128 heads outer": ForwardConfig(heads_inner=False),
        "128x128 heads inner": ForwardConfig(heads_inner=True),
        "128x128 shared output": ForwardConfig(own_out=False),
        "128x64": ForwardConfig(block_n=64, stages=4),
        "128x128 3 stages shared output": ForwardConfig(stages=3, own_out=False),
        "192x64": ForwardConfig(consumers=3, block_n=64, stages=3),
        "192x64 4 stages": ForwardConfig(consumers=3, block_n=64, stages=4),
        "192x64 4 stages shared output": ForwardConfig(consumers=3, block_n=64, stages=4, own_out=False),
    },
    256: {
        "128x64": ForwardConfig(block_n=64, own_out=False),
        "128x64 no ping-pong": ForwardConfig(block_n=64, own_out=False, ping_pong=False),
        "128x32 4 stages": ForwardConfig(block_n=32, stages=4, own_out=False),
    },
}


def forward_config(head_dim: int, banded: bool) -> ForwardConfig:
    """The configuration for a head dimension, with or without a right or left bound to the band."""
    return FORWARD[tile_columns(head_dim), banded]


#: (columns of a tile, causal band or window) -> configuration.
BACKWARD = {
    (64, False): BackwardConfig(block_m=64, keys_stages=3, block_n=128, queries_stages=3),
    (64, True): BackwardConfig(block_m=64, keys_stages=3, block_n=128, queries_stages=3),
    (128, False): BackwardConfig(block_n=128, fused=True),
    (128, True): BackwardConfig(block_n=128, fused=True),
    (256, False): BackwardConfig(block_m=64, block_n=32, queries_stages=3, queries_own_out=False),
    (256, True): BackwardConfig(block_m=64, block_n=32, queries_stages=3, queries_own_out=False),
}

#: Cycles at D = 128 by cycle_model.py: of 64 queries and 128 keys for all gradients or for dK and dV, and of 128
#: queries and 128 keys for dQ.
STEP_CYCLES = {"fused": 3049, "keys": 2048, "queries": 3085}
#: By whether there is a causal band or window: how much longer a turn of the fused backward takes than STEP_CYCLES says
#: (what its waits cost), and from how many queries on it may be chosen.  To be set from a measurement of both.
FUSED_STALLS = {False: 1.0, True: 1.0}
FUSED_FROM = {False: 0, True: 0}


def fused_variants(base: BackwardConfig) -> dict[str, BackwardConfig]:
    """The ways to add dQ across programs that one run decides between."""
    changes = {
        "unordered": {"ordered": False},
        "unordered, shifted": {"ordered": False, "walk": "shifted"},
        "4 of a head": {"programs_of_head": 4},
        "12 of a head": {"programs_of_head": 12},
        "two writers": {"writers": 2},
        "two writers, 4 of a head": {"writers": 2, "programs_of_head": 4},
        "last keys first": {"walk": "last keys first"},
        "last keys first, two writers": {"walk": "last keys first", "writers": 2},
    }
    return {f"fused, {name}": dataclasses.replace(base, fused=True, **change) for name, change in changes.items()}


BACKWARD_CANDIDATES = {
    64: {
        "64, 128": BACKWARD[64, False],
        "128, 128": BackwardConfig(block_m=128, keys_stages=2, block_n=128, queries_stages=3),
        "64, 64": BackwardConfig(block_m=64, keys_stages=4, block_n=64, queries_stages=4),
        "fused": BackwardConfig(keys_stages=3, fused=True),
        **fused_variants(BackwardConfig(keys_stages=3)),
        "fused, two writers, 4 of a head, 4 stages": BackwardConfig(
            keys_stages=3, fused=True, writers=2, dq_stages=4, programs_of_head=4
        ),
        "64, 128, one tile per program": BackwardConfig(
            block_m=64, keys_stages=3, block_n=128, queries_stages=3, persistent=False
        ),
    },
    128: {
        "fused": BACKWARD[128, False],
        **fused_variants(BACKWARD[128, False]),
        "64, 128": BackwardConfig(block_n=128),
        "64, 64": BackwardConfig(block_n=64),
        "64, 64, three stages": BackwardConfig(
            block_m=64, block_n=64, keys_stages=3, keys_own_out=False, queries_stages=3
        ),
        "64, 128, shared output": BackwardConfig(block_n=128, keys_own_out=False, queries_own_out=False),
        "64, 128, one tile per program": BackwardConfig(block_n=128, persistent=False),
    },
    256: {
        "64, 32": BACKWARD[256, False],
        "32, 32": BackwardConfig(block_m=32, keys_stages=4, block_n=32, queries_stages=3, queries_own_out=False),
    },
}


def backward_config(head_dim: int, banded: bool) -> BackwardConfig:
    """The configuration for a head dimension, with or without a right or left bound to the band."""
    return BACKWARD[tile_columns(head_dim), banded]
