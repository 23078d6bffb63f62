"""The numbers of a launch, computed from a problem without touching a device."""

import math
from dataclasses import dataclass

from .configs import FUSED_FROM, FUSED_STALLS, STEP_CYCLES, keys_of_program, tile_columns

LOG2_E = 1.4426950408889634
#: K and V of the heads in flight at one time should stay in this much of the 50 MB L2.
L2_BYTES = 32 << 20
#: Row statistics of the backward are padded to a multiple of every tile of queries.
STATISTICS_ROWS = 128


@dataclass(frozen=True)
class Band:
    """The keys [p - left, p + right] around a query's position p; an open side has its flag False."""

    left: int
    right: int
    has_left: bool
    has_right: bool
    lower_right: bool


@dataclass(frozen=True)
class ForwardOptions:
    """What the forward kernel is compiled for: the band's kind, the tile shape and the switches of ForwardConfig.

    Here and below ``head_dim`` counts a tile's columns, of which TMA fills those past the problem's with zeros.
    """

    head_dim: int
    has_left: bool
    has_right: bool
    lower_right: bool
    key_lengths: bool
    consumers: int
    block_n: int
    stages: int
    ping_pong: bool
    overlap: bool
    maxima_first: bool
    heads_inner: bool
    own_out: bool
    registers: int


@dataclass(frozen=True)
class KeysOptions:
    """What the kernel for the gradients of keys and values is compiled for."""

    head_dim: int
    has_left: bool
    has_right: bool
    lower_right: bool
    key_lengths: bool
    block_m: int
    stages: int
    heads_inner: bool
    own_out: bool


@dataclass(frozen=True)
class QueriesOptions:
    """What the kernel for the gradients of queries is compiled for."""

    head_dim: int
    has_left: bool
    has_right: bool
    lower_right: bool
    key_lengths: bool
    block_n: int
    stages: int
    heads_inner: bool
    own_out: bool


@dataclass(frozen=True)
class FusedOptions:
    """What the kernel for all gradients at once is compiled for: the band's kind, the tile shape, and which way its
    programs walk and add (:mod:`.backward_fused`)."""

    head_dim: int
    has_left: bool
    has_right: bool
    lower_right: bool
    key_lengths: bool
    block_m: int
    stages: int
    dq_stages: int
    writers: int
    ordered: bool
    last_keys_first: bool
    from_last_query: bool
    shifted: bool


@dataclass(frozen=True)
class Plan:
    """A launch: run-time numbers by the names of the kernel's arguments, and its compile-time OPTIONS."""

    programs: int
    scalars: dict
    options: object

    def named(self) -> dict:
        """The kernel's arguments that this holds."""
        return {**self.scalars, "OPTIONS": self.options}


def band_of(problem) -> Band:
    """Causality and window as one band.  Bounds wider than the score matrix are open."""
    widest = problem.query.shape[2] + problem.key.shape[2]
    left, right = problem.window_left, problem.window_right
    if problem.causal:
        right = 0 if right is None else min(right, 0)
    has_left = left is not None and left < widest
    has_right = right is not None and right < widest
    return Band(
        left if has_left else 0, right if has_right else 0, has_left, has_right, problem.causal == "lower_right"
    )


def seen_keys(problem, band: Band) -> slice | None:
    """The keys outside of which none is seen, whatever the key lengths; at least one; None if those are all keys.

    With lower_right, a left bound and key lengths, low would be one for each batch entry: :func:`.capability.reasons`
    refuses them.
    """
    Lq, Lk = problem.query.shape[2], problem.key.shape[2]
    offset = Lk - Lq if band.lower_right else 0
    low = max(0, offset - band.left) if band.has_left else 0
    high = min(Lk, Lq + offset + band.right) if band.has_right else Lk
    return None if high - low == Lk else slice(low, high)


def without_unseen(problem, seen: slice | None):
    """The problem without the keys and values that no query sees, as :func:`seen_keys` tells.

    A tile's product adds 0 * NaN = NaN for a key of probability 0. Outside the tensor TMA reads zeros, and
    lower_right finds its offset again, as both ends of the keys move together.
    """
    if seen is None:
        return problem
    return problem._replace(key=problem.key[:, :, seen], value=problem.value[:, :, seen])


def heads_in_l2(problem) -> int:
    """Query heads whose keys and values fit in L2 together."""
    key = problem.key
    one = 2 * key.shape[2] * key.shape[3] * key.element_size()
    return max(1, L2_BYTES // max(one, 1)) * problem.group_size


def key_heads_in_l2(problem) -> int:
    """Key heads whose queries, dO and dQ (fp32) fit in L2 together."""
    Lq, D = problem.query.shape[2:]
    one = problem.group_size * Lq * D * (2 * problem.query.element_size() + 4)
    return max(1, L2_BYTES // max(one, 1))


def forward_plan(problem, band: Band, config, multiprocessors: int) -> Plan:
    """Arguments of :func:`fastattn.kernels.hopper.forward.attention_forward` but tensors and descriptors."""
    batch, heads, Lq, D = problem.query.shape
    Lk = problem.key.shape[2]
    blocks = math.ceil(Lq / (64 * config.consumers))
    total = blocks * batch * heads
    scalars = {
        "scale": problem.scale * LOG2_E,
        "Lq": Lq,
        "Lk": Lk,
        "left": band.left,
        "right": band.right,
        "Hq": heads,
        "group": problem.group_size,
        "blocks": blocks,
        "heads": batch * heads,
        "section": min(heads_in_l2(problem), batch * heads),
    }
    options = ForwardOptions(
        head_dim=tile_columns(D),
        has_left=band.has_left,
        has_right=band.has_right,
        lower_right=band.lower_right,
        key_lengths=problem.key_lengths is not None,
        consumers=config.consumers,
        block_n=config.block_n,
        stages=config.stages,
        ping_pong=config.ping_pong,
        overlap=config.overlap,
        maxima_first=config.maxima_first,
        heads_inner=band.has_right if config.heads_inner is None else config.heads_inner,
        own_out=config.own_out,
        registers=config.registers,
    )
    return Plan(min(total, multiprocessors) if config.persistent else total, scalars, options)


def _backward_plan(problem, band: Band, config, multiprocessors: int, blocks: int, heads: int, options, extra) -> Plan:
    """A launch over ``blocks`` tiles of each of ``heads`` heads."""
    batch = problem.query.shape[0]
    total = blocks * batch * heads
    scalars = {
        "scale": problem.scale,
        "scale_log2": problem.scale * LOG2_E,
        "Lq": problem.query.shape[2],
        "Lk": problem.key.shape[2],
        "left": band.left,
        "right": band.right,
        "group": problem.group_size,
        "blocks": blocks,
        "heads": batch * heads,
        "section": min(heads_in_l2(problem), batch * heads),
        **extra,
    }
    return Plan(min(total, multiprocessors) if config.persistent else total, scalars, options)


def _band_options(problem, band: Band, config) -> dict:
    return {
        "head_dim": tile_columns(problem.query.shape[3]),
        "has_left": band.has_left,
        "has_right": band.has_right,
        "lower_right": band.lower_right,
        "key_lengths": problem.key_lengths is not None,
        "heads_inner": band.has_right if config.heads_inner is None else config.heads_inner,
    }


def keys_plan(problem, band: Band, config, multiprocessors: int) -> Plan:
    """Arguments of :func:`.backward_keys.gradients_of_keys`, or of the wide one, but tensors and descriptors."""
    options = KeysOptions(
        block_m=config.block_m,
        stages=config.keys_stages,
        own_out=config.keys_own_out,
        **_band_options(problem, band, config),
    )
    heads, Lk, D = problem.key.shape[1:]
    blocks = math.ceil(Lk / keys_of_program(D))
    return _backward_plan(problem, band, config, multiprocessors, blocks, heads, options, {"Hkv": heads})


def fused_is_faster(problem, band: Band, multiprocessors: int) -> bool:
    """Whether one sweep for all gradients ends before a sweep for dK and dV and then one for dQ.

    By cycles it is, but where few key heads leave multiprocessors idle that the sweep for dQ, with its programs for
    every query head, would use.  FUSED_STALLS and FUSED_FROM hold what was measured of it.
    """
    batch, heads, Lq, _ = problem.query.shape
    banded = band.has_left or band.has_right
    if Lq < FUSED_FROM[banded]:
        return False
    key_heads, Lk = problem.key.shape[1:3]
    key_blocks, query_blocks = math.ceil(Lk / 128), math.ceil(Lq / 128)
    key_rounds = math.ceil(batch * key_heads * key_blocks / multiprocessors)
    query_rounds = math.ceil(batch * heads * query_blocks / multiprocessors)
    more_per_step = STEP_CYCLES["fused"] * FUSED_STALLS[banded] - STEP_CYCLES["keys"]
    steps = problem.group_size * math.ceil(Lq / 64)
    return key_rounds * steps * more_per_step <= query_rounds * key_blocks * STEP_CYCLES["queries"]


def fused_section(problem, config, multiprocessors: int) -> int:
    """Key heads of which the same block of keys comes one after the other."""
    heads = problem.key.shape[0] * problem.key.shape[1]
    at_a_time = config.programs_of_head
    return min(heads, math.ceil(multiprocessors / at_a_time) if at_a_time else key_heads_in_l2(problem))


def fused_plan(problem, band: Band, config, multiprocessors: int) -> Plan:
    """Arguments of :func:`.backward_fused.gradients` but tensors and descriptors."""
    batch, heads = problem.key.shape[:2]
    options = FusedOptions(
        head_dim=tile_columns(problem.query.shape[3]),
        has_left=band.has_left,
        has_right=band.has_right,
        lower_right=band.lower_right,
        key_lengths=problem.key_lengths is not None,
        block_m=config.block_m,
        stages=config.keys_stages,
        dq_stages=config.dq_stages,
        writers=config.writers,
        ordered=config.ordered,
        last_keys_first=config.walk == "last keys first",
        from_last_query=config.walk == "first keys first",
        shifted=config.walk == "shifted",
    )
    blocks = math.ceil(problem.key.shape[2] / 128)
    scalars = {
        "scale": problem.scale,
        "scale_log2": problem.scale * LOG2_E,
        "Lq": problem.query.shape[2],
        "Lk": problem.key.shape[2],
        "left": band.left,
        "right": band.right,
        "Hkv": heads,
        "group": problem.group_size,
        "blocks": blocks,
        "heads": batch * heads,
        "section": fused_section(problem, config, multiprocessors),
    }
    return Plan(blocks * batch * heads, scalars, options)


def queries_plan(problem, band: Band, config, multiprocessors: int) -> Plan:
    """Arguments of :func:`.backward_queries.gradients_of_queries` but tensors and descriptors."""
    options = QueriesOptions(
        block_n=config.block_n,
        stages=config.queries_stages,
        own_out=config.queries_own_out,
        **_band_options(problem, band, config),
    )
    heads, rows = problem.query.shape[1:3]
    extra = {"Hq": heads, "padded": math.ceil(rows / STATISTICS_ROWS) * STATISTICS_ROWS}
    return _backward_plan(problem, band, config, multiprocessors, math.ceil(rows / 128), heads, options, extra)
