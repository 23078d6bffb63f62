"""torch.onnx.export: the operators are written out in those that ONNX has.

Both exporters run the model, one on tensors that it traces and one on fakes. While they do, the operators are replaced
by the formulas of :mod:`fastattn.reference`, whose steps have counterparts in ONNX. ``torch.export`` without ONNX
keeps the operators; a program that it gave can be exported to ONNX after
``program.run_decompositions(fastattn.integrations.onnx.decompositions())``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastattn import reference
from fastattn.problem import Problem, problem_from_arguments


def is_exporting() -> bool:
    """Does torch.onnx.export run the model?"""
    onnx = sys.modules.get("torch.onnx")  # importing it takes long, and who exports has done so
    return onnx is not None and onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result does, which imports torch._dynamo: the compiler asks once, as it compiles.
is_exporting._dynamo_marked_constant = True


def attention_forward(*arguments) -> tuple[Tensor, ...]:
    """The operator, written out; empty tensors in place of what it gives to the backward pass beside out and lse."""
    out, lse = reference.attention(_problem(arguments))
    others = len(torch.ops.fastattn.attention_forward.default._schema.returns) - 2
    return out, lse, *(out.new_empty(0) for _ in range(others))


def attention_weights(lse: Tensor, average: bool, *arguments) -> Tensor:
    """The operator, written out."""
    return reference.weights(_problem(arguments), average).to(lse.dtype)


def additive_attention(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """:func:`fastattn.additive.additive_attention`, written out; ``mask`` bool [B, Lk], True = attend."""
    if mask is not None:
        value = value.masked_fill(~mask[:, :, None], 0.0)
    return additive_weights(query, key, weight, mask).to(value.dtype) @ value


def additive_weights(query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """:func:`fastattn.additive.additive_weights`, written out; ``mask`` bool [B, Lk], True = attend."""
    if mask is not None:
        key = key.masked_fill(~mask[:, :, None], 0.0)  # a padded NaN would not vanish by a weight of 0
    scores = torch.tanh(query[:, :, None] + key[:, None]) @ weight
    if mask is None:
        return scores.softmax(dim=-1)
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask[:, None], lowest).softmax(dim=-1).masked_fill(~mask[:, None], 0.0)


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """The operators of the forward pass and what to replace them by in an exported program."""
    operators = torch.ops.fastattn
    return {
        operators.attention_forward.default: attention_forward,
        operators.attention_weights.default: attention_weights,
    }


def _problem(arguments: tuple) -> Problem:
    problem = problem_from_arguments(*arguments[:-1])
    if problem.dropout_p > 0.0:
        raise ValueError(
            f"dropout_p must be 0.0 in an export to ONNX, got {problem.dropout_p}: ONNX has no dropout whose weights "
            "depend on their position; export the model after model.eval()"
        )
    return problem
