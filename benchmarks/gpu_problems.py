"""Small helpers that the parts share: dtypes by name, the backend's module, its results."""

from __future__ import annotations

import contextlib
import os

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_backend(name: str):
    """The backend's module; raises with its reason if it cannot be used."""
    from fastattn import dispatch

    engine = dispatch.load(name)
    if isinstance(engine, ImportError):
        raise engine
    missing = engine.unavailable()
    if missing is not None:
        raise RuntimeError(f"backend {name}: {missing}")
    return engine


def fresh_results(engine, problem, grad_out=None, grad_lse=None) -> dict:
    """out, lse and the gradients, into buffers that were NaN."""
    from fastattn.testing import run_backend

    results = run_backend(engine, problem, grad_out, grad_lse)
    if problem.query.is_cuda:
        torch.cuda.synchronize()
    return results


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def without_hopper():
    """Within it, the kernels that every architecture has are used."""
    before = os.environ.get("FASTATTN_HOPPER")
    os.environ["FASTATTN_HOPPER"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTATTN_HOPPER"]
        else:
            os.environ["FASTATTN_HOPPER"] = before
