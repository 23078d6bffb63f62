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

MISSING_EXTENSION = """
The C++ engine of fastattn was not built: {error}.
The package is installed without it, and calls on CPU tensors run on the slow reference. The engine needs a
C++17 compiler (g++ or clang++ with OpenMP); install one and run pip install again.
"""


class CMakeExtension(Extension):
    """An extension whose sources are known to csrc/CMakeLists.txt."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[], optional=True)


class CMakeBuild(build_ext):
    """Configures and builds csrc/; a failure leaves the package without the extension and says so."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A build folder that was made with other tools (an isolated build's, now gone) is of no use.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        emulated = os.environ.get("FASTATTN_BUILD_EMULATED", "0") not in ("", "0")
        try:
            import pybind11

            configure = [
                _tool("cmake"),
                *("-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
                f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DFASTATTN_OUTPUT={target}",
                f"-DFASTATTN_BUILD_EMULATED={'ON' if emulated else 'OFF'}",
            ]
            subprocess.run(configure, check=True)
            subprocess.run([_tool("cmake"), "--build", str(build), "--target", "_C"], check=True)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            print(MISSING_EXTENSION.format(error=error), file=sys.stderr)
            raise CompileError("the C++ engine could not be built") from error


def _tool(name: str) -> str:
    """The path of a build tool: from the running interpreter's environment, else from PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} was not found")
    return found


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
