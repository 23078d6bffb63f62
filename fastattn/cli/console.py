"""What the commands share: the console, the progress bar, names of dtypes and devices."""

from __future__ import annotations

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastattn.train.devices import resolve_device
from fastattn.train.errors import TrainingError

#: In a pipe or a log, wide enough for the tables.
console = Console(width=None if Console().is_terminal else 120)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def progress_bar() -> Progress:
    """A bar with counts and time, erased when done; on a terminal only, so that logs stay clean."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def parse_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(DTYPES)}, got {name!r}", param_hint="--dtype")
    return DTYPES[name]


def parse_device(name: str) -> torch.device:
    """The device, after making sure that tensors on it hold numbers."""
    try:
        return resolve_device(name)
    except TrainingError as error:
        raise typer.BadParameter(str(error).removeprefix("--device "), param_hint="--device") from None


def parse_backend(name: str) -> str:
    from fastattn.dispatch import BACKENDS

    if name not in ("auto", *BACKENDS):
        raise typer.BadParameter(f"must be auto, {', '.join(BACKENDS)}, got {name!r}", param_hint="--backend")
    return name
