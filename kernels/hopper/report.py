"""What the compiler made of the shipped configurations, read from the machine code: no GPU needed.

``python -m fastattn.kernels.hopper.report`` prints the table.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

import torch

from fastattn.problem import Problem

from ..offline import TOOLS, compiling_for, resources, tool
from . import configs
from .launch import forward
from .launch_backward import backward

#: ptxas's advisories that it executes wgmma one by one, for want of registers or because of how they are used.
SERIALIZED = re.compile(r"\((C75(?:0[89]|1[0-4]))\)")


@dataclass(frozen=True)
class Row:
    """One kernel of one configuration, compiled for sm_90."""

    kernel: str
    head_dim: int
    causal: bool
    config: object
    shared_bytes: int
    spill_stores: int  # in the whole kernel
    loop_spills: int  # spill loads and stores in the main loop
    warnings: tuple[str, ...]  # C7510 and the like: wgmma serialised
    loop_registers: int  # highest register named in the main loop
    loop_instructions: Counter  # of the first consumer's main loop, by opcode
    exponentials: int  # MUFU.EX2 in the main loop
    exponentials_in_flight: int  # of them, issued while a wgmma is outstanding


def loops(code: str) -> list[list[str]]:
    """Bodies of the backward branches of a disassembly that hold wgmma, shortest first."""
    instructions, labels = [], {}
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if found:
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", found[1].strip()))
    bodies = []
    for at, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if target and labels.get(target[1], at + 1) <= at:
            body = instructions[labels[target[1]] : at + 1]
            if any(i.startswith("HGMMA") for i in body):
                bodies.append(body)
    return sorted(bodies, key=len)


def exponentials_in_flight(body: list[str]) -> tuple[int, int]:
    """(in flight, all): the loop's MUFU.EX2 that issue while a wgmma group is outstanding, in steady state."""
    outstanding = 0
    for _ in range(2):  # the second turn starts as every later one
        under = total = 0
        for text in body:
            if text.startswith("HGMMA") and "gsb0" in text:
                outstanding += 1
            wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", text)
            if wait:
                outstanding = min(outstanding, int(wait[1], 16))
            if "MUFU.EX2" in text:
                total += 1
                under += outstanding > 0
    return under, total


def advisories(kernel) -> tuple[str, ...]:
    """ptxas's wgmma advisories, which Triton hides."""
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(SERIALIZED.findall(result.stderr))


def read(name: str, kernel, head_dim: int, causal: bool, config) -> Row:
    """Everything about one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = tool("nvdisasm", "-c", file.name)
    body = next(body for body in loops(code) if any("MUFU.EX2" in text for text in body))
    under, total = exponentials_in_flight(body)
    found = resources(kernel)
    mix = Counter(re.split(r"[\s.]", text)[0] for text in body)
    return Row(
        kernel=name,
        head_dim=head_dim,
        causal=causal,
        config=config,
        shared_bytes=found.shared_bytes,
        spill_stores=found.instructions["STL"],
        loop_spills=mix["STL"] + mix["LDL"],
        warnings=advisories(kernel),
        loop_registers=max(int(number) for text in body for number in re.findall(r"\bR(\d+)\b", text)),
        loop_instructions=mix,
        exponentials=total,
        exponentials_in_flight=under,
    )


def compile_rows(direction: str, head_dim: int, causal: bool, config) -> list[Row]:
    """Compile one configuration through the real launch, with tensors that only have a shape's worth of memory."""
    shape = (1, 2, 256, head_dim)
    query, key, value, out, grad_out, *grads = torch.empty(8, *shape, dtype=torch.bfloat16).unbind()
    lse = torch.empty(shape[:3])
    problem = Problem(query, key, value, scale=0.1, causal="upper_left" if causal else None)
    with compiling_for(90) as compiled:
        if direction == "forward":
            forward(problem, out, lse, config)
        else:
            backward(problem, out, lse, grad_out, None, *grads, config)
    return [read(name, kernel, head_dim, causal, config) for name, kernel in compiled if name != "statistics_kernel"]


def shipped() -> list[tuple[str, int, bool, object]]:
    """(direction, head_dim, causal, config) of every configuration that is chosen by default."""
    tables = (("forward", configs.FORWARD), ("backward", configs.BACKWARD))
    return [(direction, *key, config) for direction, table in tables for key, config in table.items()]


def rows() -> list[Row]:
    """The report: every shipped configuration."""
    return [row for case in shipped() for row in compile_rows(*case)]


def table(found: list[Row]) -> str:
    """The report as Markdown."""
    lines = [
        "| kernel | D | causal | shared KB | loop spills | advisories | regs | EX2 in flight | loop instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        mix = " ".join(f"{name} {count}" for name, count in row.loop_instructions.most_common(12))
        lines.append(
            f"| {row.kernel} | {row.head_dim} | {'yes' if row.causal else 'no'} | {row.shared_bytes / 1024:.0f} "
            f"| {row.loop_spills} | {' '.join(row.warnings) or 'none'} | {row.loop_registers} "
            f"| {row.exponentials_in_flight}/{row.exponentials} | {row.loop_instructions.total()}: {mix} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(rows()))
