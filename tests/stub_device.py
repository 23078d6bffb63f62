"""Where the stand-in for a GPU's driver (benchmarks/gpu/stub.py) can be used."""

import os
import shutil

import pytest


def needed():
    """Triton, or the calling module is skipped: the stand-in is that of Triton 3.6, and is compiled."""
    triton = pytest.importorskip("triton")
    if triton.__version__.split(".")[:2] != ["3", "6"]:
        pytest.skip("the stand-in for the driver is that of Triton 3.6", allow_module_level=True)
    if not shutil.which(os.environ.get("CC", "gcc")):
        pytest.skip("Triton's launchers need a C compiler", allow_module_level=True)
    return triton
