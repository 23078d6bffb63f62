"""The plain Triton kernels in small tiles, under Triton's interpreter (see triton_checks.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_checks import CHECKS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def outcomes(request) -> dict[str, str | None]:
    """The failure of each check that is to be tested here, or None, from one process with the interpreter on."""
    here = [item for item in request.session.items if item.parent is request.node]
    names = [item.callspec.params["name"] for item in here]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(
        [sys.executable, HERE / "triton_checks.py", *names], env=environment, capture_output=True, text=True
    )
    found = [json.loads(text) for text in run.stdout.splitlines() if text.startswith('{"name"')]
    return {check["name"]: check["failure"] for check in found} | {"stderr": run.stderr}


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(outcomes, name):
    assert name in outcomes, outcomes["stderr"]
    assert outcomes[name] is None, outcomes[name]
