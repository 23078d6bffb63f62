"""A command without the packages that it needs ends in one line before it does anything; the table of needs is true."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import fastattn
from fastattn import needs
from fastattn.cli import app
from fastattn.needs import NEEDS, PACKAGES
from tests.command_needs import ARGUMENTS, OPTIONAL

ROOT = Path(__file__).parents[1]
ROWS = {row: (extra, names) for extra, rows in NEEDS.items() for row, names in rows.items()}


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the check see the optional modules without these: the packages that there are need not be installed."""
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name in names else name)


def invoke(row: str):
    arguments = f"{row} {ARGUMENTS[row]}".split()[1:]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "60", "NO_COLOR": "1", "TERM": "dumb"})


def test_an_extra_holds_what_its_commands_need() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: set(held) for name, held in project["optional-dependencies"].items()}
    assert set(extras.pop("dev")) >= {f"fastattn[{','.join(extras)}]"}
    assert extras == {
        extra: {PACKAGES.get(name, name) for names in rows.values() for name in names} for extra, rows in NEEDS.items()
    }


def test_every_command_that_has_needs_has_a_row() -> None:
    program = typer.main.get_command(app)
    groups = {name: set(program.commands[name].commands) for name in ("train", "predict")}
    assert {f"fastattn {group} {name}" for group, names in groups.items() for name in names} <= set(ROWS)
    assert {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} <= set(ROWS)
    assert set(ARGUMENTS) == set(NEEDS["models"])


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("fastattn ")])
def test_a_command_without_a_package_is_one_line(row, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    extra, names = ROWS[row]
    for name in names:
        absent(monkeypatch, name)
        result = invoke(row)
        expected = f"error: {row} needs {PACKAGES.get(name, name)}: pip install 'fastattn[{extra}]'\n"
        assert (result.exit_code, result.output, result.stderr) == (1, expected, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("examples/")])
def test_an_example_without_a_package_is_one_line(row, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [row])
    absent(monkeypatch, "sklearn", "safetensors")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / row), run_name="__main__")
    assert re.fullmatch(rf"error: {row} needs [\w\- ]+: pip install 'fastattn\[models\]'", end.value.code)
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_several_packages_are_named_in_one_sentence(monkeypatch) -> None:
    absent(monkeypatch, *OPTIONAL)
    for row, named in (
        ("examples/digits.py", "scikit-learn"),
        ("fastattn predict detect", "safetensors and pillow"),
        ("python -m benchmarks.report run", "pytest, pytest-benchmark, matplotlib and scipy"),
    ):
        with pytest.raises(needs.MissingPackages, match=f"^{row} needs {named}: pip install 'fastattn"):
            needs.require(row)
    absent(monkeypatch)
    for row in ROWS:
        needs.require(row)


def test_modules_are_imported_without_optional_packages() -> None:
    """They import them in the functions that use them, so that a command can ask first; info and --version run."""
    code = f"""
import pkgutil, runpy, sys
for name in {sorted(OPTIONAL)}:
    sys.modules[name] = None  # to import it raises, and find_spec finds nothing
import fastattn
import benchmarks.report, benchmarks.gpu.plot
for part in ("cli", "models", "train"):
    package = __import__("fastattn." + part, fromlist=["*"])
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        __import__(module.name)
for name in ("digits", "classify_reviews", "translate_dates"):
    runpy.run_path("examples/" + name + ".py")
sys.argv = ["fastattn", "info"]
fastattn.cli.main()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert fastattn.__version__ in run.stdout
