"""The CPU backend: hands a problem to the C++ engine, which reads its tensors itself."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fastattn.backends import missing
from fastattn.problem import SUPPORTED_DTYPES, Problem

try:
    import fastattn._C as _C

    # torch's table of C functions that read a tensor is there from 2.10 on.
    _C.use_torch(torch, getattr(Tensor, "__dlpack_c_exchange_api__", None))
except (ImportError, AttributeError) as error:  # an extension built from older sources lacks something
    _C = None
    _import_error = error

#: Whether :func:`forward` takes None in the place of lse.
LSE_IS_OPTIONAL = True
#: Whether :func:`forward` writes, and :func:`backward` reads, what rounding takes from a 16-bit ``out``.
KEEPS_RESIDUAL = True


@cache
def unavailable() -> str | None:
    """Why the engine cannot be used at all, else None."""
    return missing.why(_import_error) if _C is None else None


def reasons(problem: Problem) -> list[str]:
    """Why the engine cannot take the problem; empty if it can."""
    query = problem.query
    why = []
    if not query.is_cpu:
        why.append(f"the tensors are on {query.device}, not on the CPU")
    if query.dtype not in SUPPORTED_DTYPES:
        why.append(f"dtype {query.dtype} is not one of {', '.join(str(dtype) for dtype in SUPPORTED_DTYPES)}")
    return why


def plain_head_dims(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[int, int] | None:
    """(D, Dv) if the engine can compute a call of these alone, as they are given; None in any doubt."""
    # The table takes a millisecond to refuse a tensor that is elsewhere; query may still be anything.
    on_cpu = getattr(query, "is_cpu", False) is True  # a proxy's is neither true nor false
    return _C.plain_head_dims(query, key, value, grouped) if on_cpu and _C is not None else None


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


@cache
def makes_results() -> bool:
    """Can results lie in memory that the extension keeps? Not where torch has no table of C functions."""
    return _C is not None and _C.makes_results()


def new_result(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised, of at most four dimensions, in memory of a former result or in fresh huge pages."""
    return _C.new_result(shape, strides, dtype)


def new_result_like(tensor: Tensor, last_size: int, least_bytes: int) -> Tensor | None:
    """The same, [B, H, L, last_size], for a contiguous [B, H, L, D]; None for any other, and for a small one."""
    return _C.new_result_like(tensor, last_size, least_bytes)


def keep_results(size: int) -> None:
    """How many bytes that results leave to keep for later ones, from now on."""
    _C.limit_kept_result_memory(size)


def kept_results() -> int:
    """How many bytes are kept now."""
    return _C.kept_result_memory()


def forward(problem: Problem, out: Tensor, lse: Tensor | None, out_residual: Tensor | None = None) -> None:
    """Write attention's output [B, Hq, Lq, Dv] and, unless None, its natural-log lse [B, Hq, Lq].

    ``out_residual``, int16 like out and unless None, gets what rounding took from it: only of a 16-bit dtype.
    """
    _C.forward(problem, out, lse, out_residual, torch.get_num_threads())


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
    out_residual: Tensor | None = None,
) -> None:
    """Write the gradients that are not None, given the forward's results and their gradients."""
    threads = torch.get_num_threads()
    gradients = (grad_query, grad_key, grad_value, grad_bias)
    _C.backward(problem, out, lse, out_residual, grad_out, grad_lse, *gradients, threads)


def weights(problem: Problem, lse: Tensor, out: Tensor, average: bool) -> None:
    """Write the softmax weights [B, Hq, Lq, Lk], or their mean over the heads [B, Lq, Lk]."""
    _C.weights(problem, lse, out, average, torch.get_num_threads())
