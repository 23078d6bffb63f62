"""What all tests share."""

from __future__ import annotations

import pytest
import torch

from fastattn import dispatch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _quiet_fallback(monkeypatch):
    """A tree without a built engine is tested on the reference; only test_dispatch looks at the warning."""
    monkeypatch.setattr(dispatch, "_warn_once", lambda message: None)
