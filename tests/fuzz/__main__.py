"""Random cases on the CPU engine against the float64 reference."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first case's; the next ones follow (default: 0)")
    parser.add_argument("--isa", action="append", help="an instruction set; may be repeated (default: all available)")
    parser.add_argument("--extension", type=Path, help="a build of the engine other than the installed one")
    parser.add_argument("--progress", action="store_true", help="name each case before it runs, for one that crashes")
    options = parser.parse_args()

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins takes the time of the reference
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest does
    if options.extension:
        load_extension(options.extension)

    import torch

    from fastattn.backends import cpu

    if cpu.unavailable():
        parser.error(cpu.unavailable())
    available = cpu.available_isas()
    unknown = sorted(set(options.isa or ()) - set(available))
    if unknown:
        parser.error(f"--isa must be one of {', '.join(available)} on this machine, got {unknown[0]}")
    torch.set_num_threads(1)
    return run(range(options.seed, options.seed + options.cases), options.isa or available, options.progress)


def load_extension(path: Path) -> None:
    """Make a file the module fastattn._C, before the package looks for its own."""
    spec = importlib.util.spec_from_file_location("fastattn._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastattn._C"] = module


def run(seeds: range, isas: list[str], progress: bool) -> int:
    """Judge each seed's case on each instruction set; 1 if some result misses its budget."""
    from fuzz.cases import describe, random_case
    from fuzz.judge import Trial

    start, misses, worst = time.monotonic(), 0, (0.0, "none")
    for seed in seeds:
        trial = Trial(random_case(seed))
        lines = []
        for isa in isas:
            if progress:
                print(f"\rseed {seed}, {isa}", end=" " * 20, file=sys.stderr, flush=True)
            for j in trial.run(isa):
                used = j.error / j.budget if j.error > 0.0 else 0.0
                worst = max(worst, (used, f"seed {seed}, {isa}, {j.name}"))
                if not j.passed:
                    figures = f"error {j.error:.3g}, allowed {j.budget:.3g} (naive {j.naive_error:.3g})"
                    lines.append(f"    {isa} {j.name}: {figures}")
        if lines:
            misses += 1
            print("\n".join([f"miss: seed {seed}: {describe(trial.case)}", *lines]), flush=True)
    if progress:
        print(file=sys.stderr)
    print(
        f"{len(seeds)} cases from seed {seeds.start} on {', '.join(isas)}: {misses} missed; largest error "
        f"{worst[0]:.3g} of the budget ({worst[1]}); {time.monotonic() - start:.0f} s"
    )
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
