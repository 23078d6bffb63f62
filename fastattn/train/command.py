"""What the training commands share: their common options, errors without tracebacks, starting and resuming."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from fastattn.models.fields import Range
from fastattn.needs import MissingPackages
from fastattn.train.devices import resolve_device
from fastattn.train.errors import TrainingError
from fastattn.train.memory import is_lack_of_memory
from fastattn.train.options import TrainOptions

if TYPE_CHECKING:
    from fastattn.train.task import Task

Out = Annotated[Path, typer.Option(help="Directory of the run; it must not hold one yet.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Attention = Annotated[str, typer.Option(help="fastattn, torch or naive.")]


class Commands(TyperGroup):
    """Commands that end with the message and status 1 on an error that the user can mend."""

    def invoke(self, ctx):
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk shows here, or when it is too late to say so
            return result
        except BrokenPipeError:
            raise  # who read the output has enough: the program ends in silence
        except (TrainingError, MissingPackages, ValueError, OSError) as error:
            message = str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_lack_of_memory(error):
                raise
            message = f"not enough memory: {str(error).strip() or 'none is left'}".splitlines()[0]
        report_error(message)
        raise typer.Exit(1)


def report_error(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    if sys.stderr is not None:
        line = " ".join(message.splitlines())
        Console(stderr=True).print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)


def within(allowed: Range) -> Callable:
    """The callback of an option whose numbers lie in a range: a comparison with NaN alone lets it pass."""

    def check(value: float | None) -> float | None:
        if value is not None and not allowed.holds(value):
            raise typer.BadParameter(f"must be {allowed}, got {value}")
        return value

    return check


def training_command(**defaults: Any) -> Callable[[Callable], Callable]:
    """Give a command all of :class:`TrainOptions` as options, handed to its argument ``given`` as a dict.

    ``given`` holds only what the user typed.  ``defaults`` are the task's own where they differ; a
    command combines them by :func:`options_of`.
    """

    def decorate(command: Callable) -> Callable:
        hints = get_type_hints(TrainOptions)
        signature = inspect.signature(command, eval_str=True)
        own = [p for name, p in signature.parameters.items() if name != "given"]
        shared = []
        for option in fields(TrainOptions):
            default = defaults.get(option.name, option.default)
            text = option.metadata["help"]
            if default is not None and not isinstance(default, bool):
                text += f" Default: {default}."
            flags = {"bf16": ("--bf16",), "compile": ("--compile",)}.get(option.name, ())
            annotation = Annotated[hints[option.name] | None, typer.Option(*flags, help=text, show_default=False)]
            shared.append(
                inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
        names = [option.name for option in fields(TrainOptions)]

        @functools.wraps(command)
        def run(**arguments):
            given = {name: arguments.pop(name) for name in names}
            given = {name: value for name, value in given.items() if value is not None}
            return command(**arguments, given=given)

        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = signature.replace(parameters=[*own, *shared])
        run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
        return run

    return decorate


def options_of(given: dict[str, Any], defaults: dict[str, Any], out: Path, resume: bool) -> TrainOptions:
    """The options of a new run, or of the one in ``out`` with what may be changed."""
    from fastattn.train.checkpoint import require_new

    options = _options_of(given, defaults, out, resume)
    resolve_device(options.device)
    if not resume:
        require_new(out)
    return options


def _options_of(given: dict[str, Any], defaults: dict[str, Any], out: Path, resume: bool) -> TrainOptions:
    if not resume:
        if "epochs" in given:  # what the user types as the length of the run replaces the task's own
            defaults = {name: value for name, value in defaults.items() if name != "steps"}
        return TrainOptions(**{**defaults, **given})
    from fastattn.train.checkpoint import from_run, read_run

    return from_run(TrainOptions, read_run(out)["options"], out).resumed_with(**given)


def train_and_report(task: Task, options: TrainOptions, given: dict[str, Any], out: Path, resume: bool) -> None:
    """Train with a progress bar and print the report; exit status 130 after Ctrl-C.

    A new run's options that are not ``given`` suit the size of its data.
    """
    from rich.console import Console

    from fastattn.train.loop import Run
    from fastattn.train.progress import Progress

    progress = Progress.on_terminal()
    if not resume:
        suited = options.suited_to(len(task.lengths()), task.least_steps, given)
        changes = []
        if suited.batch_size != options.batch_size:
            changes.append(f"batches of {suited.batch_size} in place of {options.batch_size}")
        if suited.epochs != options.epochs:
            changes.append(
                f"{suited.epochs} epochs in place of {options.epochs}, for {task.least_steps} steps at least"
            )
        if changes:
            progress.says(f"few data: {', '.join(changes)}")
        options = suited
    report = Run(task, options, out, resume).train(progress)
    console = Console()
    if report.get("interrupted"):
        console.print(f"interrupted at step {report['step']}; continue with --resume --out {out}", highlight=False)
        raise typer.Exit(130)
    for name, value in report.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        console.print(f"{name.replace('_', ' ')}: {shown}", highlight=False, markup=False)
    console.print(f"weights, curves and report are in {out}", highlight=False, markup=False)
