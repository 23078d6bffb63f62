"""Runs tasks in worker processes that may hang or crash without losing the rest.

Each worker (worker.py) takes one task at a time and answers in JSON lines::

    {"ready": true}                       imports done
    {"stage": "name", "seconds": s}       what it does next, and the time that it gets; restarts the clock
    {"row": {...}}                        one result, kept whatever happens afterwards
    {"end": "done"|"error", "hits": n, "compiled": n}     kernels found compiled, or not

A stage that outlasts its time, or that takes the process or its device down, is recorded as a row and the task goes
on without that stage in a fresh process. A stage that has done so ``stage_limit`` times is left out of all further
tasks: its name is that of the kernel family that it runs, so that no engine is silenced by another's death.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .environment import ROOT
from .result import ResultFile

WORKER = "benchmarks.gpu.worker"
START_SECONDS = 150.0  # a cold import of torch by many processes at once
GRACE_SECONDS = 5.0  # what a task that runs at the deadline may still take
KILL_SECONDS = 10.0  # what the driver may take to tear a killed process's context down


@dataclass
class Task:
    """A piece of a step: ``handler`` names what runs it, "module:function" or ".module:function"."""

    part: str
    key: str
    handler: str
    arguments: dict = field(default_factory=dict)
    timeout: float = 30.0  # seconds of a stage that does not say how many it needs
    estimate: float = 1.0  # seconds in all
    skip: tuple[str, ...] = ()  # stages to leave out


class _Died(Exception):
    """The worker process ended, or was ended; the text says how."""

    def __init__(self, status: str, error: str) -> None:
        super().__init__(error)
        self.status = status


class _Worker:
    """One worker process and the lines it sends."""

    def __init__(self, process: subprocess.Popen, log: Path, log_start: int) -> None:
        self.process, self.log, self.log_start = process, log, log_start
        self.is_ready = False
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
            raise _Died("timeout", f"no answer within {timeout:.0f} s: {self.log_tail()}") from None
        if line is None:
            raise _Died("crash", f"{self._end()}: {self.log_tail()}")
        try:
            return json.loads(line)
        except ValueError:  # the process ended within a line
            return self.receive(timeout)

    def _end(self) -> str:
        """How the process ended; where the driver holds it back, which may tear a hung context down, nobody waits."""
        try:
            code = self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return "no exit status"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def send(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise _Died("crash", f"ended before the task: {self.log_tail()}") from None

    def log_tail(self, characters: int = 4000) -> str:
        with open(self.log, "rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")[-characters:].strip()

    def kill(self) -> None:
        """End the process and all that it started (compilers)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)


class Pool:
    """``workers`` processes that serve one :meth:`run` after the other and end with :meth:`close`.

    ``source``: the digest of what results depend on, or a function that gives it for a task's key.
    """

    def __init__(
        self,
        result: ResultFile,
        source: str | Callable[[str], str],
        log_folder: Path,
        workers: int = 1,
        stage_limit: int = 3,
        preload: tuple[str, ...] = ("torch",),
        environment: dict[str, str] | None = None,
        progress=lambda text: None,
        name: str = "worker",
    ) -> None:
        self.result = result
        self._source_of = source if callable(source) else lambda key: source
        self.log_folder, self.stage_limit = log_folder, stage_limit
        self.command = [sys.executable, "-u", "-m", WORKER, *preload]
        self.environment = os.environ | (environment or {})
        self.progress, self.name = progress, name
        #: What later tasks find in their environment beside it.
        self.task_environment: dict[str, str] = {}
        self._workers: list[_Worker | None] = [None] * workers
        # A worker dies with the thread that started it (see worker.py): one thread starts them all and stays.
        self._starter = ThreadPoolExecutor(1)
        #: Kernels that were found compiled ("hits"), and that were not ("compiled").
        self.compilations: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._pending: deque[Task] = deque()
        self._finished = self._total = 0
        self._lock = threading.Lock()
        log_folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def start(self) -> None:
        """Let the processes import what they need while others work."""
        for index, worker in enumerate(self._workers):
            if worker is None:
                self._workers[index] = self._new_worker(index)

    def run(self, tasks: list[Task], deadline: float, resume: bool = False) -> None:
        """Run the tasks in order of appearance until ``deadline`` (monotonic) passes; with ``resume`` those not yet
        done on these sources."""
        todo = [task for task in tasks if not (resume and self.result.is_done(task.key, self._source_of(task.key)))]
        self._pending, self._total, self._finished, self._deadline = deque(todo), len(todo), 0, deadline
        count = min(len(self._workers), len(todo))
        threads = [threading.Thread(target=self._serve, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            if worker is not None:
                worker.kill()
        self._workers = [None] * len(self._workers)
        self._starter.shutdown()

    def _new_worker(self, index: int) -> _Worker:
        log = self.log_folder / f"{self.name}-{index}.log"

        def start() -> _Worker:
            with open(log, "ab") as errors:
                process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=self.environment,
                    cwd=ROOT,
                    start_new_session=True,
                )
                return _Worker(process, log, errors.tell())

        return self._starter.submit(start).result()

    def _serve(self, index: int) -> None:
        while (task := self._take()) is not None:
            start = time.monotonic()
            self.result.start(task.key)
            try:
                status = self._attempt(task, index)
            except Exception as error:  # a fault of this program must not end the thread, and with it the step
                self._record(task, "error", None, f"{type(error).__name__}: {error}")
                status = "error"
            self.result.finish(task.key, status, time.monotonic() - start, self._source_of(task.key))
            with self._lock:
                self._finished += 1
                self.progress(f"{self._finished}/{self._total} {task.key}: {status}")

    def _take(self) -> Task | None:
        with self._lock:
            if self._pending and time.monotonic() >= self._deadline:
                for task in self._pending:
                    self.result.leave_out(task.part, task.key, self._source_of(task.key))
                self._pending.clear()
            return self._pending.popleft() if self._pending else None

    def _attempt(self, task: Task, index: int) -> str:
        """Run a task to its end, without the stages that take the process down."""
        skip = list(task.skip)
        while True:
            skip += [stage for stage in self._exhausted() if stage not in skip]
            stage, seconds = None, task.timeout
            try:
                worker = self._workers[index]
                if worker is None or worker.process.poll() is not None:  # none yet, or one that died between two tasks
                    worker = self._workers[index] = self._new_worker(index)
                if not worker.is_ready:
                    stage = "start"
                    worker.receive(min(START_SECONDS, self._left()))
                    worker.is_ready = True
                    stage = None
                message = {"handler": task.handler, "arguments": task.arguments, "skip": skip}
                worker.send(message | {"environment": self.task_environment})
                while True:
                    answer = worker.receive(min(seconds, self._left()))
                    if "stage" in answer:
                        stage, seconds = answer["stage"], answer.get("seconds") or task.timeout
                    elif "row" in answer:
                        self._add(task, answer["row"])
                    else:
                        with self._lock:
                            self.compilations.update({name: answer.get(name, 0) for name in ("hits", "compiled")})
                        return answer["end"]
            except _Died as death:
                self._workers[index] = None
                if time.monotonic() > self._deadline:
                    self._record(task, "skipped", stage, "out of time")
                    return "skipped"
                self._record(task, death.status, stage, str(death))
                if stage is None or stage == "start" or stage in skip:
                    return death.status
                with self._lock:
                    self._failures[stage] += 1
                skip.append(stage)

    def _left(self) -> float:
        return self._deadline + GRACE_SECONDS - time.monotonic()

    def _exhausted(self) -> list[str]:
        with self._lock:
            return [stage for stage, count in self._failures.items() if count >= self.stage_limit]

    def _record(self, task: Task, status: str, stage: str | None, error: str) -> None:
        self._add(task, {"status": status, "stage": stage, "error": error})

    def _add(self, task: Task, row: dict) -> None:
        self.result.add({"part": task.part, "task": task.key, "source": self._source_of(task.key)} | row)
