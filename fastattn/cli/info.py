"""``fastattn info``: what is installed, what the machine has, and what each backend can do with it."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

import fastattn
from fastattn import dispatch
from fastattn.backends import cpu
from fastattn.cli.console import DTYPES, console
from fastattn.testing import Case

PACKAGES = ("numpy", "triton", "tokenizers", "scikit-learn", "pycocotools", "onnxruntime")

_SMALL = Case("small", batch=1, heads=4, queries=16, head_dim=64)
#: What is asked of each backend, beside every dtype.
FEATURES = {
    "head_dim 40": replace(_SMALL, head_dim=40),
    "head_dim 256": replace(_SMALL, head_dim=256),
    "head_dim 512": replace(_SMALL, head_dim=512),
    "value_dim 32": replace(_SMALL, value_dim=32),
    "causal": replace(_SMALL, causal="lower_right"),
    "window": replace(_SMALL, window=(8, 0)),
    "key lengths": replace(_SMALL, key_lengths=(9,)),
    "bool mask": replace(_SMALL, mask="full"),
    "bias": replace(_SMALL, bias="full"),
    "dropout": replace(_SMALL, dropout_p=0.1),
    "grouped queries": replace(_SMALL, kv_heads=2),
    "one query": replace(_SMALL, queries=1, keys=16),
}


def print_info() -> None:
    console.print(_pairs("Versions", _versions()))
    console.print(_pairs("Processor", _processor()))
    console.print(_pairs("GPU", _gpus()))
    for device in _devices():
        console.print(_capabilities(device))


def _pairs(title: str, pairs: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in pairs.items():
        table.add_row(name, escape(value))
    return table


def _versions() -> dict[str, str]:
    versions = {
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _processor() -> dict[str, str]:
    about = {"name": _cpu_name(), "cores": str(os.cpu_count()), "threads used": str(torch.get_num_threads())}
    missing = cpu.unavailable()
    if missing is not None:
        about["engine"] = missing
        about["instead"] = "torch's own attention in calls for which it is exact, else the dense reference, slowly"
    else:
        about["instruction sets"] = ", ".join(cpu.available_isas())
        about["instruction set in use"] = cpu.isa()
    return about


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"cuda": f"none (torch built for {torch.version.cuda or torch.version.hip or 'the CPU only'})"}
    gpus = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus[f"cuda:{index}"] = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        )
    return gpus


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _capabilities(device: str) -> Table:
    """Rows of dtypes and features, a column per backend, footnotes for the reasons."""
    notes: dict[str, int] = {}

    def cell(backend: str, case: Case, dtype: torch.dtype) -> str:
        reasons = dispatch.backend_reasons(backend, case.make(device, dtype))
        if not reasons:
            return "[green]yes[/]"
        marks = [notes.setdefault(reason, len(notes) + 1) for reason in reasons]
        return "no " + " ".join(f"({mark})" for mark in marks)

    chosen = dispatch.explain_problem(_SMALL.make(device)).backend
    table = Table(title=f"Backends for {device} tensors; a call takes {chosen}", title_justify="left")
    table.add_column("")
    for backend in dispatch.BACKENDS:
        table.add_column(backend)
    for name, dtype in DTYPES.items():
        table.add_row(name, *(cell(backend, _SMALL, dtype) for backend in dispatch.BACKENDS))
    for name, case in FEATURES.items():
        table.add_row(name, *(cell(backend, case, torch.float32) for backend in dispatch.BACKENDS))
    if notes:
        table.caption = "\n".join(f"({mark}) {escape(reason)}" for reason, mark in notes.items())
        table.caption_justify = "left"
    return table
