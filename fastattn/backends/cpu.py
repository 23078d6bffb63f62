"""The CPU backend: hands a problem to the C++ engine, as raw pointers and element strides."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastattn.problem import CAUSAL_MODES, Problem

try:
    from fastattn import _C
except ImportError as error:
    _C = None
    _import_error = error

#: In the order of csrc/problem.h's DType.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_CAUSAL_CODES = {mode: code for code, mode in enumerate(CAUSAL_MODES)}
_NO_TENSOR = (0, (0, 0, 0, 0))

#: Whether :func:`forward` takes None in the place of lse.
LSE_IS_OPTIONAL = True


@cache
def unavailable() -> str | None:
    """Why the engine cannot be used at all, else None."""
    if _C is None:
        return f"the C++ extension fastattn._C is not built or cannot be loaded ({_import_error})"
    return None


def reasons(problem: Problem) -> list[str]:
    """Why the engine cannot take the problem; empty if it can."""
    query = problem.query
    why = []
    if not query.is_cpu:
        why.append(f"the tensors are on {query.device}, not on the CPU")
    if query.dtype not in _DTYPE_CODES:
        why.append(f"dtype {query.dtype} is not one of {', '.join(str(dtype) for dtype in _DTYPE_CODES)}")
    return why


def isa() -> str:
    """The instruction set in use.

    Chosen at the first call: the environment variable FASTATTN_CPU_ISA, else the best one of this
    machine.  Raises ValueError if the variable names one that is unknown or not on this machine.
    """
    return _C.isa()


def set_isa(name: str) -> None:
    """Use an instruction set by name; ValueError if it is unknown or not on this machine."""
    _C.set_isa(name)


def available_isas() -> list[str]:
    """The instruction sets that can be used on this machine, the best first."""
    return _C.available_isas()


def forward(problem: Problem, out: Tensor, lse: Tensor | None) -> None:
    """Write attention's output [B, Hq, Lq, Dv] and, unless None, its natural-log lse [B, Hq, Lq]."""
    _C.forward(_describe(problem), (out.data_ptr(), out.stride()), _address(lse), torch.get_num_threads())


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
    """Write the gradients that are not None, given the forward's results and their gradients."""
    _C.backward(
        _describe(problem),
        (out.data_ptr(), out.stride()),
        lse.data_ptr(),
        (grad_out.data_ptr(), grad_out.stride()),
        _address(grad_lse),
        _view(grad_query),
        _view(grad_key),
        _view(grad_value),
        _address(grad_bias),
        torch.get_num_threads(),
    )


def weights(problem: Problem, lse: Tensor, out: Tensor, average: bool) -> None:
    """Write the softmax weights [B, Hq, Lq, Lk], or their mean over the heads [B, Lq, Lk]."""
    _C.weights(_describe(problem), lse.data_ptr(), out.data_ptr(), average, torch.get_num_threads())


def _describe(problem: Problem) -> tuple:
    """The fields of csrc/problem.h's Problem in the order in which bindings.cpp reads them."""
    query, key, value, bias = problem.query, problem.key, problem.value, problem.bias
    seed, offset = problem.rng_state.tolist() if problem.dropout_p > 0.0 else (0, 0)
    return (
        _DTYPE_CODES[query.dtype],
        query.shape,
        key.shape,
        value.shape,
        query.data_ptr(),
        query.stride(),
        key.data_ptr(),
        key.stride(),
        value.data_ptr(),
        value.stride(),
        problem.scale,
        _CAUSAL_CODES[problem.causal],
        -1 if problem.window_left is None else problem.window_left,
        -1 if problem.window_right is None else problem.window_right,
        0 if problem.key_lengths is None else problem.key_lengths.data_ptr(),
        *_view(problem.attn_mask),
        *_view(bias),
        0 if bias is None else _DTYPE_CODES[bias.dtype],
        problem.dropout_p,
        seed,
        offset,
    )


def _view(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return _NO_TENSOR if tensor is None else (tensor.data_ptr(), tensor.stride())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
