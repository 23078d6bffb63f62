"""Reading disassembled Hopper kernels: their main loops, what runs under a wgmma, and what breaks one in flight."""

import re


def main_loops(code: str) -> list[list[str]]:
    """The instructions of each consumer's main loop: a disassembly's innermost loops with exponentials and wgmma.

    A loop ends in a branch under a condition; one without leads back from a wait's retry, which stands far behind.
    """
    instructions, labels, conditional = [], {}, set()
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(instructions)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if found:
            text = re.sub(r"^@!?U?P\w+\s+", "", found[1].strip())
            if text != found[1].strip() or re.match(r"BRA\S* !?UP\d", text):
                conditional.add(len(instructions))
            instructions.append(text)
    spans = []
    for at, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if target and at in conditional and labels.get(target[1], at + 1) <= at:
            begin = labels[target[1]]
            body = instructions[begin : at + 1]
            if all(any(text.startswith(name) for text in body) for name in ("HGMMA", "MUFU.EX2")):
                spans.append(range(begin, at + 1))
    loops: list[range] = []
    for span in sorted(spans, key=len):  # an outer loop overlaps a shorter
        if all(span.stop <= loop.start or loop.stop <= span.start for loop in loops):
            loops.append(span)
    return [[instructions[at] for at in loop] for loop in loops]


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
