"""What all tests share."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from fastattn import dispatch
from fastattn.backends import cpu

# Graphs that torch compiled for operators of an earlier schema would be taken from its cache, and fail.
_compiled_graphs = tempfile.TemporaryDirectory(prefix="fastattn-test-graphs-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled_graphs.name


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet_fallback(monkeypatch):
    """A tree without a built engine is tested on what it falls back to; few tests look at the warning."""
    monkeypatch.setattr(dispatch, "_warn_once", lambda *_: None)


@pytest.fixture(params=cpu.available_isas() if cpu.unavailable() is None else [None])
def isa(request):
    """Each instruction set that the machine has; tests that ask for it are of modules that need the engine."""
    chosen = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(chosen)
