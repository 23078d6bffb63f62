"""The one result file: a JSON that is whole after every row, and from which a run resumes."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path

SCHEMA = 1


class ResultFile:
    """Head, rows and finished tasks; every change is written at once, by an atomic rename.

    A row is a flat dict with ``part``, ``task`` (the key of the task that made it) and ``status``:
    "ok", "fail" (a wrong result), "error" (an exception), "timeout", "crash", "unsupported" (the
    contender says that it cannot) or "skipped". ``tasks`` maps a task's key to how it ended.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self.content = {"schema": SCHEMA, "head": {}, "ceilings": {}, "parts": {}, "tasks": {}, "rows": []}
        if resume and self.path.exists():
            content = json.loads(self.path.read_text())
            if content.get("schema") != SCHEMA:
                raise ValueError(f"{self.path} has schema {content.get('schema')}, this script writes {SCHEMA}")
            self.content = content
        self.path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> list[dict]:
        return self.content["rows"]

    def set(self, section: str, value: dict) -> None:
        """Merge ``value`` into "head", "ceilings" or "parts"."""
        with self._lock:
            self.content[section] |= value
            self._write()

    def is_done(self, key: str, source: str) -> bool:
        """Did the task finish, on these sources?"""
        task = self.content["tasks"].get(key)
        return task is not None and task["status"] == "done" and task["source"] == source

    def start(self, key: str) -> None:
        """Forget what an earlier attempt at the task left."""
        with self._lock:
            self.content["rows"] = [row for row in self.rows if row["task"] != key]
            self.content["tasks"].pop(key, None)

    def add(self, row: dict) -> None:
        with self._lock:
            self.rows.append(row)
            self._write()

    def finish(self, key: str, status: str, seconds: float, source: str) -> None:
        with self._lock:
            self.content["tasks"][key] = {"status": status, "seconds": round(seconds, 2), "source": source}
            self._write()

    def leave_out(self, tasks: Iterable[tuple[str, str]], source: str) -> None:
        """Note (part, key) of tasks that there was no time for."""
        with self._lock:
            for part, key in tasks:
                left_out = {"part": part, "task": key, "source": source, "stage": None}
                self.rows.append(left_out | {"status": "skipped", "error": "out of time"})
                self.content["tasks"][key] = {"status": "skipped", "seconds": 0.0, "source": source}
            self._write()

    def _write(self) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=0, sort_keys=True))
        os.replace(partial, self.path)
