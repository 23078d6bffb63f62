"""A warm compile cache for a run: every kernel that it needs, compiled without a GPU, and carried to one.

    python -m benchmarks.gpu.cache                 compile what is missing into FOLDER
    python -m benchmarks.gpu.cache --pack FILE     and pack what a run reads into one file

Run it under the Python version and the Triton build of the machine with the GPU: Triton's keys hash its own files, so
any other build misses everything, which costs time and nothing else. Both machines use the same folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from . import launches, stub
from .environment import use_checkout
from .pool import Task

FOLDER = Path(tempfile.gettempdir()) / "fastattn-triton-cache"
#: What Triton reads back of a kernel or a launcher; what is left out are the steps of the compilation.
KEPT = (".cubin", ".json", ".so")
GROUP = "__grp__"
LARGEST_DICTIONARY = 192 << 20


@dataclass
class Compilations:
    """What Triton was asked for in this process: by kernel name, how many were read from its cache and how many not."""

    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.hits.total()} kernels from the cache, {self.misses.total()} compiled"


@contextlib.contextmanager
def count_compilations():
    """Within, a :class:`Compilations` counts every kernel that is asked for the first time in this process."""
    from triton import knobs

    counted, before = Compilations(), knobs.compilation.listener

    def listen(*, src, metadata, metadata_group, times, cache_hit) -> None:
        (counted.hits if cache_hit else counted.misses)[src.name] += 1
        if before is not None:
            before(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)

    knobs.compilation.listener = listen
    try:
        yield counted
    finally:
        knobs.compilation.listener = before


def pack(folder: Path, file: Path) -> int:
    """Write what a run reads from a cache to ``file``, a .tar.xz; the number of files in it.

    Alike ones lie side by side, so that each tells most of the next.
    """
    import lzma

    kept = [path for path in folder.glob("*/*") if path.suffix in KEPT and not path.name.startswith(GROUP)]
    kept.sort(key=lambda path: (path.suffix, path.name, path.stat().st_size))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 2, "dict_size": LARGEST_DICTIONARY}]
    file.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(file, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for path in kept:
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            with open(path, "rb") as data:
                archive.addfile(entry, data)
    return len(kept)


def unpack(file: Path, folder: Path) -> int:
    """Fill a cache folder from a packed one; the number of kernels in it. What the folder has besides stays."""
    folder = folder.absolute()
    with tarfile.open(file, "r:xz") as archive:
        archive.extractall(folder, filter="data")
        names = [Path(name) for name in archive.getnames()]
    kernels = [name for name in names if name.suffix == ".json"]
    beside: dict[str, list[str]] = {}
    for name in names:
        beside.setdefault(name.parent.name, []).append(name.name)
    for kernel in kernels:  # Triton takes a kernel by a list of its files' places, which are this folder's
        place = folder / kernel.parent
        places = {name: str(place / name) for name in beside[kernel.parent.name]}
        (place / f"{GROUP}{kernel.name}").write_text(json.dumps({"child_paths": places}))
    return len(kernels)


def kernels_in(folder: Path) -> Counter[str]:
    """How many kernels a cache holds, by name."""
    return Counter(path.name[len(GROUP) : -len(".json")] for path in folder.glob(f"*/{GROUP}*.json"))


@dataclass
class Outcome:
    """What one task came to."""

    key: str
    seconds: float = 0.0
    hits: int = 0
    compiled: int = 0
    failures: list[str] = field(default_factory=list)
    unknown: str | None = None


def _start_worker(library: Path, folder: Path) -> None:
    from .worker import die_with_the_parent

    die_with_the_parent()
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    use_checkout()
    stub.activate(library)
    stub.without_values()
    import torch

    torch.set_num_threads(1)


def warm(task: Task) -> Outcome:
    """Launch all of a task's kernels on this process's stub."""
    import gc

    from triton.runtime.errors import OutOfResources

    from .worker import Unsupported

    outcome, start = Outcome(task.key), time.monotonic()

    def attempt(name: str, call) -> None:
        try:
            call()
        except Unsupported:
            pass
        except Exception as error:
            if isinstance(error, OutOfResources) and "direction" in task.arguments:
                return  # one of many candidates
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            outcome.failures.append(
                f"{name}: {type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
            )

    def every_call() -> None:
        for name, call in launches.calls_of(task):
            attempt(name, call)

    with count_compilations() as counted:
        try:
            attempt("list", every_call)
        finally:
            outcome.hits, outcome.compiled = counted.hits.total(), counted.misses.total()
    gc.collect()
    outcome.seconds = time.monotonic() - start
    return outcome


def count_needed(steps: list, library: Path) -> dict[str, int]:
    """By step how many kernels it needs that no step before it needs. Compiles and launches nothing."""
    from triton.runtime.jit import JITFunction

    _start_worker(library, FOLDER)
    asked: set[tuple[str, str]] = set()

    def ask(self, key: str, *others) -> None:
        asked.add((self.fn.__name__, key))  # and do without

    counts = {}
    with mock.patch.object(JITFunction, "_do_compile", ask):
        for step in steps:
            before = len(asked)
            for task in step.tasks:
                with contextlib.suppress(Exception):  # results that are not there may end a task's calls
                    for _, call in launches.calls_of(task):
                        with contextlib.suppress(Exception):
                            call()
            counts[step.name] = len(asked) - before
    return counts


def main(argv: list[str]) -> int:
    options = _parse(argv)
    chosen = re.compile(options.only)
    use_checkout()
    if options.count:
        _print_counts(options.steps)
        return 0
    tasks = [task for task in launches.planned(tuple(options.steps)) if chosen.search(task.key)]
    if options.list:
        print("\n".join(task.key for task in tasks))
        return 0
    outcomes = _warm_all(tasks, options.out, options.workers) if options.compile else []
    failed = [outcome for outcome in outcomes if outcome.failures]
    if options.pack:
        start = time.monotonic()
        count = pack(options.out, options.pack)
        size = options.pack.stat().st_size / 2**20
        print(f"{options.pack}: {count} files, {size:.1f} MiB, packed in {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help=f"the cache (default {FOLDER})")
    parser.add_argument("--steps", nargs="+", default=(), help="only what these steps of a run need")
    parser.add_argument("--only", default="", help="only tasks whose key matches this regular expression")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--count", action="store_true", help="only count the kernels that each step needs")
    parser.add_argument("--list", action="store_true", help="print the tasks' keys in their order")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="then pack the cache into this .tar.xz")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="pack what there is")
    return parser.parse_args(argv)


def _print_counts(names: list[str]) -> None:
    from .plan import steps

    chosen = [step for step in steps("cuda", "triton") if not names or step.name in names]
    with tempfile.TemporaryDirectory(prefix="fastattn-stub-") as place:
        counts = count_needed(chosen, stub.build(Path(place)))
    for name, number in counts.items():
        print(f"{name:14}{number:6}")
    print(f"{'in all':14}{sum(counts.values()):6}")


def _warm_all(tasks: list[Task], folder: Path, workers: int) -> list[Outcome]:
    """Warm the tasks in their order by several processes, saying how it goes."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start, shown, outcomes = time.monotonic(), 0.0, []

    def show(last: str) -> None:
        hits, compiled = sum(o.hits for o in outcomes), sum(o.compiled for o in outcomes)
        failures = sum(len(o.failures) for o in outcomes)
        print(
            f"{len(outcomes)}/{len(tasks)} tasks, {hits} hits, {compiled} compiled, {failures} failed calls, "
            f"{time.monotonic() - start:.0f} s{last}",
            flush=True,
        )

    with tempfile.TemporaryDirectory(prefix="fastattn-stub-") as place:
        library = stub.build(Path(place))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start_worker, (library, folder)) as pool:
            futures = {pool.submit(warm, task): task for task in tasks}
            for future in as_completed(futures):
                task = futures[future]
                try:
                    outcome = future.result()
                except BrokenProcessPool as error:
                    outcome = Outcome(task.key, failures=[f"process: {error}"])
                outcomes.append(outcome)
                for failure in outcome.failures:
                    print(f"{outcome.key}: {failure}", flush=True)
                if time.monotonic() - shown > 20.0:
                    shown = time.monotonic()
                    show(f", last {task.key}")
    show("")
    return outcomes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
