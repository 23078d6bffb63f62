"""Runs tasks in worker processes that may hang or crash without losing the rest.

Each worker (worker.py) takes one task at a time and answers in JSON lines::

    {"ready": true}            imports done
    {"stage": "name"}          what it does next; restarts the task's clock
    {"row": {...}}             one result, kept whatever happens afterwards
    {"end": "done"|"error"}

A stage that outlasts the task's timeout, or that takes the process or its device down, is recorded as a row and
the task goes on without that stage in a fresh process. A stage that has done so ``stage_limit``
times in one run is left out of all further tasks.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from .environment import ROOT
from .result import ResultFile

WORKER = "benchmarks.gpu.worker"
START_SECONDS = 150.0  # a cold import of torch by many processes at once
GRACE_SECONDS = 12.0  # what a task that runs at the deadline may still take


@dataclass
class Task:
    """A piece of a part: ``handler`` names what runs it, "module:function" or ".module:function"."""

    part: str
    key: str
    handler: str
    arguments: dict = field(default_factory=dict)
    timeout: float = 30.0  # seconds per stage
    estimate: float = 1.0  # seconds in all, for --dry-run and for the order of work
    skip: tuple[str, ...] = ()  # stages to leave out


class _Died(Exception):
    """The worker process ended, or was ended; the text says how."""

    def __init__(self, status: str, error: str) -> None:
        super().__init__(error)
        self.status = status


class _Worker:
    """One worker process and the lines it sends."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self.stage: str | None = None
        with open(log, "ab") as errors:
            self.log_start = errors.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def receive(self, timeout: float) -> dict:
        try:
            line = self._lines.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            self.kill()
            raise _Died("timeout", f"no answer within {timeout:.0f} s") from None
        if line is None:
            code = self.process.wait()
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            raise _Died("crash", f"{reason}: {self.log_tail()}")
        return json.loads(line)

    def send(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise _Died("crash", f"ended before the task: {self.log_tail()}") from None

    def log_tail(self, characters: int = 600) -> str:
        with open(self.log, "rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")[-characters:].strip()

    def kill(self) -> None:
        """End the process and all that it started (compilers)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Pool:
    """Runs tasks on ``workers`` processes until they are done or ``deadline`` (monotonic) passes."""

    def __init__(
        self,
        result: ResultFile,
        source: str,
        deadline: float,
        log_folder: Path,
        workers: int = 1,
        stage_limit: int = 3,
        preload: tuple[str, ...] = ("torch",),
        environment: dict[str, str] | None = None,
        progress=lambda text: None,
    ) -> None:
        self.result, self.source, self.deadline = result, source, deadline
        self.log_folder, self.workers, self.stage_limit = log_folder, workers, stage_limit
        self.command = [sys.executable, "-u", "-m", WORKER, *preload]
        self.environment = os.environ | (environment or {})
        self.progress = progress
        self._failures: Counter[str] = Counter()
        self._pending: deque[Task] = deque()
        self._finished = 0
        self._lock = threading.Lock()

    def run(self, tasks: list[Task], resume: bool = False) -> None:
        """Run the tasks in order of appearance; with ``resume`` those not yet done on these sources."""
        todo = [task for task in tasks if not (resume and self.result.is_done(task.key, self.source))]
        self._pending, self._total, self._finished = deque(todo), len(todo), 0
        self.log_folder.mkdir(parents=True, exist_ok=True)
        count = min(self.workers, len(todo))
        threads = [threading.Thread(target=self._serve, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(self, index: int) -> None:
        worker = None
        log = self.log_folder / f"worker-{index}.log"
        try:
            while (task := self._take()) is not None:
                start = time.monotonic()
                self.result.start(task.key)
                status, worker = self._attempt(task, worker, log)
                self.result.finish(task.key, status, time.monotonic() - start, self.source)
                with self._lock:
                    self._finished += 1
                    self.progress(f"{self._finished}/{self._total} {task.key}: {status}")
        finally:
            if worker is not None:
                worker.kill()

    def _take(self) -> Task | None:
        with self._lock:
            if self._pending and time.monotonic() >= self.deadline:
                self.result.leave_out(((task.part, task.key) for task in self._pending), self.source)
                self._pending.clear()
            return self._pending.popleft() if self._pending else None

    def _attempt(self, task: Task, worker: _Worker | None, log: Path) -> tuple[str, _Worker | None]:
        """Run a task to its end, without the stages that take the process down."""
        skip = list(task.skip)
        while True:
            skip += [stage for stage in self._exhausted() if stage not in skip]
            stage = None
            try:
                if worker is None:
                    stage = "start"
                    worker = _Worker(self.command, log, self.environment)
                    worker.receive(START_SECONDS)
                    stage = None
                worker.send({"handler": task.handler, "arguments": task.arguments, "skip": skip})
                while True:
                    answer = worker.receive(min(task.timeout, self.deadline + GRACE_SECONDS - time.monotonic()))
                    if "stage" in answer:
                        stage = answer["stage"]
                    elif "row" in answer:
                        self._add(task, answer["row"])
                    else:
                        return answer["end"], worker
            except _Died as death:
                worker = None
                if time.monotonic() > self.deadline:
                    self._record(task, "skipped", stage, "out of time")
                    return "skipped", None
                self._record(task, death.status, stage, str(death))
                if stage is None or stage == "start" or stage in skip:
                    return death.status, None
                with self._lock:
                    self._failures[stage] += 1
                skip.append(stage)

    def _exhausted(self) -> list[str]:
        with self._lock:
            return [stage for stage, count in self._failures.items() if count >= self.stage_limit]

    def _record(self, task: Task, status: str, stage: str | None, error: str) -> None:
        self._add(task, {"status": status, "stage": stage, "error": error})

    def _add(self, task: Task, row: dict) -> None:
        self.result.add({"part": task.part, "task": task.key, "source": self.source} | row)
