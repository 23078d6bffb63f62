"""The one description of an attention call that every backend receives.

:class:`Problem` holds the tensors in one canonical form (4-D, masks expanded to the full score
shape with stride 0 where they broadcast) and every mask ingredient as a field of its own.  It is
validated once, by :func:`make_problem`; backends trust it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.checks import check_dense, check_dropout, check_flag, check_scale, check_window
from fastattn.eager import PLAIN_TENSORS
from fastattn.fork import serial_after_fork
from fastattn.subclasses import causal_of, check_no_rules, is_causal_bias, materialized

#: ``Problem.causal`` values, in the order of the engines' enumeration (0 = none).
CAUSAL_MODES = (None, "upper_left", "lower_right")

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)

#: For those who come with sequences of different lengths in a nested tensor.
PAD_ADVICE = (
    ": pad it, torch.nested.to_padded_tensor(tensor, 0.0), and give each sequence's number of keys as key_lengths"
)


class Problem(NamedTuple):
    """A validated attention problem. csrc/bindings.cpp reads its fields in this order.

    Shapes: B batch, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv; query head ``h``
    reads key head ``h // (Hq // Hkv)``), Lq queries, Lk keys, D and Dv head dimensions.

    The band.  Causality, window and key lengths restrict query ``i`` of batch ``b`` to one
    contiguous range of keys.  With ``n = key_lengths[b]`` (else Lk) and the position
    ``pos = i + n - Lq`` for causal ``"lower_right"``, else ``pos = i``::

        first allowed key  lo = max(0, pos - left)                      (left None: 0)
        one past the last  hi = min(n, pos + 1 if causal else n, pos + right + 1)   (right None: n)

    ``attn_mask`` (bool, True = attend) and ``bias`` (added to the scaled score) act on top.  A bias
    of -inf forbids the key as a False does; a finite one, finfo.min included, never does.
    """

    query: Tensor  # [B, Hq, Lq, D], last stride 1
    key: Tensor  # [B, Hkv, Lk, D], last stride 1
    value: Tensor  # [B, Hkv, Lk, Dv], last stride 1
    scale: float
    causal: str | None = None  # one of CAUSAL_MODES
    window_left: int | None = None  # keys kept before the position, None = open
    window_right: int | None = None  # keys kept after the position, None = open
    key_lengths: Tensor | None = None  # int64 [B], contiguous, on query's device, 0..Lk
    attn_mask: Tensor | None = None  # bool [B, Hq, Lq, Lk], a stride-0 view where it broadcasts
    bias: Tensor | None = None  # float [B, Hq, Lq, Lk], likewise; query's dtype, or float32
    dropout_p: float = 0.0
    rng_state: Tensor | None = None  # int64 [2] = (seed, offset), on query's device; with dropout

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.query.shape[1] // max(1, self.key.shape[1])

    @property
    def lse_dtype(self) -> torch.dtype:
        """float64 for a float64 problem, else float32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


class Arguments(NamedTuple):
    """The arguments of a call, checked and in 4-D form, as the registered operators take them.

    Unlike in :class:`Problem`, masks keep size 1 where they broadcast, so that their gradient has
    that size too.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None  # bool [B|1, Hq|1, Lq|1, Lk|1]
    bias: Tensor | None  # float [B|1, Hq|1, Lq|1, Lk|1]
    key_lengths: Tensor | None  # int64 [B]
    scale: float | None
    causal: str | None
    window_left: int | None
    window_right: int | None
    dropout_p: float


def make_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_lengths: Tensor | list[int] | None = None,
    rng_state: Tensor | None = None,
) -> Problem:
    """Check the arguments of a call and describe it.

    The arguments are those of :func:`fastattn.scaled_dot_product_attention`; ``rng_state``, int64
    [2] = (seed, offset), is drawn from PyTorch's generator of the device where it is not given.

    Raises TypeError or ValueError, naming the argument, what was given and what would be right.
    """
    arguments = check_arguments(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal, window, key_lengths
    )
    if rng_state is None and arguments.dropout_p > 0.0:
        rng_state = draw_rng_state(query.device)
    problem = problem_from_arguments(*arguments, rng_state)
    check_problem(problem)
    return problem


def draw_rng_state(device: torch.device) -> Tensor:
    """(seed, offset), int64 [2], from PyTorch's generator of the device, without synchronising."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


@serial_after_fork
def problem_from_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
    causal: str | None,
    window_left: int | None,
    window_right: int | None,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Problem:
    """The problem of checked arguments: masks expanded, last strides 1.

    Key lengths on a GPU are clamped to 0..Lk, because checking them would wait for the device;
    those on a CPU have to pass :func:`check_problem` before anything is computed.
    """
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    score_shape = (batch, heads, queries, keys)
    if key_lengths is not None:
        key_lengths = (key_lengths if key_lengths.is_cpu else key_lengths.clamp(0, keys)).contiguous()
    return Problem(
        with_unit_last_stride(query),
        with_unit_last_stride(key),
        with_unit_last_stride(value),
        1.0 / math.sqrt(head_dim) if scale is None else scale,
        causal,
        window_left,
        window_right,
        key_lengths,
        None if attn_mask is None else attn_mask.expand(score_shape),
        None if bias is None else bias.expand(score_shape),
        dropout_p,
        rng_state,
    )


def check_problem(problem: Problem) -> None:
    """Raise ValueError where values would make an engine read past its tensors, or compute something else.

    Key lengths on a CPU are the caller's. The rest has passed :func:`check_arguments`, unless an operator was
    called by hand, or a hook of saved tensors returned others.
    """
    query, bias, rng_state = problem.query, problem.bias, problem.rng_state
    if problem.key_lengths is not None:
        check_length_values(problem)
    if problem.attn_mask is not None and problem.attn_mask.dtype is not torch.bool:
        raise ValueError(f"attn_mask of an operator must be bool, got {problem.attn_mask.dtype}")
    if bias is not None and bias.dtype not in (query.dtype, problem.lse_dtype):
        raise ValueError(f"bias of an operator must be float32 or query's dtype {query.dtype}, got {bias.dtype}")
    if problem.causal not in CAUSAL_MODES:
        raise ValueError(f"causal of an operator must be one of {CAUSAL_MODES}, got {problem.causal!r}")
    if not math.isfinite(problem.scale):
        raise ValueError(f"scale must be finite, got {problem.scale}")
    for size in (problem.window_left, problem.window_right):
        if size is not None and size < 0:
            raise ValueError(f"the window of an operator must be at least 0 or None, got {size}")
    if problem.dropout_p != 0.0:
        check_dropout(problem.dropout_p)
        if rng_state is None or rng_state.dtype is not torch.int64 or rng_state.shape != (2,):
            given = "None" if rng_state is None else f"{rng_state.dtype} {list(rng_state.shape)}"
            raise ValueError(f"rng_state of an operator that drops must be int64 [2], got {given}")


def check_length_values(problem: Problem) -> None:
    """Raise ValueError if key lengths are not int64, or one on the CPU is negative or beyond the keys."""
    if problem.key_lengths.dtype is not torch.int64:
        raise ValueError(f"key_lengths of an operator must be int64, got {problem.key_lengths.dtype}")
    if problem.key_lengths.is_cpu:
        _check_length_range(problem.key_lengths, problem.key.shape[2])


def _check_length_range(key_lengths: Tensor, keys: int) -> None:
    lengths = key_lengths.tolist()
    if lengths and (min(lengths) < 0 or max(lengths) > keys):
        raise ValueError(f"key_lengths must be between 0 and the number of keys {keys}, got {lengths}")


def bias_gradient_shape(bias: Tensor) -> tuple[int, ...]:
    """The shape in which backends reduce the gradient of ``Problem.bias``: 1 where its stride is 0."""
    return tuple(1 if stride == 0 else size for size, stride in zip(bias.shape, bias.stride(), strict=True))


@serial_after_fork
def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    causal: str | None,
    window: tuple[int | None, int | None] | None,
    key_lengths: Tensor | list[int] | None,
) -> Arguments:
    """Check everything that can be checked without reading data; bring the tensors to 4-D."""
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    has_heads = True
    if is_canonical(query, key, value, enable_gqa):
        batch_shape = (query.shape[0],)
    else:
        _check_tensors(query, key, value)
        has_heads = max(query.dim(), key.dim(), value.dim()) > 3
        query, key, value = _with_equal_ranks(query, key, value)
        batch_shape = _broadcast_batch(query, key, value)
        query, key, value = (_flatten_batch(tensor, batch_shape) for tensor in (query, key, value))
        query, key, value = map(_with_head_dim, _match_heads(query, key, value, enable_gqa))

    if is_causal:
        if causal is None:
            causal = "upper_left"
        elif causal != "upper_left":
            raise ValueError(
                f"is_causal=True means causal='upper_left', but causal={causal!r} was given: pass one of them"
            )
    if causal is not None and causal not in CAUSAL_MODES:
        raise ValueError(f"causal must be None, 'upper_left' or 'lower_right', got {causal!r}")
    window_left, window_right = (None, None) if window is None else check_window(window)
    if type(dropout_p) is not float or not 0.0 <= dropout_p <= 1.0:
        dropout_p = check_dropout(dropout_p)
    if scale is not None:
        scale = check_scale(scale)
    bias = None
    if attn_mask is not None:
        if is_causal_bias(attn_mask):
            attn_mask, causal = _split_causal_bias(attn_mask, query, key, causal, window, key_lengths)
        if attn_mask is not None:
            attn_mask, bias = _check_mask(attn_mask, query, key, batch_shape, has_heads)
    if key_lengths is not None:
        key_lengths = check_lengths(key_lengths, query, key.shape[2], batch_shape)
    return Arguments(
        query, key, value, attn_mask, bias, key_lengths, scale, causal, window_left, window_right, dropout_p
    )


def _split_causal_bias(
    mask: Tensor,
    query: Tensor,
    key: Tensor,
    causal: str | None,
    window: tuple[int | None, int | None] | None,
    key_lengths: Tensor | list[int] | None,
) -> tuple[Tensor | None, str | None]:
    """(mask, ``causal``) that mean the same; without a mask wherever ``causal`` alone does.

    A causal bias counts from the last key, ``causal="lower_right"`` from the last that ``key_lengths`` leaves, and a
    window from the position that ``causal`` gives a query.
    """
    meant = causal_of(mask, query.shape[2], key.shape[2])
    is_free = causal is None and (meant == "upper_left" or (window is None and key_lengths is None))
    if is_free or (causal == meant and (meant == "upper_left" or key_lengths is None)):
        return None, meant
    return materialized(mask, query.device), causal


def is_canonical(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """The common case, decided in little time: 4-D, equal batches, heads that fit, nothing to complain about."""
    if type(query) not in PLAIN_TENSORS or type(key) not in PLAIN_TENSORS or type(value) not in PLAIN_TENSORS:
        return False
    if query.is_nested or key.is_nested or value.is_nested:
        return False
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if not len(query_shape) == len(key_shape) == len(value_shape) == 4:
        return False
    batch, heads, _, head_dim = query_shape
    key_batch, key_heads, keys, key_dim = key_shape
    value_batch, value_heads, values, value_dim = value_shape
    dtype, device = query.dtype, query.device
    return (
        batch == key_batch == value_batch
        and key_heads == value_heads
        and (heads == key_heads or key_heads == 1 or (enable_gqa and key_heads > 0 and heads % key_heads == 0))
        and keys == values
        and head_dim == key_dim != 0 != value_dim
        and dtype in SUPPORTED_DTYPES
        and key.dtype == dtype == value.dtype
        and key.device == device == value.device
        and query.layout is key.layout is value.layout is torch.strided
    )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Types, ranks, dtypes, devices and the sizes that must agree whatever the rank."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor, PAD_ADVICE)
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} must be [..., heads, length, head_dim], [batch, length, head_dim] or "
                f"[length, head_dim], got shape {list(tensor.shape)}"
            )
    dtype, device = query.dtype, query.device
    if dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must have query's dtype {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on query's device {device}, got {tensor.device}")
    head_dim = query.shape[-1]
    if key.shape[-1] != head_dim:
        raise ValueError(f"key must have query's head_dim {head_dim} as its last size, got shape {list(key.shape)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value must have key's length {key.shape[-2]} as its second to last size, got shape {list(value.shape)}"
        )


def _with_equal_ranks(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes of 1 prepended up to the highest rank; a head dimension of 1 where there is none."""
    rank = max(query.dim(), key.dim(), value.dim())
    tensors = [t[(None,) * (rank - t.dim())] if t.dim() < rank else t for t in (query, key, value)]
    if rank < 4:
        tensors = [t.unsqueeze(-3) for t in tensors]
    if rank == 2:
        tensors = [t.unsqueeze(0) for t in tensors]
    return tuple(tensors)


def _broadcast_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The common sizes of the dimensions before the heads."""
    shapes = [tuple(tensor.shape[:-3]) for tensor in (query, key, value)]
    common = []
    for sizes in zip(*shapes, strict=True):
        wide = [size for size in sizes if size != 1]
        if any(size != wide[0] for size in wide):
            raise ValueError(
                "query, key and value must have batch sizes that are equal or 1, got "
                f"{list(shapes[0])}, {list(shapes[1])} and {list(shapes[2])}"
            )
        common.append(wide[0] if wide else 1)
    return tuple(common)


def _flatten_batch(tensor: Tensor, batch_shape: tuple[int, ...]) -> Tensor:
    """[*batch or 1s, H, L, D] -> [B, H, L, D], a view where strides permit."""
    if len(batch_shape) == 1 and tensor.shape[0] == batch_shape[0]:
        return tensor
    rest = tensor.shape[-3:]
    return tensor.expand(*batch_shape, *rest).reshape(math.prod(batch_shape), *rest)


def _match_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Heads made to fit: a single head broadcasts; groups of query heads need ``enable_gqa``."""
    heads, key_heads, value_heads = query.shape[1], key.shape[1], value.shape[1]
    if heads == key_heads == value_heads:
        return query, key, value
    if key_heads != value_heads:
        shared = enable_gqa and 0 not in (key_heads, value_heads)
        if 1 not in (key_heads, value_heads) and not (shared and heads % key_heads == heads % value_heads == 0):
            raise ValueError(
                f"value must have key's {key_heads} heads or 1, or with enable_gqa=True a number of heads that divides "
                f"query's {heads} as key's does, got {value_heads}"
            )
        key_heads = math.lcm(key_heads, value_heads)
        key, value = _with_heads(key, key_heads), _with_heads(value, key_heads)
    if heads == 1 and key_heads != 1:
        return query.expand(-1, key_heads, -1, -1), key, value
    if key_heads == 0 or heads % key_heads != 0:
        raise ValueError(
            f"query's heads must be a multiple of key's and value's heads, got {heads} query heads and "
            f"{key_heads} key heads"
        )
    if key_heads not in (1, heads) and not enable_gqa:
        raise ValueError(
            f"query has {heads} heads and key {key_heads}: pass enable_gqa=True to share each key head "
            f"among {heads // key_heads} query heads, or give as many key heads as query heads"
        )
    return query, key, value


def _with_heads(tensor: Tensor, heads: int) -> Tensor:
    """Each head as often as it takes to have so many; without a copy only where there is one."""
    given = tensor.shape[1]
    return tensor.expand(-1, heads, -1, -1) if given == 1 else tensor.repeat_interleave(heads // given, dim=1)


def _with_head_dim(tensor: Tensor) -> Tensor:
    """A column of zeros, which adds nothing to a score, where there is none: the engines need one."""
    return tensor if tensor.shape[3] != 0 else F.pad(tensor, (0, 1))


def _check_mask(
    attn_mask: Tensor, query: Tensor, key: Tensor, batch_shape: tuple[int, ...], has_heads: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(bool mask, bias): one of them, 4-D, sizes 1 where it broadcasts."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
    check_dense("attn_mask", attn_mask)
    check_no_rules("attn_mask", attn_mask)
    dtype = attn_mask.dtype
    if dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask must be bool (True = attend), float32 or query's dtype {query.dtype} (added to "
            f"the scores), got {dtype}"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on query's device {query.device}, got {attn_mask.device}")
    given = attn_mask.shape
    score_shape = (*batch_shape, query.shape[1], query.shape[2], key.shape[2])
    if not has_heads and attn_mask.dim() == 3:
        attn_mask = attn_mask.unsqueeze(1)  # [N, Lq, Lk] of a call on [N, L, D]
    rank = len(score_shape)
    mask_shape = (1,) * (rank - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(mask_shape) > rank or any(size not in (1, full) for size, full in zip(mask_shape, score_shape, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to the scores' shape {list(score_shape)} "
            f"(batch, heads, queries, keys), got {list(given)}"
        )
    if any(size != 1 for size in mask_shape[:-3]):
        attn_mask = _flatten_batch(attn_mask[(None,) * (rank - attn_mask.dim())], batch_shape)
    elif attn_mask.dim() != 4:
        attn_mask = attn_mask.reshape(1, *mask_shape[-3:])
    if dtype == torch.bool:
        return attn_mask, None
    if query.dtype == torch.float64:
        attn_mask = attn_mask.double()
    return None, attn_mask


def check_lengths(key_lengths: Tensor | list[int], query: Tensor, keys: int, batch_shape: tuple[int, ...]) -> Tensor:
    """int64 [B] on query's device. Values on a CPU are left to :func:`check_problem`."""
    if not isinstance(key_lengths, Tensor):
        try:
            key_lengths = torch.tensor(key_lengths, device="cpu")  # whatever the default device is
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"key_lengths must be an integer tensor or a list of ints, got {key_lengths!r}") from None
    check_dense("key_lengths", key_lengths)
    check_no_rules("key_lengths", key_lengths)
    if key_lengths.dtype not in INTEGER_DTYPES and key_lengths.numel() > 0:
        raise TypeError(f"key_lengths must be integers, got {key_lengths.dtype}")
    if tuple(key_lengths.shape) != tuple(batch_shape):
        raise ValueError(
            f"key_lengths must have one length per sequence, shape {list(batch_shape)}, got {list(key_lengths.shape)}"
        )
    if key_lengths.device.type == "meta" != query.device.type:
        raise ValueError(
            f"key_lengths must be on query's device {query.device} or on the CPU, got {key_lengths.device}"
        )
    if key_lengths.is_cpu and not query.is_cpu and not torch.compiler.is_compiling():
        _check_length_range(key_lengths.reshape(-1), keys)  # while looking at them costs nothing
    key_lengths = key_lengths.to(query.device, torch.int64)
    if len(batch_shape) == 1 and key_lengths.is_contiguous():
        return key_lengths
    return key_lengths.reshape(-1).contiguous()


def with_unit_last_stride(tensor: Tensor) -> Tensor:
    """The 4-D tensor as the engines read it: a copy only where its last stride is not 1."""
    return tensor if tensor.stride(3) == 1 else tensor.clone(memory_format=torch.contiguous_format)
