"""The one result file: a JSON that is whole at any moment, and from which a run resumes."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

SCHEMA = 2
#: Seconds between two writes: a row is in the file that much later at most.
WRITE_EVERY = 0.5


class ResultFile:
    """Head, rows and finished tasks; changes are written twice a second, by an atomic rename, and at :meth:`close`.

    A row is a flat dict with ``part``, ``task`` (the key of the task that made it) and ``status``:
    "ok", "fail" (a wrong result), "error" (an exception), "timeout", "hang", "crash", "unsupported" (the
    contender says that it cannot) or "skipped". ``tasks`` maps a task's key to how it ended.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self.content = {"schema": SCHEMA, "head": {}, "ceilings": {}, "steps": {}, "tasks": {}, "rows": []}
        if resume and self.path.exists():
            content = json.loads(self.path.read_text())
            if content.get("schema") != SCHEMA:
                raise ValueError(f"{self.path} has schema {content.get('schema')}, this program writes {SCHEMA}")
            self.content = content
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._changed, self._closed = threading.Event(), False
        self._writer = threading.Thread(target=self._write_changes, daemon=True)
        self._writer.start()

    @property
    def rows(self) -> list[dict]:
        return self.content["rows"]

    def set(self, section: str, value: dict) -> None:
        """Merge ``value`` into "head", "ceilings" or "steps"."""
        with self._lock:
            self.content[section] |= value
        self._changed.set()

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
        self._changed.set()

    def finish(self, key: str, status: str, seconds: float, source: str) -> None:
        with self._lock:
            self.content["tasks"][key] = {"status": status, "seconds": round(seconds, 2), "source": source}
        self._changed.set()

    def leave_out(self, part: str, key: str, source: str, why: str = "out of time") -> None:
        """Note a task that there was no time for, or that is left out for another reason."""
        left_out = {"part": part, "task": key, "source": source, "stage": None}
        self.add(left_out | {"status": "skipped", "error": why})
        self.finish(key, "skipped", 0.0, source)

    def close(self) -> None:
        """Write what is not written yet."""
        self._closed = True
        self._changed.set()
        self._writer.join()
        self._write()

    def _write_changes(self) -> None:
        while not self._closed:
            self._changed.wait()
            self._changed.clear()
            with contextlib.suppress(OSError):  # a full disk, say: the last write raises
                self._write()
            if not self._closed:
                time.sleep(WRITE_EVERY)

    def _write(self) -> None:
        with self._lock:
            text = as_text(self.content)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text)
        os.replace(partial, self.path)


def as_text(content: dict) -> str:
    """The JSON, with each row and each task on a line of its own."""
    lines = []
    for name, value in sorted(content.items()):
        if isinstance(value, list):
            inside = ",\n".join(json.dumps(row, sort_keys=True) for row in value)
            lines.append(f"{json.dumps(name)}: [\n{inside}\n]")
        elif name == "tasks":
            inside = ",\n".join(f"{json.dumps(key)}: {json.dumps(value[key], sort_keys=True)}" for key in sorted(value))
            lines.append(f"{json.dumps(name)}: {{\n{inside}\n}}")
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
