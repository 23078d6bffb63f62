"""What the compiler made of the Hopper kernels, read from the machine code: no GPU needed.

``python -m fastattn.kernels.hopper.report`` compiles the configurations that are chosen by default, and with
``--candidates`` the others too, writes the table to benchmarks/results/ (not with ``--check``), and fails where a
chosen one breaks a rule of :func:`broken_rules`.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.nvidia.compiler import get_ptxas

from fastattn.problem import Problem

from ..offline import SHARED_MEMORY, compiling_for, resources, tool
from . import configs
from .cycle_model import TileCycles, tile_cycles
from .launch import forward
from .launch_backward import backward
from .machine_code import Disassembly, exponentials_in_flight, main_loops, overwritten_in_flight

#: ptxas's advisories that it executes wgmma one by one, for want of registers or because of how they are used.
SERIALIZED = re.compile(r"\((C75(?:0[89]|1[0-4]))\)")
#: The share of the main loops' exponentials that must issue under a wgmma of the same warpgroup.
OVERLAP = 0.95
#: The warpgroup of dV has none to issue them under, the one of dK has.
OVERLAP_OF = {"gradients_of_wide_keys": 0.5}
#: Fields of a problem with a batch of one: what the kernels are compiled for beside a head dimension.
MASKS = {
    "none": {},
    "causal": {"causal": "upper_left"},
    "lengths": {"key_lengths": torch.tensor([100])},
    "causal, lengths": {"causal": "upper_left", "key_lengths": torch.tensor([100])},
    "window, lengths": {"window_left": 64, "window_right": 32, "key_lengths": torch.tensor([100])},
}
#: Those of each table of configs.py, by whether it is for bands.
MASKS_OF = {
    ("forward", False): ("none", "lengths"),
    ("forward", True): ("causal", "causal, lengths", "window, lengths"),
    ("backward", False): ("none", "lengths"),
    ("backward", True): ("causal", "window, lengths"),
}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One kernel of one configuration, compiled for sm_90."""

    kernel: str
    head_dim: int
    mask: str  # of MASKS
    name: str  # of the configuration
    config: object
    shared_bytes: int
    spill_stores: int  # in the whole kernel
    warnings: tuple[str, ...]  # C7510 and the like: wgmma serialised
    # of the consumers' main loops
    loop_spills: int  # spill loads and stores
    overwritten: int  # instructions that break a wgmma in flight
    loop_registers: int  # highest register named
    exponentials: int  # MUFU.EX2
    exponentials_in_flight: int  # of them, issued while a wgmma is outstanding
    loop_instructions: Counter  # by opcode, of the first consumer
    cycles: TileCycles  # by the model of cycle_model.py


def advisories(kernel) -> tuple[str, ...]:
    """The wgmma advisories, which Triton hides, of the ptxas that it compiles for Hopper with."""
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(SERIALIZED.findall(result.stderr))


def read(kernel_name: str, kernel, head_dim: int, mask: str, name: str, config) -> Row:
    """Everything about one compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = tool("nvdisasm", "-c", file.name)
    loops = main_loops(code)
    work = Disassembly.read(code).work_loops()
    if len(work) != len(loops):  # a kernel with one work tile per program
        work = [([], loop, []) for loop in loops]
    in_flight = [exponentials_in_flight(loop) for loop in loops]
    everything = [text for loop in loops for text in loop]
    found = resources(kernel)
    return Row(
        kernel=kernel_name,
        head_dim=head_dim,
        mask=mask,
        name=name,
        config=config,
        shared_bytes=found.shared_bytes,
        spill_stores=found.instructions["STL"],
        warnings=advisories(kernel),
        loop_spills=sum(text.startswith(("STL", "LDL")) for text in everything),
        overwritten=sum(len(overwritten_in_flight(loop)) for loop in loops),
        loop_registers=max(int(number) for text in everything for number in re.findall(r"\bR(\d+)\b", text)),
        exponentials=sum(total for _, total in in_flight),
        exponentials_in_flight=sum(under for under, _ in in_flight),
        loop_instructions=Counter(re.split(r"[\s.]", text)[0] for text in loops[0]),
        cycles=tile_cycles(work),
    )


def broken_rules(row: Row) -> list[str]:
    """What is wrong with a compiled kernel.

    The asynchrony that a configuration switches off is not asked of it.
    """
    broken = []
    if not row.loop_instructions["HGMMA"]:
        broken.append("no wgmma in the main loops")
    if row.warnings:
        broken.append(f"wgmma serialised ({', '.join(row.warnings)})")
    if row.overwritten:
        broken.append(f"{row.overwritten} instructions overwrite a wgmma in flight")
    if row.loop_spills:
        broken.append(f"{row.loop_spills} spill instructions in the main loops")
    if row.shared_bytes > SHARED_MEMORY[90]:
        broken.append(f"{row.shared_bytes} bytes of shared memory, {SHARED_MEMORY[90]} are there")
    if row.loop_registers >= row.config.most_registers:
        broken.append(f"register {row.loop_registers}, {row.config.most_registers} are there")
    wanted = OVERLAP_OF.get(row.kernel, OVERLAP)
    if getattr(row.config, "overlap", True) and row.exponentials_in_flight < wanted * row.exponentials:
        broken.append(f"{row.exponentials_in_flight} of {row.exponentials} exponentials under a product")
    return broken


def compile_rows(direction: str, head_dim: int, mask: str, name: str, config) -> list[Row]:
    """Compile one configuration through the real launch, with tensors that only have a shape's worth of memory."""
    shape = (1, 2, 256, head_dim)
    query, key, value, out, grad_out, *grads = torch.empty(8, *shape, dtype=torch.bfloat16).unbind()
    lse = torch.empty(shape[:3])
    problem = Problem(query, key, value, scale=0.1, **MASKS[mask])
    with compiling_for(90) as compiled:
        if direction == "forward":
            forward(problem, out, lse, config)
        else:
            backward(problem, out, lse, grad_out, None, *grads, config)
    return [
        read(kernel_name, kernel, head_dim, mask, name, config)
        for kernel_name, kernel in compiled
        if kernel_name != "statistics_kernel"
    ]


def shipped() -> list[tuple[str, int, str, str, object]]:
    """(direction, columns, mask, name, config) of every configuration that is chosen by default."""
    tables = (("forward", configs.FORWARD), ("backward", configs.BACKWARD))
    return [
        (direction, columns, mask, "chosen", config)
        for direction, table in tables
        for (columns, banded), config in table.items()
        for mask in MASKS_OF[direction, banded]
    ]


def candidates(named_with: str = "") -> list[tuple[str, int, str, str, object]]:
    """The same for what ``python -m benchmarks.gpu tune`` ranks beside them, if its name has ``named_with`` in it."""
    tables = (("forward", configs.FORWARD_CANDIDATES), ("backward", configs.BACKWARD_CANDIDATES))
    chosen = {(direction, columns, config) for direction, columns, _, _, config in shipped()}
    return [
        (direction, columns, mask, name, config)
        for direction, table in tables
        for columns, named in table.items()
        for name, config in named.items()
        if named_with in name and (direction, columns, config) not in chosen
        for mask in ("none", "causal")
    ]


def line(row: Row) -> str:
    """A row of the table."""
    mix = " ".join(f"{name} {count}" for name, count in row.loop_instructions.most_common(12))
    cells = (
        row.kernel,
        row.head_dim,
        row.mask,
        row.name,
        f"{row.shared_bytes / 1024:.0f}",
        row.loop_registers,
        f"{row.loop_spills} / {row.spill_stores}",
        " ".join(row.warnings) or "none",
        row.overwritten,
        f"{row.exponentials_in_flight}/{row.exponentials}",
        f"{row.cycles.turn:.0f} / {row.cycles.products:.0f}",
        f"{row.loop_instructions.total()}: {mix}",
        "; ".join(broken_rules(row)),
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def document(found: list[Row]) -> str:
    """The report as Markdown."""
    heads = ("kernel", "D", "mask", "configuration", "shared KiB", "registers", "spills in loop / all", "advisories")
    heads += ("overwritten", "EX2 in flight", "cycles / of products", "instructions", "broken rules")
    lines = [
        "# The Hopper kernels as compiled",
        "",
        f"Triton {triton.__version__} with ptxas {get_ptxas(90).version}, bf16, for sm_90; no GPU needed. Of the main",
        "loops of the consumers: the highest register, spill instructions (and spill stores in the whole kernel), the",
        "instructions that overwrite a register of a wgmma in flight, the exponentials that issue under one, and the",
        "first loop's instructions by opcode; of a turn of all consumers the cycles that kernels/hopper/cycle_model.py",
        "predicts, and those that its products need. Advisories: ptxas says that it runs wgmma one by one.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *map(line, found),
        "",
        "Beside it the prototype's best schedule (forward, D = 128, 128 x 128, Triton 3.6.0): 64 wgmma in the kernel,",
        "no spills, 164 KiB, 66 of 66 exponentials in flight. With P V in flight over the back edge, 86 instructions",
        "of each such loop overwrote registers of those products, and Triton 3.9 serialised them (C7512).",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--candidates",
        nargs="?",
        const="",
        metavar="NAME",
        help="also what python -m benchmarks.gpu tune ranks (of it what has NAME in its name)",
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    wanted = shipped() + ([] if options.candidates is None else candidates(options.candidates))
    rows = []
    for case in wanted:
        for row in compile_rows(*case):
            rows.append(row)
            print(line(row), file=sys.stderr, flush=True)
    if not options.check:
        (RESULTS / f"hopper_compile_report_triton_{triton.__version__}.md").write_text(document(rows))
    broken = [row for row in rows if row.name == "chosen" and broken_rules(row)]
    print(f"{len(rows)} compiled, {len(broken)} of the chosen break a rule")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
