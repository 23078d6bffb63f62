"""Random cases on the CPU engine against the float64 reference: ``python -m tests.fuzz --cases 1000``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins takes the time of the reference

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does

from fastattn.backends import cpu
from fuzz.cases import describe, random_case
from fuzz.judge import Trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first case's; the next ones follow (default: 0)")
    parser.add_argument("--isa", action="append", help="an instruction set; may be repeated (default: all available)")
    options = parser.parse_args()
    if cpu.unavailable():
        parser.error(cpu.unavailable())
    isas = options.isa or cpu.available_isas()
    unknown = sorted(set(isas) - set(cpu.available_isas()))
    if unknown:
        parser.error(f"--isa must be one of {', '.join(cpu.available_isas())} on this machine, got {unknown[0]}")

    torch.set_num_threads(1)
    start, misses, worst = time.monotonic(), 0, (0.0, "none")
    for seed in range(options.seed, options.seed + options.cases):
        trial = Trial(random_case(seed))
        lines = []
        for isa in isas:
            for j in trial.run(isa):
                used = j.error / j.budget if j.error > 0.0 else 0.0
                worst = max(worst, (used, f"seed {seed}, {isa}, {j.name}"))
                if not j.passed:
                    figures = f"error {j.error:.3g}, allowed {j.budget:.3g} (naive {j.naive_error:.3g})"
                    lines.append(f"    {isa} {j.name}: {figures}")
        if lines:
            misses += 1
            print("\n".join([f"miss: seed {seed}: {describe(trial.case)}", *lines]), flush=True)
    print(
        f"{options.cases} cases from seed {options.seed} on {', '.join(isas)}: {misses} missed; largest error "
        f"{worst[0]:.3g} of the budget ({worst[1]}); {time.monotonic() - start:.0f} s"
    )
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
