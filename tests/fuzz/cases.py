"""Random cases: a seed names one, on every machine."""

from __future__ import annotations

import random
from dataclasses import MISSING, dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import reference
from fastattn.problem import Problem
from fastattn.testing import LAYOUTS, MASK_SHAPES, Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: At and around the tiles and blocks of every instruction set.
EDGES = (31, 32, 33, 48, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193)
LONG = (250, 255, 256, 257, 260, 384)
#: Few queries take the path of decoding, whose keys lie in several chunks.
DECODED_KEYS = (255, 256, 257, 511, 512, 513, 700, 1100)
HEAD_DIMS = (8, 16, 32, 40, 64, 80, 96, 128)
#: The most scores of a case, so that the dense reference takes milliseconds.
MOST_SCORES = 150_000

#: What the biases are.
#:   normal      about 1
#:   forbidding  a fifth of them, and every third query's, -inf
#:   lowest      a fifth of them, and every third query's, finfo.min
#:   large       about 100
BIASES = ("normal", "forbidding", "lowest", "large")
#: What is NaN or infinite.
#:   hidden    keys and values that no query may see
#:   query     one query
#:   key       one key of one head
#:   grad_out  one row of the gradient of out
POISONS = ("hidden", "query", "key", "grad_out")


class Call(NamedTuple):
    """A problem, and the gradients of its results."""

    problem: Problem
    grad_out: Tensor
    grad_lse: Tensor | None


@dataclass(frozen=True)
class AttentionCase:
    """A :class:`fastattn.testing.Case`, its dtype, and numbers that are not all of size 1."""

    seed: int
    case: Case
    dtype: torch.dtype
    query_size: float = 1.0
    value_size: float = 1.0
    grad_size: float = 1.0
    bias: str | None = None  # one of BIASES
    bias_form: str = "full"  # one of MASK_SHAPES
    bias_dtype: torch.dtype | None = None
    transposed_masks: bool = False  # mask and bias lie in memory by columns
    has_grad_lse: bool = False
    average: bool = False  # of the weights
    threads: int = 1
    poison: str | None = None  # one of POISONS
    odd_address: bool = False  # query, key and value begin on an odd element of their memory

    def make(self) -> Call:
        """The call, with the same values at every time."""
        generator = torch.Generator().manual_seed(self.seed)
        problem = self.case.make(dtype=self.dtype)
        if self.query_size != 1.0:
            problem = problem._replace(query=_scaled(problem.query, self.query_size))
        if self.value_size != 1.0:
            problem = problem._replace(value=_scaled(problem.value, self.value_size))
        if self.bias is not None:
            problem = problem._replace(bias=self._bias(generator))
        if self.transposed_masks:
            mask, bias = (None if x is None else _by_columns(x) for x in (problem.attn_mask, problem.bias))
            problem = problem._replace(attn_mask=mask, bias=bias)
        if self.odd_address:
            query, key, value = (_at_odd_address(x) for x in problem[:3])
            problem = problem._replace(query=query, key=key, value=value)
        grad_out = self.case.make_grad_out(dtype=self.dtype)
        grad_out = grad_out if self.grad_size == 1.0 else grad_out.mul_(self.grad_size)
        grad_lse = self.case.make_grad_lse(dtype=problem.lse_dtype) if self.has_grad_lse else None
        if self.poison is not None:
            problem = self._poisoned(problem, grad_out, random.Random(self.seed))
        return Call(problem, grad_out, grad_lse)

    def _bias(self, generator: torch.Generator) -> Tensor:
        case = self.case
        full = (case.batch, case.heads, case.queries, case.key_count)
        shape = [size if kept else min(size, 1) for size, kept in zip(full, MASK_SHAPES[self.bias_form], strict=True)]
        bias = torch.randn(shape, generator=generator).to(self.bias_dtype)
        if self.bias == "large":
            bias *= 100.0
        elif self.bias != "normal":
            low = -torch.inf if self.bias == "forbidding" else torch.finfo(self.bias_dtype).min
            bias[torch.rand(shape, generator=generator) < 0.2] = low
            bias[..., ::3, :] = low
        return bias.expand(full)

    def _poisoned(self, problem: Problem, grad_out: Tensor, draw: random.Random) -> Problem:
        number = draw.choice((torch.nan, torch.inf, -torch.inf))
        query, key, value = problem.query, problem.key, problem.value
        if self.poison == "hidden":
            hidden = hidden_keys(problem).unsqueeze(-1)
            return problem._replace(
                key=_filled(key, hidden, number), value=_filled(value, hidden, draw.choice((torch.nan, torch.inf)))
            )
        if self.poison == "grad_out":
            if grad_out.numel():
                grad_out[_drawn_row(grad_out, draw)] = number
            return problem
        rows = query if self.poison == "query" else key
        if rows.numel():
            place = torch.zeros(rows.shape[:3], dtype=torch.bool)
            place[_drawn_row(rows, draw)] = True
            # An infinite score is another thing for each way to sum.
            problem = problem._replace(**{self.poison: _filled(rows, place.unsqueeze(-1), torch.nan)})
        return problem


@dataclass(frozen=True)
class AdditiveCase:
    """A call of additive attention."""

    seed: int
    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    features: int
    value_dim: int
    size: float = 1.0  # of the projections
    has_lengths: bool = False
    has_mask: bool = False
    poisoned: bool = False  # NaN where masked
    poisoned_gradient: bool = False  # inf in one row of the gradient of out
    threads: int = 1

    def make(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None, Tensor | None, Tensor]:
        """(query, key, value, weight), key_lengths, key_mask and the gradient of out."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch, queries, keys = self.batch, self.queries, self.keys
        query, key = (self.size * normal(batch, length, self.features) for length in (queries, keys))
        value, weight = normal(batch, keys, self.value_dim), normal(self.features)
        grad_out = normal(batch, queries, self.value_dim)
        lengths = torch.randint(0, keys + 1, (batch,), generator=generator) if self.has_lengths else None
        mask = torch.rand((batch, keys), generator=generator) < 0.7 if self.has_mask else None
        if self.poisoned:
            hidden = torch.zeros(batch, keys, dtype=torch.bool)
            hidden |= False if mask is None else ~mask
            hidden |= False if lengths is None else torch.arange(keys) >= lengths[:, None]
            key[hidden], value[hidden] = torch.nan, torch.inf
        if self.poisoned_gradient:
            grad_out[0, queries // 2] = torch.inf
        tensors = tuple(x.to(self.dtype) for x in (query, key, value, weight))
        return tensors, lengths, mask, grad_out.to(self.dtype)


def random_case(seed: int) -> AttentionCase | AdditiveCase:
    """The case of a seed; neighbouring seeds have nothing in common."""
    draw = random.Random(seed)
    return _additive_case(seed, draw) if draw.random() < 0.1 else _attention_case(seed, draw)


def describe(case) -> str:
    """Its fields, without those that have their defaults."""
    given = {
        field.name: getattr(case, field.name)
        for field in fields(case)
        if field.default is MISSING or getattr(case, field.name) != field.default
    }
    inner = [describe(given.pop("case"))] if "case" in given else []
    return " ".join([*inner, *(f"{name}={value}" for name, value in given.items() if name not in ("name", "seed"))])


def hidden_keys(problem: Problem) -> Tensor:
    """bool [B, Hkv, Lk]: no query that reads the key may attend to it."""
    batch, heads, keys, _ = problem.key.shape
    seen = reference.allowed(problem).expand(batch, problem.query.shape[1], -1, -1).any(dim=2)
    return ~seen.unflatten(1, (heads, problem.group_size)).any(dim=2)


def unbroadcast(tensor: Tensor) -> Tensor:
    """With size 1 where its stride is 0."""
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _attention_case(seed: int, draw: random.Random) -> AttentionCase:
    dtype = draw.choice(DTYPES)
    decoding = draw.random() < 0.25
    queries = draw.randint(1, 8) if decoding else _length(draw)
    keys = draw.choice(DECODED_KEYS) if decoding and draw.random() < 0.4 else _length(draw)
    if draw.random() < 0.2:
        keys = queries
    head_dim = _head_dim(draw)
    batch, kv_heads, group = draw.randint(1, 3), draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 1, 2, 3, 8))
    if draw.random() < 0.02:
        batch = 0
    while batch * kv_heads * group * queries * keys > MOST_SCORES and batch * kv_heads * group > 1:
        batch, kv_heads, group = max(1, batch // 2), max(1, kv_heads // 2), max(1, group // 2)
    causal = draw.choice((None, None, "upper_left", "lower_right"))
    window = tuple(draw.choice((None, draw.randint(0, 70))) for _ in range(2)) if draw.random() < 0.2 else None
    lengths = tuple(draw.randint(0, keys) for _ in range(batch)) if draw.random() < 0.25 else None
    mask = draw.choice(tuple(MASK_SHAPES)) if draw.random() < 0.3 else None
    bias = draw.choice(BIASES) if draw.random() < 0.3 else None
    case = Case(
        f"seed_{seed}",
        batch=batch,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=head_dim,
        value_dim=head_dim if draw.random() < 0.6 else _head_dim(draw),
        scale=draw.uniform(-1.0, 1.0) if draw.random() < 0.2 else None,
        causal=causal,
        window=window,
        key_lengths=lengths,
        mask=mask,
        masked_rows=draw.random() < 0.3,
        dropout_p=draw.choice((0.1, 0.5, 0.9)) if draw.random() < 0.2 else 0.0,
        layout=draw.choice(("contiguous", *LAYOUTS)),
        seed=seed,
    )
    restricted = any(x is not None for x in (causal, window, lengths, mask)) or bias == "forbidding"
    poison = None
    if restricted and draw.random() < 0.4:
        poison = "hidden"
    elif draw.random() < 0.08:
        poison = draw.choice(POISONS[1:])
    if poison != "hidden" and case.dropout_p > 0.0:
        poison = None  # whether 0 or NaN comes of what is NaN and dropped is nobody's concern
    tiny = 1e-6 if dtype == torch.float16 else 1e-3  # where float16 has subnormal numbers only
    return AttentionCase(
        seed,
        case,
        dtype,
        query_size=draw.choice((1.0, 1.0, 1.0, 1.0, 1.0, 3.0, 10.0, tiny)),
        value_size=draw.choice((1.0, 1.0, 1.0, 1.0, 1.0, 30.0, tiny)),
        grad_size=draw.choice((1.0, 1.0, 1.0, 1.0, 1.0, 30.0, tiny)),
        bias=bias,
        bias_form=draw.choice(tuple(MASK_SHAPES)),
        bias_dtype=dtype if dtype == torch.float64 or draw.random() < 0.5 else torch.float32,
        transposed_masks=draw.random() < 0.25,
        has_grad_lse=draw.random() < 0.3,
        average=draw.random() < 0.5,
        threads=2 if draw.random() < 0.1 else 1,
        poison=poison,
        odd_address=draw.random() < 0.15,
    )


def _additive_case(seed: int, draw: random.Random) -> AdditiveCase:
    return AdditiveCase(
        seed,
        draw.choice(DTYPES),
        batch=draw.randint(1, 3),
        queries=draw.choice((1, draw.randint(1, 40), draw.choice(EDGES))),
        keys=draw.choice((draw.randint(1, 40), draw.choice(EDGES), 300)),
        features=draw.choice((draw.randint(1, 20), 31, 32, 33)),
        value_dim=draw.choice((draw.randint(1, 20), 31, 32, 33, 64)),
        size=draw.choice((1.0, 1.0, 0.1, 4.0)),
        has_lengths=draw.random() < 0.4,
        has_mask=draw.random() < 0.4,
        poisoned=draw.random() < 0.5,
        poisoned_gradient=draw.random() < 0.1,
        threads=2 if draw.random() < 0.1 else 1,
    )


def _length(draw: random.Random) -> int:
    kind = draw.random()
    if kind < 0.02:
        return 0
    if kind < 0.75:
        return draw.randint(1, 40)
    return draw.choice(EDGES) if kind < 0.95 else draw.choice(LONG)


def _head_dim(draw: random.Random) -> int:
    kind = draw.random()
    if kind < 0.45:
        return draw.choice(HEAD_DIMS)
    return draw.randint(1, 40) if kind < 0.9 else draw.randint(41, 260)


def _drawn_row(tensor: Tensor, draw: random.Random) -> tuple[int, int, int]:
    return tuple(draw.randrange(size) for size in tensor.shape[:3])


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return _written_alike(tensor, tensor * factor)


def _filled(tensor: Tensor, where: Tensor, number: float) -> Tensor:
    return _written_alike(tensor, tensor.masked_fill(where, number))


def _written_alike(tensor: Tensor, values: Tensor) -> Tensor:
    """The values, in the tensor's memory unless that is shared between its elements."""
    return values.contiguous() if 0 in tensor.stride() else tensor.copy_(values)


def _at_odd_address(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def _by_columns(tensor: Tensor) -> Tensor:
    """The same values with the last two dimensions swapped in memory; broadcast dimensions stay so."""
    return unbroadcast(tensor).mT.contiguous().mT.expand(tensor.shape)
