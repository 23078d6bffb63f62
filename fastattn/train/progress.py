"""The progress bar of a training run; without a terminal, a line per evaluation."""

from __future__ import annotations

from contextlib import contextmanager


class Progress:
    """Shows steps, loss, learning rate and time left on stderr, and a line for each evaluation."""

    def __init__(self, console=None):
        self.console = console
        self.bar = None

    @classmethod
    def on_terminal(cls) -> Progress:
        from rich.console import Console

        return cls(Console(stderr=True))

    @classmethod
    def silent(cls) -> Progress:
        return cls(None)

    def says(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def running(self, done: int, total: int):
        if self.console is None:
            yield
            return
        from rich import progress

        columns = (
            progress.TextColumn("training"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]:.4f}"),
            progress.TextColumn("lr {task.fields[rate]:.2e}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=self.console, disable=not self.console.is_terminal) as self.bar:
            self.row = self.bar.add_task("", total=total, completed=done, loss=float("nan"), rate=0.0)
            yield

    def step(self, step: int, loss: float, rate: float) -> None:
        if self.bar is not None:
            self.bar.update(self.row, completed=step, loss=loss, rate=rate)

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        if self.console is not None:
            text = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
            self.console.print(f"step {step}:  {text}", highlight=False)
