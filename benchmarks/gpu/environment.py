"""Where the checkout lies, how its kernels become importable, and what machine this is."""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import os
import platform
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


def source_digest() -> str:
    """A short hash of the Python sources that a result depends on: fastattn/ and kernels/."""
    digest = hashlib.sha256()
    for folder in ("fastattn", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


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
