"""The examples and the README's code run, learn, and agree with torch."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_digits_with_and_without_fastattn() -> None:
    pytest.importorskip("sklearn")
    main = runpy.run_path(str(ROOT / "examples" / "digits.py"))["main"]
    runs = main(["--epochs", "3"])
    theirs, ours = runs["nn.MultiheadAttention"], runs["fastattn"]
    assert theirs.accuracy > 0.8
    assert ours.accuracy > 0.8
    assert len(ours.losses) == len(theirs.losses) == 3 * 21
    assert ours.losses[0] == pytest.approx(theirs.losses[0], abs=1e-5)
    apart = max(abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True))
    assert apart < 1e-2


def test_the_readmes_code_runs_as_pasted(capsys: pytest.CaptureFixture) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "swapped 2 of 2" in printed
    assert "backend: " in printed
