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
def environment(name: str, value: str):
    """Within it, the variable has the value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def without_hopper():
    """Within it, the kernels that every architecture has are used."""
    return environment("FASTATTN_HOPPER", "0")


class PlainTriton:
    """The Triton backend with its Hopper kernels turned off."""

    def __init__(self) -> None:
        self.backend = load_backend("triton")
        self.reasons = self.backend.reasons

    def forward(self, *arguments) -> None:
        with without_hopper():
            self.backend.forward(*arguments)

    def backward(self, *arguments, **gradients) -> None:
        with without_hopper():
            self.backend.backward(*arguments, **gradients)


class Hopper:
    """The Hopper kernels alone, whatever the backend would choose. They have no bias, so no gradient of one."""

    def __init__(self) -> None:
        from fastattn.kernels.hopper import launch, launch_backward, reasons

        self.reasons, self.forward, self._backward = reasons, launch.forward, launch_backward.backward

    def backward(self, *arguments, grad_bias=None, **gradients) -> None:
        self._backward(*arguments, **gradients)


def load_engine(name: str):
    """A backend by name, or "plain" or "hopper": half of the Triton backend."""
    return {"plain": PlainTriton, "hopper": Hopper}.get(name, lambda: load_backend(name))()
