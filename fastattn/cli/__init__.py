"""The command line: ``fastattn info``, ``check``, ``bench``, and the groups ``train`` and ``predict``.

A command here only parses its options; its work lies in a module that it imports when it runs, so
that no command waits for another one's imports.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fastattn.dispatch import BACKENDS
from fastattn.models.fields import Range
from fastattn.train.cli import predict_app, train_app
from fastattn.train.command import Commands, within
from fastattn.train.options import MOST_THREADS

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

app.add_typer(train_app, name="train")
app.add_typer(predict_app, name="predict")


def print_version(wanted: bool) -> None:
    if wanted:
        import fastattn

        print(f"fastattn {fastattn.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fused attention for PyTorch."""


Backend = Annotated[
    str,
    typer.Option(help=f"auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}; auto is the one that a call would choose."),
]
Device = Annotated[str, typer.Option(help="Where the tensors lie: cpu, cuda, cuda:1...")]


@app.command("info")
def info_command() -> None:
    """Versions, instruction sets, threads, GPU, and what each backend can do here."""
    from fastattn.cli.info import print_info

    print_info()


@app.command("check")
def check_command(
    backend: Backend = "auto",
    device: Device = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="float64, float32, bfloat16, float16; repeatable. Default: all.")
    ] = None,
    match: Annotated[str, typer.Option(help="Only the cases whose name contains this.")] = "",
) -> None:
    """Compare every case of the table with the float64 reference; exit status 1 on a miss."""
    from fastattn.cli.check import run_check

    raise typer.Exit(0 if run_check(backend, device, dtype, match) else 1)


@app.command("bench")
def bench_command(
    backend: Backend = "auto",
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Default: torch's own number.")] = None,
    seconds: Annotated[
        float, typer.Option(callback=within(Range(0.01, 86400)), help="Time for each row of the table.")
    ] = 2.0,
) -> None:
    """A quick comparison with naive attention and torch's own, in the same run."""
    from fastattn.cli.bench import run_bench

    run_bench(backend, device, dtype, threads, seconds)


def main() -> None:
    """The entry point of the ``fastattn`` program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal lacks is no error
    app()
