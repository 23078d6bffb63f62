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
#: Shared memory that one program may have, in bytes, by architecture; for 80 the least of 8.x, that of 8.6 and 8.9.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
#: The matrix instructions of the architectures, as the disassembler names them.
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
INSTRUCTIONS = (*MATRIX, "UTMALDG", "LDGSTS", "MUFU.EX2", "STL", "LDL")


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
        self.device_caches.clear()  # they are by device number, and hold the target of the first compilation
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
    """What a compiled kernel takes: per thread, per program, and how often instructions stand in its code.

    ``loop_spills`` counts the spill instructions in its innermost loops with matrix or fused multiply-add
    products; ``main_loop`` counts the instructions in the shortest of these, the one over full tiles.
    """

    registers: int
    spill_bytes: int
    loop_spills: int
    shared_bytes: int
    warps: int
    instructions: dict[str, int]
    main_loop: dict[str, int]


def tool(name: str, *arguments_: str) -> str:
    return subprocess.run([TOOLS / name, *arguments_], capture_output=True, text=True, check=True).stdout


def innermost_loops(code: str) -> list[list[str]]:
    """The instructions of each loop of a disassembly that holds no other loop."""
    instructions, labels = [], {}
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line)
        if found:
            instructions.append(found[1].strip())
    spans = []
    for at, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if target and labels.get(target[1], at + 1) <= at:
            spans.append((labels[target[1]], at + 1))
    return [
        instructions[begin:end]
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]


def count(instructions: list[str]) -> dict[str, int]:
    """How often each of INSTRUCTIONS occurs."""
    return {name: sum(text.startswith(name) for text in instructions) for name in INSTRUCTIONS}


def resources(kernel) -> Resources:
    """Read a compiled kernel's resources from its binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("cuobjdump", "--dump-resource-usage", file.name))
        code = tool("nvdisasm", "-c", file.name)
    every = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", code)
    products = [
        loop for loop in innermost_loops(code) if any(text.startswith((*MATRIX, "FFMA", "FFMA2")) for text in loop)
    ]
    counts = [count(loop) | {"all": len(loop)} for loop in products]
    return Resources(
        registers=int(usage[1]),
        spill_bytes=int(usage[2]),
        loop_spills=sum(loop["STL"] + loop["LDL"] for loop in counts),
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        instructions=count(every),
        main_loop=min(counts, key=lambda loop: loop["all"], default={}),
    )
