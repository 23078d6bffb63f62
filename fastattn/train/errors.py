"""The errors that a person using the training commands can cause, worded for that person."""

from __future__ import annotations

from pathlib import Path


class TrainingError(Exception):
    """Something the user can mend; the command line prints the message without a traceback."""


class DataError(TrainingError):
    """A data file that cannot be used.  The message begins with ``file:line:`` as compilers' do."""

    def __init__(self, path: str | Path, line: int | None, problem: str):
        self.path, self.line, self.problem = Path(path), line, problem
        place = f"{path}:{line}" if line is not None else f"{path}"
        super().__init__(f"{place}: {problem}")


class CheckpointError(TrainingError):
    """A checkpoint that is truncated, foreign, or of another task, model or data set."""


class OutputError(TrainingError):
    """A file that is to be written and cannot be."""
