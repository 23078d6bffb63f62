"""setup.py: what it says and records where the C++ engine cannot be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.backends import missing

ROOT = Path(__file__).resolve().parents[1]
CMAKE = """
cmake_minimum_required(VERSION 3.20)
project(fastattn LANGUAGES {languages})
add_custom_target(_C {command})
"""
BUILDS = 'COMMAND ${CMAKE_COMMAND} -E touch "${FASTATTN_OUTPUT}"'

pytest.importorskip("pybind11")
pytest.importorskip("setuptools")


def find_tool(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


pytestmark = pytest.mark.skipif(not (find_tool("cmake") and find_tool("ninja")), reason="no cmake, or no ninja")


class Tree:
    """A source tree with a small build in place of the engine's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "fastattn"
        for path in (self.package, folder / "kernels", folder / "csrc"):
            path.mkdir()
            (path / "__init__.py").touch()
        shutil.copy(ROOT / "setup.py", folder)

    def build(self, command: str, languages: str = "NONE", *options: str, **environment: str) -> str:
        """What building in place prints."""
        (self.folder / "csrc" / "CMakeLists.txt").write_text(CMAKE.format(languages=languages, command=command))
        run = subprocess.run(
            [sys.executable, "setup.py", "build_ext", *(options or ("--inplace",))],
            cwd=self.folder,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr  # the package can be installed without its engine
        return run.stdout + run.stderr

    def extensions(self, folder: Path | None = None) -> list[Path]:
        return list((folder or self.package).glob("_C.*"))

    def record(self, folder: Path | None = None) -> list[str]:
        return ((folder or self.package) / missing.RECORD).read_text().splitlines()


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_what_a_compiler_says_is_shown_and_recorded_until_a_build_succeeds(tree):
    tree.build(BUILDS)
    assert len(tree.extensions()) == 1
    (tree.folder / "csrc" / "compiler").write_text("echo 'x.cpp:3:1: error: int8 is older than C++17'; exit 1\n")
    printed = tree.build("COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/compiler")
    assert "x.cpp:3:1: error: int8 is older than C++17" in printed
    assert "The C++ engine of fastattn was not built: x.cpp:3:1" in printed
    assert not tree.extensions()  # of older sources
    cause, remedy = tree.record()
    assert cause == "x.cpp:3:1: error: int8 is older than C++17"
    assert remedy.endswith("g++ or clang++: apt-get install g++")
    tree.build(BUILDS)
    assert len(tree.extensions()) == 1
    assert not (tree.package / missing.RECORD).exists()


def test_a_missing_compiler_is_recorded_in_what_becomes_a_wheel(tree):
    library = tree.folder / "wheel"
    tree.build(BUILDS, "CXX", "--build-lib", str(library), CXX=str(tree.folder / "no compiler"))
    cause, remedy = tree.record(library / "fastattn")
    assert cause.startswith("CMake Error at ")
    assert "variable CXX" in cause and "no compiler" in cause
    assert "g++" in remedy


def test_a_compiler_that_does_not_work_is_recorded(tree):
    compiler = tree.folder / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++: out of order' >&2; exit 1\n")
    compiler.chmod(0o755)
    tree.build(BUILDS, "CXX", CXX=str(compiler))
    cause, _ = tree.record()
    assert "is not able to compile a simple test program" in cause


def test_missing_tools_are_recorded(tree):
    (tree.folder / "pybind11.py").write_text("raise ModuleNotFoundError(\"No module named 'pybind11'\")")
    tree.build(BUILDS)
    cause, remedy = tree.record()
    assert cause == "No module named 'pybind11'"
    assert "pip install cmake ninja pybind11" in remedy
