"""The CPU engine on a machine that has only this checkout: build, test, measure, under four minutes.

    taskset -c 15 python benchmarks/device_cpu.py --out cpu.json

Needs torch, pybind11, CMake, ninja and a C++ compiler; downloads and installs nothing. It builds
fastattn/_C in place, measures the shares of the multiply-add rate of :data:`benchmarks.suite.RATES` on
one thread, each beside a probe of the rate at that moment (results are verified before timing), and runs
the CPU tests in each instruction set of the machine as far as the time goes, the best first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD_SECONDS, RATE_SECONDS = 110.0, 55.0
#: What is measured in an instruction set: (dtype, column of the table of targets). A machine's best one
#: also runs the others' 32-bit code, so "avx512" is measured only where it is the best.
MEASURED = {
    "avx512_bf16": (("bfloat16", "avx512_bf16"), ("float32", "avx512"), ("float16", "avx512")),
    "avx512": (("float32", "avx512"), ("float16", "avx512")),
    "avx2": (("float32", "avx2"),),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("device-cpu.json"), help="result file")
    parser.add_argument("--time-limit", type=float, default=230.0, help="seconds; the tests take what is left")
    parser.add_argument("--skip-build", action="store_true", help="use the extension that is there")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--rates", metavar="ISA", help=argparse.SUPPRESS)  # what the process that measures gets
    options = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))
    if options.rates:
        return _measure(options.rates)
    end = time.monotonic() + options.time_limit
    result: dict = {"schema": 1, "build": None, "tests": [], "rates": []}

    def keep() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))

    if not options.skip_build:
        result["build"] = build()
        keep()
        if result["build"]["status"] != "ok":
            print(result["build"]["output"])
            return 1
    result |= _description()
    names = result["machine"]["instruction_sets"]
    for isa in dict.fromkeys((names[0], "avx2")):
        if isa in names and isa in MEASURED:
            result["rates"] += rates(isa, RATE_SECONDS)
            keep()
    for isa in [] if options.skip_tests else names:
        left = end - time.monotonic()
        if left > 10.0:
            result["tests"].append(tests(isa, left))
            keep()
    print(table(result))
    return 0 if all(run["status"] == "ok" for run in result["tests"]) else 1


def build() -> dict:
    """The extension, in place, by the package's own build."""
    return _without_lines(_run([sys.executable, "setup.py", "build_ext", "--inplace"], BUILD_SECONDS))


def tests(isa: str, seconds: float) -> dict:
    """The CPU tests in one instruction set; pytest's last line says how many."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_cpu_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    return {"isa": isa} | _without_lines(_run(command, seconds, FASTATTN_CPU_ISA=isa))


def rates(isa: str, seconds: float) -> list[dict]:
    """The shares of the table for one instruction set, measured in a process of its own."""
    environment = {"FASTATTN_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    finished = _run([sys.executable, __file__, "--rates", isa], max(seconds, 1.0), **environment)
    rows = [json.loads(line[5:]) for line in finished.pop("lines") if line.startswith("rate ")]
    if finished["status"] != "ok":
        rows.append({"isa": isa, "workload": "", "status": finished["status"], "error": finished["output"]})
    return rows


def _measure(isa: str) -> int:
    """Print a line "rate {...}" per workload that the instruction set has a target for."""
    import torch

    from benchmarks import machine
    from benchmarks.measure import Turns, seconds_of
    from benchmarks.suite import RATE_COLUMNS, rate_entries

    torch.set_num_threads(1)
    for name, column in MEASURED[isa]:
        dtype = getattr(torch, name)
        for entry in rate_entries(dtype, RATE_COLUMNS.index(column)):
            inputs = entry.workload.make()
            inputs.check()
            turns = Turns(inputs.call("fastattn"), {}, machine.fma_probe(dtype), seconds=0.5)
            own = []
            for _ in range(turns.rounds):
                turns.run_peers()
                own.append(seconds_of(turns.run_call))
            measured = turns.summary(own, entry.workload.flops)
            target = next((t.value for t in entry.targets if t.quantity == "share"), None)
            row = {"isa": isa, "workload": str(entry.workload), "share": round(measured["share"], 3)}
            row |= {"target": target, "ceiling": measured["ceiling"], "seconds": measured["seconds"]["fastattn"]}
            print("rate " + json.dumps(row), flush=True)
    return 0


def table(result: dict) -> str:
    """What was reached, one line per workload, and how the tests ended."""
    lines = [f"{result['machine']['cpu']}: {', '.join(result['machine']['instruction_sets'])}"]
    for row in result["rates"]:
        if "share" not in row:
            lines.append(f"{row['isa']:12} {row['status']}: {row['error'][-300:]}")
            continue
        target = "" if row["target"] is None else f"  target {row['target']:.2f}"
        lines.append(f"{row['isa']:12} {row['workload']:44} {row['share']:.3f}{target}")
    for run in result["tests"]:
        lines.append(f"tests {run['isa']}: {run['status']}, {run['output'].splitlines()[-1] if run['output'] else ''}")
    return "\n".join(lines)


def _description() -> dict:
    command = [
        sys.executable,
        "-c",
        "import json; from benchmarks import machine; print(json.dumps(machine.description()))",
    ]
    finished = _run(command, 60.0)
    if finished["status"] != "ok":
        raise SystemExit(f"the extension cannot be used: {finished['output']}")
    return json.loads(finished["lines"][-1])


def _run(command: list[str], seconds: float, **environment: str) -> dict:
    """Run to the end or to the limit; "lines" is what it printed, "output" the end of all it said."""
    start = time.monotonic()
    variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    try:
        finished = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=seconds, check=False
        )
        status = "ok" if finished.returncode == 0 else f"exit status {finished.returncode}"
        printed, errors = finished.stdout, finished.stderr
    except subprocess.TimeoutExpired as expired:
        status = f"stopped after {seconds:.0f} s"
        printed, errors = (_text(stream) for stream in (expired.stdout, expired.stderr))
    output = re.sub(r"\n+", "\n", (errors + "\n" + printed).strip())[-1500:]
    took = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": took, "output": output, "lines": printed.splitlines()}


def _without_lines(run: dict) -> dict:
    return {key: value for key, value in run.items() if key != "lines"}


def _text(stream: bytes | str | None) -> str:
    return stream.decode(errors="replace") if isinstance(stream, bytes) else stream or ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
