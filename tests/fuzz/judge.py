"""One random case on the CPU engine, judged against the float64 reference.

The error may be twice that of naive attention in the same dtype, plus rounding (:func:`fastattn.testing.judge`).
What no query may see must leave everything finite, and what is NaN in the truth must be NaN.
"""

from __future__ import annotations

import math
from contextlib import contextmanager

import torch
from torch import Tensor

from fastattn import reference
from fastattn.additive import additive_attention, additive_weights
from fastattn.backends import cpu
from fastattn.testing import Judgement, Results, allowed_error, judge, rounded_otherwise, run_backend, run_reference
from fuzz.cases import AdditiveCase, AttentionCase


class Trial:
    """A case and its truth, computed once for all instruction sets."""

    def __init__(self, case: AttentionCase | AdditiveCase):
        self.case = case
        self._trial = (_Attention if isinstance(case, AttentionCase) else _Additive)(case)

    def run(self, isa: str) -> list[Judgement]:
        """The results on an instruction set, all of them judged; ValueError if this machine has no such."""
        with _using(isa, self.case.threads):
            results = self._trial.results()
        return self._trial.judge(results)


@contextmanager
def _using(isa: str, threads: int):
    before = cpu.isa(), torch.get_num_threads()
    cpu.set_isa(isa)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        cpu.set_isa(before[0])
        torch.set_num_threads(before[1])


class _Attention:
    def __init__(self, case: AttentionCase):
        self.average = case.average
        self.problem, self.grad_out, self.grad_lse = case.make()
        self.exact, self.naive = self._truth(torch.float64), self._truth(None)

    def _truth(self, dtype: torch.dtype | None) -> Results:
        """The reference's results and weights; with None in the problem's own dtype, as naive attention."""
        results = run_reference(self.problem, self.grad_out, self.grad_lse, dtype)
        if dtype is not None:
            problem = reference.in_dtype(self.problem, dtype)
        else:
            problem = rounded_otherwise(self.problem) if self.problem.query.dtype == torch.float64 else self.problem
        return results | {"weights": reference.weights(problem, self.average)}

    def results(self) -> Results:
        actual = run_backend(cpu, self.problem, self.grad_out, self.grad_lse)
        weights = torch.full(self.exact["weights"].shape, torch.nan, dtype=self.problem.lse_dtype)
        cpu.weights(self.problem, actual["lse"], weights, self.average)
        return actual | {"weights": weights}

    def judge(self, actual: Results) -> list[Judgement]:
        weights = _judge_weights(actual.pop("weights"), self.exact, self.naive, self.problem.dropout_p)
        actual, exact, naive = _comparable(actual, self.exact, self.naive)
        exact["lse"] = _with_lowest_alike(exact["lse"], self.problem.lse_dtype)
        return [*judge(actual, self.problem, exact, naive, self.grad_out, self.grad_lse), weights]


class _Additive:
    def __init__(self, case: AdditiveCase):
        tensors, self.lengths, self.mask, self.grad_out = case.make()
        self.tensors = [x.requires_grad_() for x in tensors]
        self.exact = self._dense(torch.float64)
        self.naive = self._dense(case.dtype, reverse=case.dtype == torch.float64)

    def _dense(self, dtype: torch.dtype, reverse: bool = False) -> Results:
        """The formula, written out; in reverse with the queries and the features in the other order, and moved."""

        def turned(query, key, value, weight):
            return query.flip(1, 2), key.flip(2), value, weight.flip(0)

        tensors = [x.detach().to(dtype) for x in self.tensors]
        grad_out = self.grad_out.to(dtype)
        if reverse:
            query, *others = turned(*tensors)
            tensors = [query * (1.0 - torch.finfo(dtype).eps), *others]
            grad_out = grad_out.flip(1)
        query, key, value, weight = tensors = [x.requires_grad_() for x in tensors]
        keys = key.shape[1]
        seen = torch.ones(key.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        if self.lengths is not None:
            seen = seen & (torch.arange(keys) < self.lengths[:, None])
        key, value = (x.masked_fill(~seen.unsqueeze(-1), 0.0) for x in (key, value))
        scores = torch.tanh(query[:, :, None] + key[:, None]) @ weight
        weights = scores.masked_fill(~seen[:, None], torch.finfo(dtype).min).softmax(-1)
        weights = weights.masked_fill(~seen[:, None], 0.0)
        out = weights @ value
        gradients = torch.autograd.grad(out, tensors, grad_out)
        out, weights = out.detach(), weights.detach()
        if reverse:
            out, weights, gradients = out.flip(1), weights.flip(1), turned(*gradients)
        return _named(out, gradients) | {"weights": weights}

    def results(self) -> Results:
        out = additive_attention(*self.tensors, self.lengths, self.mask)
        actual = _named(out.detach(), torch.autograd.grad(out, self.tensors, self.grad_out))
        query, key, _, weight = self.tensors
        return actual | {"weights": additive_weights(query, key, weight, self.lengths, self.mask)}

    def judge(self, actual: Results) -> list[Judgement]:
        weights = _judge_weights(actual.pop("weights"), self.exact, self.naive, 0.0)
        query, _, value, weight = self.tensors
        outer = _largest(self.grad_out)
        grad_weights = value.shape[2] ** 0.5 * outer * _largest(value)
        magnitudes = {
            "out": _largest(value),
            "grad_query": grad_weights * _largest(weight),
            "grad_key": grad_weights * _largest(weight),
            "grad_value": outer,
            "grad_weight": grad_weights,
        }
        accumulator = 16 * torch.finfo(torch.float64 if query.dtype == torch.float64 else torch.float32).eps
        actual, exact, naive = _comparable(actual, self.exact, self.naive)
        judgements = []
        for name, tensor in actual.items():
            floor = torch.finfo(tensor.dtype).eps * _largest(exact[name]) + accumulator * magnitudes[name]
            judgements.append(_judgement(name, tensor, exact[name], naive[name], floor))
        return [*judgements, weights]


def _named(out: Tensor, gradients: tuple[Tensor, ...]) -> Results:
    names = ("grad_query", "grad_key", "grad_value", "grad_weight")
    return {"out": out} | dict(zip(names, gradients, strict=True))


def _judge_weights(actual: Tensor, exact: Results, naive: Results, dropout_p: float) -> Judgement:
    exact, naive = exact["weights"], naive["weights"]
    if exact.isnan().any():
        actual, exact, naive = _without_nan("weights", actual, exact, naive)
    return _judgement("weights", actual, exact, naive, 17 * torch.finfo(actual.dtype).eps / (1.0 - dropout_p))


def _judgement(name: str, actual: Tensor, exact: Tensor, naive: Tensor, floor: float) -> Judgement:
    error, naive_error = (_largest_distance(tensor, exact) for tensor in (actual, naive))
    return Judgement(name, error, naive_error, allowed_error(naive_error, floor, naive.dtype))


def _comparable(*results: Results) -> tuple[Results, ...]:
    """What was computed, the truth and naive attention's, without what has no number in the truth."""
    results = tuple(dict(x) for x in results)
    for name in results[0]:
        if not results[1][name].isfinite().all():
            values = _without_nan(name, *(x[name] for x in results))
            for x, value in zip(results, values, strict=True):
                x[name] = value
    return results


def _with_lowest_alike(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """The lse, where docs/reliability.md's limits count biases as the lowest number of the dtype all alike."""
    lowest = torch.finfo(dtype).min
    return lse.masked_fill(lse.isfinite() & (lse < lowest * math.log(2.0)), lowest)


def _without_nan(name: str, actual: Tensor, exact: Tensor, naive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """0 where the truth is NaN, and the result too, or is a gradient.

    0 * NaN spreads what is not finite in a dense product to keys and queries that have no part in it: an engine's
    gradients may be finite there.
    """
    if name.startswith("grad"):
        nowhere = settled = ~exact.isfinite()
    else:
        nowhere = exact.isnan()
        settled = nowhere & actual.isnan()
    return actual.masked_fill(settled, 0.0), exact.masked_fill(settled, 0.0), naive.masked_fill(nowhere, 0.0)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def _largest(tensor: Tensor) -> float:
    return _finite(tensor.detach()).abs().max().item() if tensor.numel() else 0.0


def _largest_distance(actual: Tensor, exact: Tensor) -> float:
    """Infinite where one is a number and the other is not."""
    if exact.numel() == 0:
        return 0.0
    return (actual.double() - exact).abs().nan_to_num(nan=torch.inf).max().item()
