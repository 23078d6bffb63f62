"""Reading disassembled Hopper kernels: their main loops, what runs under a wgmma, and what breaks one in flight."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Disassembly:
    """A kernel's instructions without their predicates, and where its branches lead."""

    instructions: list[str]
    branches: dict[int, int]  # index -> target
    conditional: set[int]  # those of them under a condition

    @classmethod
    def read(cls, code: str) -> "Disassembly":
        """From what nvdisasm prints."""
        instructions, labels, branches, conditional = [], {}, {}, set()
        for line in code.splitlines():
            label = re.match(r"\s*(\.L_x_\d+):", line)
            if label:
                labels[label[1]] = len(instructions)
            found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
            if not found:
                continue
            text = re.sub(r"^@!?U?P\w+\s+", "", found[1].strip())
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
            if target:
                branches[len(instructions)] = target[1]
                if text != found[1].strip() or re.match(r"BRA\S* !?UP\d", text):
                    conditional.add(len(instructions))
            instructions.append(text)
        return cls(instructions, {at: labels[label] for at, label in branches.items() if label in labels}, conditional)

    def loops(self) -> list[range]:
        """The spans that a branch leads back over.

        Not those of a wait's retry: it stands far behind, and an unconditional branch leads from it into a loop.
        """
        return [
            range(target, at + 1)
            for at, target in self.branches.items()
            if target <= at and (at in self.conditional or "TRYWAIT" not in self.instructions[at - 2])
        ]

    def main_loops(self) -> list[range]:
        """The innermost loops with exponentials and wgmma, in the order of their length."""
        spans = []
        for span in self.loops():
            body = self.instructions[span.start : span.stop]
            if all(any(text.startswith(name) for text in body) for name in ("HGMMA", "MUFU.EX2")):
                spans.append(span)
        found: list[range] = []
        for span in sorted(spans, key=len):  # an outer loop overlaps a shorter
            if all(span.stop <= loop.start or loop.stop <= span.start for loop in found):
                found.append(span)
        return found

    def executed(self, span: range) -> list[str]:
        """A span's instructions on the way that takes every branch forward within it: tiles without a mask."""
        found, at = [], span.start
        while at < span.stop:
            found.append(self.instructions[at])
            target = self.branches.get(at, 0)
            at = target if at < target < span.stop else at + 1
        return found

    def work_loops(self) -> list[tuple[list[str], list[str], list[str]]]:
        """What each consumer executes for a work tile: (before, a turn of its main loop, after)."""
        found = []
        for inner in self.main_loops():
            around = [span for span in self.loops() if span.start < inner.start and inner.stop < span.stop]
            if around:
                outer = min(around, key=len)
                pieces = (range(outer.start, inner.start), inner, range(inner.stop, outer.stop))
                found.append(tuple(self.executed(piece) for piece in pieces))
        return found


def main_loops(code: str) -> list[list[str]]:
    """The instructions of each consumer's main loop."""
    read = Disassembly.read(code)
    return [read.instructions[span.start : span.stop] for span in read.main_loops()]


def _groups_left(text: str) -> int | None:
    """How many wgmma groups may still be in flight after this instruction, if it is a wait."""
    wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", text)
    return int(wait[1], 16) if wait else None


def exponentials_in_flight(body: list[str]) -> tuple[int, int]:
    """(in flight, all): the loop's MUFU.EX2 that issue while a wgmma group is outstanding, in steady state."""
    outstanding = 0
    for _ in range(2):  # the second turn starts as every later one
        under = total = 0
        for text in body:
            if text.startswith("HGMMA") and "gsb0" in text:
                outstanding += 1
            left = _groups_left(text)
            if left is not None:
                outstanding = min(outstanding, left)
            if "MUFU.EX2" in text:
                total += 1
                under += outstanding > 0
    return under, total


def registers_of_product(text: str) -> set[int]:
    """The registers that an HGMMA accumulates in, or reads its left operand from."""
    found = re.match(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+)|gdesc)", text)
    if not found:
        raise ValueError(f"not understood: {text}")
    accumulator = int(found[2])
    used = set(range(accumulator, accumulator + int(found[1]) // 2))
    if found[3]:
        used |= set(range(int(found[3]), int(found[3]) + 4))
    return used


def written_registers(text: str) -> set[int]:
    """The registers that an instruction other than HGMMA writes: those of its first operand."""
    found = re.match(r"([A-Z]\S*) (?:U?P\w, )?R(\d+)\b", text)
    if not found:
        return set()
    modifiers = found[1].split(".")
    width = 4 if "128" in modifiers else 2 if "64" in modifiers or "WIDE" in modifiers else 1
    return set(range(int(found[2]), int(found[2]) + width))


def overwritten_in_flight(body: list[str]) -> list[str]:
    """The loop's instructions that write a register of a wgmma in flight, in steady state.

    PTX leaves undefined what a wgmma does whose registers change before a wait for it (wgmma.wait_group); Triton 3.6
    does not keep a loop from asking for it (triton-lang/triton issue 9433).
    """
    groups: list[set[int]] = []
    group: set[int] = set()
    for _ in range(2):  # the second turn starts as every later one
        found = []
        for text in body:
            if text.startswith("HGMMA"):
                group = group | registers_of_product(text)
                if "gsb0" in text:
                    groups, group = [*groups, group], set()
                continue
            left = _groups_left(text)
            if left is not None:
                groups = groups[len(groups) - left :] if left else []
            if written_registers(text) & group.union(*groups):
                found.append(text)
    return found
