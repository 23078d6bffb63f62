"""Compiling kernels for a GPU that is not there, through the same launches as on one, and reading what came out.

ptxas and the disassembler come inside Triton's wheel.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from . import arguments

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: Shared memory that one program may have, in bytes, by architecture.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "STL", "LDL")


class AbsentDevice:
    """As much of a Triton driver as compiling needs."""

    utils = None
    launcher_cls = None

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_capability(self, device=0):
        return divmod(self.target.arch, 10)


@contextmanager
def compiling_for(architecture: int) -> Iterator[list]:
    """Within, every launch with CPU tensors compiles for the architecture instead of running.

    Yields the list that fills with (kernel's name, compiled kernel).
    """
    compiled: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    previous = arguments.assumed_architecture, triton.runtime.driver._active
    JITFunction.run = compile_only
    arguments.assumed_architecture = architecture
    triton.runtime.driver.set_active(AbsentDevice(architecture))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        arguments.assumed_architecture, triton.runtime.driver._active = previous


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: per thread, per program, and how often instructions stand in its code."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    instructions: dict[str, int]


def tool(name: str, *arguments_: str) -> str:
    return subprocess.run([TOOLS / name, *arguments_], capture_output=True, text=True, check=True).stdout


def resources(kernel) -> Resources:
    """Read a compiled kernel's resources from its binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "--dump-resource-usage", file.name))
        code = tool("nvdisasm", "-c", file.name)
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    return Resources(int(usage[1]), int(usage[2]), kernel.metadata.shared, kernel.metadata.num_warps, counts)
