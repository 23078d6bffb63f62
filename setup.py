"""Builds the C++ extension ``fastattn._C`` with CMake and maps ``kernels/`` to ``fastattn.kernels``.

Everything else about the package is in pyproject.toml.  Environment variables of the build:

FASTATTN_BUILD_EMULATED=1   also build the avx512_bf16 kernels with the instruction emulated, for tests
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

#: Beside the extension, where it could not be built: why, and what to do. fastattn/backends/missing.py reads it.
RECORD = "_C_build_error.txt"

MISSING_EXTENSION = """
The C++ engine of fastattn was not built: {error}
{remedy}. The package is installed without it: calls on CPU tensors run on torch's own attention where that is
exact, else on the slow reference.
"""
NEEDS_COMPILER = "It needs a C++17 compiler with OpenMP, g++ or clang++: apt-get install g++"
NEEDS_TOOLS = (
    "Building it needs cmake, ninja and pybind11: pip install cmake ninja pybind11, or leave out --no-build-isolation"
)
LONGEST_ERROR = 600


class BuildError(Exception):
    """Why the extension could not be built, and what its builder should do."""

    def __init__(self, error: str, remedy: str) -> None:
        super().__init__(error)
        self.remedy = remedy


class CMakeExtension(Extension):
    """An extension whose sources are known to csrc/CMakeLists.txt."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[], optional=True)


class CMakeBuild(build_ext):
    """Configures and builds csrc/; a failure leaves the package without the extension, and says and records why."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        record = target.parent / RECORD
        target.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        try:
            self._build(target)
        except BuildError as error:
            target.unlink(missing_ok=True)
            record.write_text(f"{error}\n{error.remedy}\n", encoding="utf-8")
            print(MISSING_EXTENSION.format(error=error, remedy=error.remedy), file=sys.stderr)
            raise CompileError("the C++ engine could not be built") from error

    def _build(self, target: Path) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # A build folder that was made with other tools (an isolated build's, now gone) is of no use.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        emulated = os.environ.get("FASTATTN_BUILD_EMULATED", "0") not in ("", "0")
        try:
            import pybind11

            cmake, ninja = _tool("cmake"), _tool("ninja")
        except (ImportError, FileNotFoundError) as error:
            raise BuildError(str(error), NEEDS_TOOLS) from error
        _run(
            *(cmake, "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTATTN_OUTPUT={target}",
            f"-DFASTATTN_BUILD_EMULATED={'ON' if emulated else 'OFF'}",
        )
        _run(cmake, "--build", str(build), "--target", "_C")

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: the record goes where the extension would, and takes an older one's place."""
        super().copy_extensions_to_source()
        for extension in self.extensions:
            built = Path(self.build_lib, *extension.name.split(".")).parent / RECORD
            beside = Path(self.get_ext_fullpath(extension.name))
            record = beside.parent / RECORD
            record.unlink(missing_ok=True)
            if built.exists():
                beside.unlink(missing_ok=True)
                shutil.copyfile(built, record)


def _tool(name: str) -> str:
    """The path of a build tool: from the running interpreter's environment, else from PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} was not found")
    return found


def _run(*command: str) -> None:
    """Run the command and show what it prints; raise BuildError with what tells most of that if it fails."""
    lines = []
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as run:
            for line in run.stdout:
                print(line, end="", flush=True)
                lines.append(line)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error})", NEEDS_TOOLS) from error
    if run.returncode != 0:
        raise BuildError(telling(lines) or f"{command[0]} ended with status {run.returncode}", NEEDS_COMPILER)


def telling(lines: list[str]) -> str:
    """What says most in the output of a build that failed, in one line: CMake's error, or the compiler's first."""
    lines = [line.rstrip() for line in lines]
    start = next((i for i, line in enumerate(lines) if line.startswith("CMake Error")), None)
    if start is not None:
        # What CMake says of an error is indented, and goes on past empty lines.
        end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
        found = lines[start:end]
    else:
        first = next((i for i, line in enumerate(lines) if "error:" in line), None)
        found = lines[-3:] if first is None else lines[first : first + 1]
        if first and "ld returned" in lines[first]:  # the linker has told before what it lacks
            found = lines[first - 1 : first + 1]
    found = " ".join(" ".join(found).split())
    return found if len(found) <= LONGEST_ERROR else f"{found[:LONGEST_ERROR]}..."


setup(
    packages=[
        *find_namespace_packages(include=["fastattn", "fastattn.*"], exclude=["fastattn.kernels*"]),
        "fastattn.kernels",
        *(f"fastattn.{package}" for package in find_namespace_packages(include=["kernels.*"])),
    ],
    package_dir={"fastattn.kernels": "kernels"},
    ext_modules=[CMakeExtension("fastattn._C")],
    cmdclass={"build_ext": CMakeBuild},
)
