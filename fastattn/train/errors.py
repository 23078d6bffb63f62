"""The errors that a person using the training commands can cause, worded for that person."""

from __future__ import annotations

from pathlib import Path


class TrainingError(Exception):
    """Something the user can mend; the command line prints the message without a traceback."""


def brief(error: BaseException, most: int = 200) -> str:
    """What an error says, on one line; a library's may go on for pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."


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
