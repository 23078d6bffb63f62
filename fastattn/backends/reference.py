"""The dense reference as a backend: any device, any dtype, O(Lq * Lk) memory.

Half-precision problems are computed in float32, as the fused engines do.
"""

from __future__ import annotations

from torch import Tensor

from fastattn import reference
from fastattn.problem import Problem

LSE_IS_OPTIONAL = False
KEEPS_RESIDUAL = False


def unavailable() -> str | None:
    return None


def reasons(problem: Problem) -> list[str]:
    return []


def forward(problem: Problem, out: Tensor, lse: Tensor) -> None:
    result, result_lse = reference.attention(_accumulating(problem))
    out.copy_(result)
    lse.copy_(result_lse)


def backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    results = reference.gradients(_accumulating(problem), grad_out.to(problem.lse_dtype), grad_lse)
    buffers = (grad_query, grad_key, grad_value)
    for buffer, result in zip(buffers, results[:3], strict=True):
        if buffer is not None:
            buffer.copy_(result)
    if grad_bias is not None:
        grad_bias.copy_(results[3].sum_to_size(grad_bias.shape))


def weights(problem: Problem, lse: Tensor, out: Tensor, average: bool) -> None:
    out.copy_(reference.weights(_accumulating(problem), average))


def _accumulating(problem: Problem) -> Problem:
    return reference.in_dtype(problem, problem.lse_dtype)
