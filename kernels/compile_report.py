"""Every plain kernel and configuration compiled for GPUs that are not there, and what the compiler made of it.

``python -m fastattn.kernels.compile_report`` writes benchmarks/results/gpu_compile_report.{json,md}; with
``--check`` it compiles the most used configurations and one of each kernel, and writes nothing; with ``--changed`` it
keeps the rows of the last report that are still asked for. It fails where a rule is broken.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from fastattn.problem import Problem, make_problem

from . import launch
from .configs import CANDIDATES, TABLE, Config, choose
from .offline import SHARED_MEMORY, Resources, compiling_for, resources

ARCHITECTURES = tuple(SHARED_MEMORY)
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu_compile_report"
MAIN_KERNELS = ("forward", "grad_key_value", "grad_query")
#: The matrix instruction that a main kernel for 2-byte elements has to use, up to this head dimension.
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
LARGEST_TILED = 128
#: Beside causal calls: those that look at every element of the scores.
ELEMENTWISE_CALLS = ("mask", "bias", "dropout")
#: The call that asks for the most shared memory: tiles of a mask and of a bias are loaded ahead, once for each of the
#: loops over the band's left border, full tiles and right border. It may spill: tiles so small that it does not would
#: slow the usual calls.
EVERYTHING = "everything"
#: (kernel, architecture, head dimension) where it comes closest to what there is.
LARGEST = (("forward", 90, 128), ("grad_query", 90, 128))
DTYPE = {2: torch.bfloat16, 4: torch.float32}
#: What a launch compiles beside the kernel that its configuration is for.
HELPERS = ("row_statistics", "split_large_lse", "combine_parts", "mark_nonfinite")


@dataclass(frozen=True)
class Job:
    """One kernel's configuration for one architecture."""

    kernel: str
    element_size: int
    head_dim: int
    architecture: int
    config: Config
    call: str = "causal"


@dataclass(frozen=True)
class Row:
    """A job and what came of it; ``broken`` names the rules that it breaks."""

    job: Job
    resources: Resources | None
    broken: tuple[str, ...]


def jobs(candidates: bool = False) -> Iterator[Job]:
    """The chosen configuration of every kernel, element size, head dimension and architecture."""
    for kernel, element_size, head_dim in TABLE:
        for architecture in ARCHITECTURES:
            config = choose(kernel, element_size, head_dim, architecture)
            yield Job(kernel, element_size, head_dim, architecture, config)
            if kernel in MAIN_KERNELS and element_size == 2 and head_dim in (64, 128):
                config = choose(kernel, element_size, head_dim, architecture, elementwise=True)
                for call in ELEMENTWISE_CALLS:
                    yield Job(kernel, element_size, head_dim, architecture, config, call)
            config = choose(kernel, element_size, head_dim, architecture, elementwise=True)
            if loads_ahead(kernel, element_size, architecture, config):
                yield Job(kernel, element_size, head_dim, architecture, config, EVERYTHING)
    if candidates:
        for (kernel, head_dim), configs in CANDIDATES.items():
            yield from (Job(kernel, 2, head_dim, 90, config) for config in configs)


def loads_ahead(kernel: str, element_size: int, architecture: int, config: Config) -> bool:
    """Whether a call with everything may ask for more shared memory than there is.

    Without tensor cores, and beside the main kernels, all architectures take the tile of the one with the least.
    """
    tuned = kernel in MAIN_KERNELS and element_size == 2
    return config.num_stages > 1 and (tuned or architecture == ARCHITECTURES[0])


def most_used(job: Job) -> bool:
    if job.call == EVERYTHING:
        return job.element_size == 2 and (job.kernel, job.architecture, job.head_dim) in LARGEST
    if job.call != "causal":
        return job.call == "mask" and (job.architecture, job.head_dim) == (90, 128)
    return job.element_size == 2 and (
        (job.kernel in MAIN_KERNELS and job.head_dim in (64, 128))
        or (job.kernel in ("decode", "weights") and job.head_dim == 128)
        or (job.kernel == "grad_bias" and job.head_dim == 64)
    )


def problem_of(job: Job) -> Problem:
    """A problem that launches the job's kernel; causal ones have loops over full and over border tiles."""
    queries, dtype = (1 if job.kernel == "decode" else 1024), DTYPE[job.element_size]
    shapes = ((1, 2, queries, job.head_dim), (1, 2, 1024, job.head_dim), (1, 2, 1024, job.head_dim))
    query, key, value = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    if job.call == EVERYTHING:
        mask = torch.ones(queries, 1024, dtype=torch.bool)
        band = {"causal": "lower_right", "window": (64, 32), "key_lengths": torch.tensor([100])}
        if job.kernel != "decode":  # dropout is never split over keys
            band |= {"dropout_p": 0.1, "rng_state": torch.tensor([1, 2])}
        bias = torch.zeros(queries, 1024, dtype=dtype).expand(1, 2, queries, 1024)
        return make_problem(query, key, value, mask, **band)._replace(bias=bias)
    if job.call == "dropout":
        return make_problem(query, key, value, dropout_p=0.1, rng_state=torch.tensor([1, 2]))
    if job.call == "mask":
        return make_problem(query, key, value, torch.ones(queries, 1024, dtype=torch.bool))
    has_bias = job.call == "bias" or job.kernel == "grad_bias"
    bias = torch.zeros(queries, 1024, dtype=dtype) if has_bias else None
    return make_problem(query, key, value, bias, causal="lower_right" if job.call == "causal" else None)


def compiled(job: Job):
    """The job's compiled kernel, by the launch that would run it."""
    problem = problem_of(job)
    out = torch.zeros_like(problem.query)
    lse = torch.zeros(out.shape[:3])
    with compiling_for(job.architecture) as kernels:
        if job.kernel == "forward":
            launch.forward(problem, out, lse, job.config)
        elif job.kernel == "decode":
            launch.decode(problem, out, lse, 2, job.config)
        elif job.kernel == "weights":
            launch.weights(problem, lse, torch.zeros(1, 1024, 1024), True, job.config)
        else:
            gradients = {"grad_query": None, "grad_key": None, "grad_value": None, "grad_bias": None}
            if job.kernel == "grad_query":
                gradients["grad_query"] = problem.query
            elif job.kernel == "grad_key_value":
                gradients |= {"grad_key": problem.key, "grad_value": problem.value}
            else:
                gradients["grad_bias"] = torch.zeros(1, 1, 1024, 1024)
            names = ("key_value_config", "query_config", "bias_config")
            launch.backward(problem, out, lse, out, None, **gradients, **dict.fromkeys(names, job.config))
    (kernel,) = (kernel for name, kernel in kernels if name not in HELPERS)
    return kernel


def row_of(job: Job) -> Row:
    """Compile a job and judge it."""
    try:
        found = resources(compiled(job))
    except Exception as error:  # whatever the compiler raises is this row's result
        return Row(job, None, (f"does not compile: {type(error).__name__}: {error}"[:300],))
    broken = []
    if found.loop_spills and job.call != EVERYTHING:
        broken.append(f"{found.loop_spills} spill instructions in its loops")
    if found.shared_bytes > SHARED_MEMORY[job.architecture]:
        broken.append(f"{found.shared_bytes} bytes of shared memory, {SHARED_MEMORY[job.architecture]} are there")
    instruction = MATRIX_INSTRUCTION[job.architecture]
    tiled = job.kernel in MAIN_KERNELS and job.element_size == 2 and job.head_dim <= LARGEST_TILED
    if tiled and not found.instructions[instruction]:
        broken.append(f"no {instruction}")
    return Row(job, found, tuple(broken))


def compile_alone(job: Job) -> Row:
    """A job's row from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(row_of, job).result()
        except BrokenProcessPool as error:
            return Row(job, None, (f"the compiler ended: {error}",))


def compile_all(wanted: list[Job], workers: int) -> list[Row]:
    """Rows of all jobs, from several processes; the compiler may end a process that it cannot serve."""
    rows = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future, job in [(pool.submit(row_of, job), job) for job in wanted]:
            try:
                rows.append(future.result())
            except BrokenProcessPool:  # by this job or by another one
                rows.append(compile_alone(job))
            print(line(rows[-1]), file=sys.stderr, flush=True)
    return rows


def write(rows: list[Row]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    document = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
    RESULTS.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown(rows))


def last_rows() -> dict[Job, Row]:
    """The rows of the last report by their jobs; none of another Triton's."""
    document = json.loads(RESULTS.with_suffix(".json").read_text())
    rows = {}
    for row in document["rows"] if document["triton"] == triton.__version__ else ():
        job = Job(**row["job"] | {"config": Config(**row["job"]["config"])})
        rows[job] = Row(job, row["resources"] and Resources(**row["resources"]), tuple(row["broken"]))
    return rows


def line(row: Row) -> str:
    """A row of the table."""
    job, found, config = row.job, row.resources, row.job.config
    tile = f"{config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} stages"
    tile += ", TMA" if config.tma else ""
    cells = [job.kernel, job.call, DTYPE[job.element_size], job.head_dim, f"sm_{job.architecture}", tile]
    if found is None:
        cells += [""] * 4
    else:
        mix = ", ".join(f"{name} {number}" for name, number in found.main_loop.items() if number)
        cells += [found.registers, found.loop_spills, f"{found.shared_bytes / 1024:.0f}", mix]
    cells.append("; ".join(row.broken))
    return "| " + " | ".join(str(cell).replace("torch.", "").replace("|", "/") for cell in cells) + " |"


def markdown(rows: list[Row]) -> str:
    head = ("kernel", "call", "dtype", "head dim", "for", "configuration", "registers", "spills in loops", "shared KiB")
    head += ("main loop", "broken rules")
    lines = [
        "# The GPU kernels as compiled",
        "",
        f"Triton {triton.__version__}, no GPU needed. Main loop: its instructions by kind, the tile's",
        "matrix products among them (HMMA on Ampere, HGMMA on Hopper, UTCHMMA on Blackwell).",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *map(line, rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="the most used configurations only, and one of each kernel; write nothing"
    )
    parser.add_argument("--candidates", action="store_true", help="also what python -m benchmarks.gpu tune ranks")
    parser.add_argument(
        "--changed", action="store_true", help="compile what the last report lacks: where only configurations changed"
    )
    parser.add_argument("--kernel", help="only this kernel")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    wanted = [job for job in jobs(options.candidates) if options.kernel in (None, job.kernel)]
    if options.check:
        wanted = [job for job in wanted if most_used(job)]
    kept = last_rows() if options.changed else {}
    compiled_now = {row.job: row for row in compile_all([job for job in wanted if job not in kept], options.workers)}
    rows = [kept.get(job) or compiled_now[job] for job in wanted]
    if not options.check:
        write(rows)
    broken = [row for row in rows if row.broken]
    print(f"{len(rows)} compiled, {len(broken)} break a rule")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
