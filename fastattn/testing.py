"""The one table of cases, and how a result is judged against the reference.

Tests, ``fastattn check``, the benchmarks and the checks on a GPU all use this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastattn import reference
from fastattn.problem import Problem, bias_gradient_shape, make_problem

#: How the tensors of a case lie in memory.
#:   contiguous  [B, H, L, D]
#:   transposed  [B, L, H, D] viewed as [B, H, L, D]
#:   packed      slices of one [B, L, H, 3 * max(D, Dv)] buffer
#:   last_dim    the last dimension is not the fastest (it has to be copied)
#:   broadcast   batch and kv heads have stride 0
LAYOUTS = ("contiguous", "transposed", "packed", "last_dim", "broadcast")

#: Mask and bias shapes by name, in terms of (B, Hq, Lq, Lk).
MASK_SHAPES = {
    "full": (True, True, True, True),
    "shared": (False, False, True, True),
    "per_head": (False, True, True, True),
    "per_batch": (True, False, True, True),
    "keys": (True, False, False, True),
    "queries": (True, False, True, False),
    "scalar": (False, False, False, False),
}


@dataclass(frozen=True)
class Case:
    """One attention call: sizes, ingredients, memory layout and seed.

    ``mask`` and ``bias`` name a shape in MASK_SHAPES. A mask keeps about 70 % of the keys and, with
    ``masked_rows``, forbids every key to every third query; then a bias forbids the same with -inf.
    """

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    queries: int = 64
    keys: int | None = None
    head_dim: int = 64
    value_dim: int | None = None
    scale: float | None = None
    causal: str | None = None
    window: tuple[int | None, int | None] | None = None
    key_lengths: tuple[int, ...] | None = None
    mask: str | None = None
    bias: str | None = None
    masked_rows: bool = False
    dropout_p: float = 0.0
    layout: str = "contiguous"
    seed: int = 0

    @property
    def key_count(self) -> int:
        return self.queries if self.keys is None else self.keys

    def make(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
        """The problem, with the same values on every device (rounded to ``dtype``)."""
        generator = torch.Generator().manual_seed(self.seed)
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        shapes = (
            (self.batch, self.heads, self.queries, self.head_dim),
            (self.batch, kv_heads, self.key_count, self.head_dim),
            (self.batch, kv_heads, self.key_count, value_dim),
        )
        query, key, value = (_laid_out(shape, self.layout, generator, device, dtype) for shape in shapes)
        attn_mask = self._mask(generator, device)
        problem = make_problem(
            query,
            key,
            value,
            attn_mask=attn_mask,
            scale=self.scale,
            enable_gqa=True,
            causal=self.causal,
            window=self.window,
            key_lengths=None if self.key_lengths is None else torch.tensor(self.key_lengths, device=device),
            dropout_p=self.dropout_p,
            rng_state=torch.tensor([0x123456789ABC + self.seed, 77], device=device),
        )
        if self.bias is None:
            return problem
        score_shape = (self.batch, self.heads, self.queries, self.key_count)
        return problem._replace(bias=self._bias(generator, device, dtype).expand(score_shape))

    def make_grad_out(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """d loss / d out [B, Hq, Lq, Dv]."""
        generator = torch.Generator().manual_seed(self.seed + 1000)
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        shape = (self.batch, self.heads, self.queries, value_dim)
        return torch.randn(shape, generator=generator).to(device, dtype)

    def make_grad_lse(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """d loss / d lse [B, Hq, Lq], in ``dtype``."""
        generator = torch.Generator().manual_seed(self.seed + 2000)
        return torch.randn((self.batch, self.heads, self.queries), generator=generator).to(device, dtype)

    def _score_like(self, form: str) -> tuple[int, ...]:
        full = (self.batch, self.heads, self.queries, self.key_count)
        return tuple(size if kept else min(size, 1) for size, kept in zip(full, MASK_SHAPES[form], strict=True))

    def _mask(self, generator: torch.Generator, device: torch.device | str) -> Tensor | None:
        if self.mask is None:
            return None
        mask = torch.rand(self._score_like(self.mask), generator=generator) < 0.7
        if self.masked_rows:
            mask[..., ::3, :] = False
        return mask.to(device)

    def _bias(self, generator: torch.Generator, device: torch.device | str, dtype: torch.dtype) -> Tensor | None:
        bias = torch.randn(self._score_like(self.bias), generator=generator)
        if self.masked_rows:
            bias[torch.rand(bias.shape, generator=generator) < 0.2] = -torch.inf
            bias[..., ::3, :] = -torch.inf
        return bias.to(device, dtype)


def _laid_out(shape, layout, generator, device, dtype) -> Tensor:
    batch, heads, length, head_dim = shape
    if layout == "broadcast":
        return torch.randn((1, 1, length, head_dim), generator=generator).to(device, dtype).expand(shape)
    values = torch.randn(shape, generator=generator).to(device, dtype)
    if layout == "contiguous":
        return values
    if layout == "transposed":
        buffer = values.new_empty((batch, length, heads, head_dim))
        return buffer.permute(0, 2, 1, 3).copy_(values)
    if layout == "packed":
        buffer = values.new_full((batch, length, heads, 3 * head_dim), torch.nan)
        return buffer.permute(0, 2, 1, 3)[..., head_dim : 2 * head_dim].copy_(values)
    if layout == "last_dim":
        return values.new_empty((batch, heads, head_dim, length)).transpose(2, 3).copy_(values)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def _edge_cases() -> list[Case]:
    """Lengths at and around every tile edge, equal and unequal."""
    cases = [
        Case(f"length_{length}", queries=length, head_dim=32, seed=length)
        for length in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 130)
    ]
    pairs = ((1, 130), (130, 1), (15, 64), (17, 65), (64, 17), (65, 127), (3, 257), (257, 48))
    for queries, keys in pairs:
        sizes = {"queries": queries, "keys": keys, "head_dim": 32, "seed": queries + keys}
        name = f"length_{queries}x{keys}"
        cases += [
            Case(name, **sizes),
            Case(f"{name}_upper_left", causal="upper_left", **sizes),
            Case(f"{name}_lower_right", causal="lower_right", **sizes),
        ]
    return cases


def _ingredient_cases() -> list[Case]:
    common = {"queries": 65, "keys": 130, "head_dim": 40, "seed": 7}
    cases = [
        Case("causal_upper_left", queries=130, causal="upper_left"),
        Case("causal_lower_right", queries=130, causal="lower_right"),
        Case("window_both", window=(17, 9), **common),
        Case("window_left", window=(33, None), **common),
        Case("window_right", window=(None, 16), **common),
        Case("window_diagonal", window=(0, 0), **common),
        Case("window_causal", window=(20, 5), causal="lower_right", **common),
        Case("window_past_the_keys", queries=130, keys=20, head_dim=40, window=(3, 0), seed=8),
        Case("key_lengths", batch=3, key_lengths=(130, 64, 1), **common),
        Case("key_lengths_zero", batch=3, key_lengths=(0, 100, 17), **common),
        Case("key_lengths_causal", batch=3, key_lengths=(130, 65, 40), causal="upper_left", **common),
        Case("key_lengths_lower_right", batch=3, key_lengths=(130, 65, 40), causal="lower_right", **common),
        Case(
            "key_lengths_window_lower_right",
            batch=3,
            key_lengths=(130, 70, 5),
            causal="lower_right",
            window=(16, None),
            **common,
        ),
    ]
    for form in MASK_SHAPES:
        cases += [Case(f"mask_{form}", mask=form, **common), Case(f"bias_{form}", bias=form, **common)]
    cases += [
        Case("mask_rows", mask="full", masked_rows=True, **common),
        Case("bias_rows", bias="full", masked_rows=True, **common),
        Case("mask_and_bias", mask="keys", bias="per_head", masked_rows=True, **common),
        Case("mask_causal", mask="shared", causal="upper_left", **common),
        Case("bias_window", bias="shared", window=(16, 16), **common),
        Case("dropout", dropout_p=0.1, **common),
        Case("dropout_causal", dropout_p=0.5, causal="lower_right", **common),
        Case("dropout_bias", dropout_p=0.25, bias="shared", **common),
        Case(
            "everything",
            batch=3,
            heads=4,
            kv_heads=2,
            mask="per_head",
            bias="per_batch",
            masked_rows=True,
            key_lengths=(130, 0, 77),
            causal="lower_right",
            window=(64, 8),
            dropout_p=0.2,
            layout="transposed",
            **common,
        ),
        Case("scale", scale=0.37, **common),
        Case("scale_negative", scale=-0.1, **common),
        Case("scale_zero", scale=0.0, **common),
    ]
    return cases


def _shape_cases() -> list[Case]:
    cases = [
        Case(f"head_dim_{head_dim}", batch=1, queries=33, keys=49, head_dim=head_dim, seed=head_dim)
        for head_dim in (1, 5, 16, 24, 40, 80, 96, 128, 256, 512)
    ]
    cases += [
        Case(f"value_dim_{d}_{dv}", batch=1, queries=33, keys=70, head_dim=d, value_dim=dv, seed=d)
        for d, dv in ((64, 32), (32, 64), (5, 80), (40, 1), (128, 512))
    ]
    cases += [
        Case("gqa", heads=6, kv_heads=2, queries=65),
        Case("gqa_causal", heads=8, kv_heads=4, queries=33, keys=80, causal="lower_right"),
        Case("mqa", heads=5, kv_heads=1, queries=65),
        Case("gqa_bias", heads=4, kv_heads=2, queries=33, bias="per_head"),
        Case("gqa_dropout", heads=4, kv_heads=2, queries=33, dropout_p=0.3),
        Case("decode", heads=8, kv_heads=2, queries=1, keys=513, key_lengths=(513, 200)),
        Case("decode_lower_right", queries=1, keys=300, causal="lower_right"),
    ]
    for layout in LAYOUTS[1:]:
        cases += [
            Case(f"layout_{layout}", queries=33, keys=65, layout=layout),
            Case(f"layout_{layout}_gqa", heads=4, kv_heads=2, queries=17, layout=layout, causal="upper_left"),
        ]
    cases += [
        Case("empty_batch", batch=0),
        Case("empty_queries", queries=0, keys=5),
        Case("empty_keys", queries=5, keys=0),
        Case("empty_keys_causal", queries=5, keys=0, causal="lower_right"),
        Case("empty_keys_bias", queries=5, keys=0, bias="full"),
    ]
    return cases


#: Every case, in an order that goes from simple to composed.
CASES: tuple[Case, ...] = (*_edge_cases(), *_shape_cases(), *_ingredient_cases())

#: A few that touch every branch once, for slow paths (interpreters, emulators).
SMOKE_CASES: tuple[Case, ...] = tuple(
    case
    for case in CASES
    if case.name
    in (
        "length_17x65_lower_right",
        "head_dim_40",
        "value_dim_64_32",
        "gqa_causal",
        "layout_transposed",
        "key_lengths_zero",
        "window_causal",
        "mask_rows",
        "bias_per_head",
        "dropout_bias",
        "empty_keys",
        "everything",
    )
)

#: What a run of a problem yields, by name: out, lse, then the gradients.
Results = dict[str, Tensor]
GRADIENTS = ("grad_query", "grad_key", "grad_value", "grad_bias")


def run_reference(
    problem: Problem,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Results:
    """out, lse and, with ``grad_out``, autograd's gradients of the reference, computed in ``dtype``.

    ``dtype=None`` computes in the problem's own dtype: naive attention. The truth itself is no measure of
    float64's rounding: then naive attention is given what :func:`rounded_otherwise` yields, and sums the gradients
    over one half of the queries, then the other.
    """
    if dtype is None and problem.query.dtype == torch.float64:
        return _run_otherwise(problem, grad_out, grad_lse)
    return _run_in(dtype, problem, grad_out, grad_lse)


def _run_in(dtype: torch.dtype | None, problem: Problem, grad_out: Tensor | None, grad_lse: Tensor | None) -> Results:
    bias_shape = None if problem.bias is None else bias_gradient_shape(problem.bias)
    if dtype is not None:
        problem = reference.in_dtype(problem, dtype)
    leaves = [problem.query, problem.key, problem.value]
    leaves += [] if problem.bias is None else [problem.bias]
    leaves = [leaf.detach().requires_grad_(grad_out is not None) for leaf in leaves]
    problem = problem._replace(**dict(zip(("query", "key", "value", "bias"), leaves, strict=False)))
    out, lse = reference.attention(problem)
    results = {"out": out.detach(), "lse": lse.detach()}
    if grad_out is None:
        return results
    loss_terms = [(out, grad_out.to(out.dtype))]
    if grad_lse is not None:
        # A row that attends to nothing has the constant lse -inf.
        loss_terms.append((lse, grad_lse.to(lse.dtype)))
    outputs, cotangents = zip(*loss_terms, strict=True)
    gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, gradients, strict=True)]
    results |= dict(zip(GRADIENTS, gradients, strict=False))
    if bias_shape is not None:
        results["grad_bias"] = results["grad_bias"].sum_to_size(bias_shape)
    return results


def rounded_otherwise(problem: Problem) -> Problem:
    """The problem with its features in reverse and each score off by a unit of its last place, for naive float64.

    The query is smaller by a unit, and each bias off by one up or down.
    """
    query, key, value = (tensor.flip(-1) for tensor in (problem.query, problem.key, problem.value))
    bias = problem.bias
    if bias is not None:
        up = torch.rand(bias.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        moved = bias * (1.0 + torch.finfo(bias.dtype).eps * (2.0 * up.to(bias) - 1.0))
        bias = torch.where(moved.isfinite(), moved, bias)
    return problem._replace(query=query * (1.0 - torch.finfo(query.dtype).eps), key=key, value=value, bias=bias)


def _run_otherwise(problem: Problem, grad_out: Tensor | None, grad_lse: Tensor | None) -> Results:
    moved = rounded_otherwise(problem)
    if grad_out is None:
        results = _run_in(None, moved, None, None)
    else:
        is_late = torch.arange(grad_out.shape[2], device=grad_out.device) >= grad_out.shape[2] // 2
        halves = []
        for left_out in (is_late, ~is_late):
            half_lse = None if grad_lse is None else grad_lse.masked_fill(left_out, 0.0)
            half_out = grad_out.flip(-1).masked_fill(left_out[:, None], 0.0)
            halves.append(_run_in(None, moved, half_out, half_lse))
        results = {
            name: first + halves[1][name] if name.startswith("grad") else first for name, first in halves[0].items()
        }
    for name in results.keys() & {"out", "grad_query", "grad_key", "grad_value"}:
        results[name] = results[name].flip(-1)
    if "grad_bias" in results:
        results["grad_bias"] = results["grad_bias"].sum_to_size(bias_gradient_shape(problem.bias))
    return results


def run_backend(
    backend: ModuleType,
    problem: Problem,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> Results:
    """The same results from a backend, its buffers poisoned with NaN so that a gap is seen."""

    def poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(like.shape, torch.nan, dtype=dtype or like.dtype, device=like.device)

    batch, heads, queries, _ = problem.query.shape
    out = problem.query.new_full((batch, heads, queries, problem.value.shape[-1]), torch.nan)
    lse = poisoned(out[..., 0], problem.lse_dtype)
    keeps_residual = getattr(backend, "KEEPS_RESIDUAL", False) and grad_out is not None and out.dtype.itemsize == 2
    residual = {"out_residual": poisoned(out).view(torch.int16)} if keeps_residual else {}
    backend.forward(problem, out, lse, **residual)
    results = {"out": out, "lse": lse}
    if grad_out is None:
        return results
    gradients = {
        "grad_query": poisoned(problem.query),
        "grad_key": poisoned(problem.key),
        "grad_value": poisoned(problem.value),
        "grad_bias": None,
    }
    if problem.bias is not None:
        gradients["grad_bias"] = torch.zeros(
            bias_gradient_shape(problem.bias), dtype=problem.lse_dtype, device=out.device
        )
    backend.backward(problem, out, lse, grad_out, grad_lse, **gradients, **residual)
    return results | {name: grad for name, grad in gradients.items() if grad is not None}


@dataclass(frozen=True)
class Judgement:
    """One tensor's largest absolute error and what it may be."""

    name: str
    error: float
    naive_error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget


def judge(
    actual: Results,
    problem: Problem,
    reference64: Results,
    naive: Results,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> list[Judgement]:
    """Compare with the float64 reference: at most twice naive attention's error, plus a floor.

    The floor covers what rounding alone can do where naive attention happens to be exact: one unit
    in the last place of the largest result, and a few units of the accumulator's precision of the
    largest terms that the result is a sum of.

    A kernel recomputes its weights in the backward, which puts a score's unit of rounding into every term; the
    softmax of naive attention cancels that where a row sees one key. In float64, whose naive attention rounds no
    sums of float32 values either, it has at least this error.
    """
    magnitudes = term_magnitudes(problem, grad_out, grad_lse)
    is_float64 = problem.query.dtype == torch.float64
    score_rounding = torch.finfo(torch.float64).eps * largest_product(problem) if is_float64 else 0.0
    judgements = []
    for name, tensor in actual.items():
        exact = reference64[name].double()
        error = _largest_error(tensor, exact)
        naive_error = max(_largest_error(naive[name], exact), score_rounding * magnitudes[name])
        storage = torch.finfo(tensor.dtype).eps * _largest(exact)
        accumulator = 16 * torch.finfo(problem.lse_dtype).eps * magnitudes[name]
        budget = allowed_error(naive_error, storage + accumulator, problem.query.dtype)
        judgements.append(Judgement(name, error, naive_error, budget))
    return judgements


def allowed_error(naive_error: float, floor: float, dtype: torch.dtype) -> float:
    """Twice naive attention's error, plus the floor; in float64 thrice, as the reference is rounded too."""
    return (3 if dtype == torch.float64 else 2) * naive_error + floor


def assert_within_budget(
    actual: Results,
    problem: Problem,
    reference64: Results,
    naive: Results,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> list[Judgement]:
    """What :func:`judge` returns; raises AssertionError naming each tensor that misses its budget."""
    judgements = judge(actual, problem, reference64, naive, grad_out, grad_lse)
    missed = [j for j in judgements if not j.passed]
    if missed:
        lines = [f"{j.name}: error {j.error:.3e}, allowed {j.budget:.3e} (naive {j.naive_error:.3e})" for j in missed]
        raise AssertionError("outside the error budget\n  " + "\n  ".join(lines))
    return judgements


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _largest_error(actual: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite where one is finite and the other is not, or either is NaN."""
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(exact.shape)}")
    if exact.numel() == 0:
        return 0.0
    actual = actual.to(exact.device).double()
    difference = torch.where(actual == exact, 0.0, (actual - exact).abs())
    return difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()


def largest_product(problem: Problem) -> float:
    """The size of the largest terms in a scaled product of a query and a key."""
    return abs(problem.scale) * _largest(problem.query.double()) * _largest(problem.key.double())


def term_magnitudes(problem: Problem, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> dict[str, float]:
    """The size of the largest terms in each result's sum."""
    query, key, value = (_largest(t.double()) for t in (problem.query, problem.key, problem.value))
    scores = largest_product(problem) + (0.0 if problem.bias is None else _largest(problem.bias))
    magnitudes = {"out": value, "lse": 1.0 + scores}
    if grad_out is not None:
        keep = 1.0 - problem.dropout_p
        outer = _largest(grad_out.double())
        grad_weights = problem.value.shape[-1] ** 0.5 * outer * value / keep
        grad_weights += 0.0 if grad_lse is None else _largest(grad_lse)
        magnitudes |= {
            "grad_query": abs(problem.scale) * grad_weights * key,
            "grad_key": abs(problem.scale) * grad_weights * query,
            "grad_value": outer / keep,
            "grad_bias": grad_weights,
        }
    return magnitudes
