"""Where the checkout lies, how its kernels become importable, and what machine this is."""

from __future__ import annotations

import functools
import hashlib
import importlib.abc
import importlib.util
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class _KernelsFinder(importlib.abc.MetaPathFinder):
    """Resolves ``fastattn.kernels`` to the checkout's kernels/ folder, as an installation does."""

    def find_spec(self, name, path=None, target=None):
        if name != "fastattn.kernels":
            return None
        folder = ROOT / "kernels"
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def use_checkout() -> None:
    """Make ``import fastattn`` and ``fastattn.kernels`` mean this checkout. Idempotent."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if not any(isinstance(finder, _KernelsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _KernelsFinder())


#: By engine the sources that its results depend on, and those among them that it does not use.
SOURCES = {
    "hopper": (("fastattn", "kernels/hopper"), ()),
    "plain": (("fastattn", "kernels"), ("kernels/hopper",)),
    "every": (("fastattn", "kernels"), ()),
    "none": ((), ()),
}
#: Packages of fastattn that no kernel's result depends on.
ABOVE = ("fastattn/train", "fastattn/models", "fastattn/integrations", "fastattn/kernels")
#: Which engine a task runs, by its key; a task that runs several, or that is not named here, depends on every one.
ENGINES = (
    (r"^(smoke|tune|best)/hopper|/hopper$", "hopper"),
    (r"^smoke/(plain|additive)|^tune/triton|/plain$", "plain"),
    (r"^smoke/torch|^machine$|^compile/", "none"),
)


@functools.cache
def source_digest(engine: str = "every") -> str:
    """A short hash of the Python sources that an engine's results depend on."""
    folders, unused = SOURCES[engine]
    left_out = (*unused, *ABOVE)
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(tuple(f"{folder}/" for folder in left_out)):
            digest.update(name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def source_of(key: str) -> str:
    """The digest of what the task with this key depends on: an edit of one engine lets the others' results stand."""
    return source_digest(next((engine for pattern, engine in ENGINES if re.search(pattern, key)), "every"))


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a repository."""
    try:
        head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
        changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def describe_machine(device: str) -> dict:
    """Versions, processor and GPU, for the head of a result file."""
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    machine = {"cpu": cpu_name(), "cpu_count": os.cpu_count(), "system": platform.system(), "gpu": None}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        machine |= {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _driver_version(),
        }
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": source_digest(),
        "machine": machine,
        "versions": versions,
    }


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _driver_version() -> str | None:
    try:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
