"""Installs the package as a user does, each extra alone, and runs the commands (``make test-install``).

``python -m tests.install_checks FOLDER`` finds in FOLDER/base an environment that holds torch alone, builds a source
distribution and from it a wheel, without the C++ engine, and for each extra makes an environment over the base:

1. it installs the wheel alone, where each command that needs more must end in one line that says what to install;
2. it installs what that line says, after which each command of the extra must run, and import what its row of
   ``fastattn.needs.NEEDS`` names and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastattn.needs import NEEDS

ROOT = Path(__file__).resolve().parents[1]
PINS = [f"--constraint={ROOT / name}" for name in ("requirements.txt", "requirements-torch.txt")]
#: One line on stderr: the command, what it needs, what to install.
REFUSAL = re.compile(r"error: (.+) needs (.+): pip install '(fastattn\[(\w+)\])'\n")
#: The benchmark that is soonest done.
SHORTEST = ("-m", "pytest", "benchmarks/test_memory.py", "--part", "memory", "-k", "torch and 1024")
#: The benchmarks' pictures, of the committed result.
DRAW = """
import json, pathlib
from benchmarks.plots import plot_memory, plot_throughput
result = json.loads(next(pathlib.Path("benchmarks/results").glob("cpu-*.json")).read_text())
plot_memory(result, pathlib.Path("memory.png"))
plot_throughput(result, pathlib.Path("throughput.png"))
"""

METADATA = """
from importlib.metadata import distribution
import fastattn
about = distribution("fastattn")
assert about.version == fastattn.__version__ == "{version}", about.version
assert about.metadata["License-Expression"] == "BSD-3-Clause"
assert about.metadata["Author"] == "the fastattn contributors"
(licence,) = [file for file in about.files if file.name == "LICENSE"]
assert "the fastattn contributors" in licence.read_text()
assert not any(file.suffix == ".so" for file in about.files), "the engine was built"
assert "site-packages" in fastattn.__file__, fastattn.__file__
"""


class Environment:
    """An environment of its own, where all that ``base`` has is there too."""

    def __init__(self, folder: Path, base: Path):
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.folder, self.python = folder, folder / "bin" / "python"
        (packages,) = folder.glob("lib/python*/site-packages")
        (theirs,) = base.resolve().glob("lib/python*/site-packages")
        (packages / "base.pth").write_text(f"{theirs}\n")

    def install(self, what: str | Path) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", *PINS, what)

    def run(self, *command: str | Path, cwd: Path) -> subprocess.CompletedProcess:
        paths = {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | paths, capture_output=True, text=True)


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def build_wheel(folder: Path) -> Path:
    """The wheel that a source distribution gives where there is no C++ compiler."""
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})")
    (source,) = folder.glob("*.tar.gz")
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, source, CXX="/no/compiler", CC="/no/compiler")
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_core(environment: Environment, version: str) -> None:
    """What needs no extra works."""
    with tempfile.TemporaryDirectory() as name:
        told = environment.run("fastattn", "--version", cwd=name)
        assert (told.returncode, told.stdout) == (0, f"fastattn {version}\n"), told
        told = environment.run("python", "-c", METADATA.format(version=version), cwd=name)
        assert told.returncode == 0, told.stderr
        for command in (("info",), ("check", "--match", "decode"), ("train", "--help")):
            told = environment.run("fastattn", *command, cwd=name)
            assert told.returncode == 0 and "Traceback" not in told.stderr, told


def check_commands(environment: Environment, extra: str | None) -> None:
    """Each command ends well, having imported what its row names, or is refused.

    Args:
        extra: what is installed: none of its commands may be refused. With None all are.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = environment.run("python", ROOT / "tests" / "command_needs.py", folder, cwd=folder)
        assert told.returncode == 0, told.stderr
        rows = [json.loads(line) for line in told.stdout.splitlines()]
    for row in rows:
        refused = REFUSAL.fullmatch(row["err"])
        print(f"  {row['row']}: {'refused' if refused else 'ran'}", flush=True)
        if refused:
            assert (row["status"], row["out"], row["imported"], row["written"]) == (1, "", [], []), row
            command, _, advice, theirs = refused.groups()
            assert row["row"].startswith(command) and command in NEEDS[theirs] and theirs != extra, row
            assert advice == f"fastattn[{theirs}]", row
        else:
            assert row["status"] == 0 and extra is not None, row
            named = (names for rows in NEEDS.values() for key, names in rows.items() if row["row"].startswith(key))
            assert set(row["imported"]) == {module for names in named for module in names}, row


def check_benchmarks(environment: Environment, extra: str | None) -> None:
    """The benchmarks, which are in the checkout alone: their report needs the engine, the rest does not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
        told = environment.run("python", "-m", "benchmarks.report", "run", cwd=folder)
        if extra == "bench":
            assert "error: python -m benchmarks.report run needs the C++ engine: " in told.stderr, told
            for command in (SHORTEST, ("-c", DRAW)):
                done = environment.run("python", *command, cwd=folder)
                assert done.returncode == 0, done
        else:
            assert REFUSAL.fullmatch(told.stderr)[4] == "bench", told
        assert (told.returncode, told.stdout, told.stderr.count("\n")) == (1, "", 1), told
    print("  benchmarks", flush=True)


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as built:
        wheel = build_wheel(Path(built))
        version = wheel.name.split("-")[1]
        for extra in NEEDS:
            print(f"{extra}:", flush=True)
            environment = Environment(folder / extra, folder / "base")
            environment.install(wheel)
            if extra == next(iter(NEEDS)):
                check_core(environment, version)
                check_commands(environment, None)
                check_benchmarks(environment, None)
            environment.install(f"fastattn[{extra}]")  # as a refusal says
            check_commands(environment, extra)
            check_benchmarks(environment, extra)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
