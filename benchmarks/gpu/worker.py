"""A worker process of pool.py: reads tasks as JSON lines, answers in JSON lines.

Its arguments are the modules to import before it says that it is ready.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import traceback


class Unsupported(Exception):
    """What was asked for cannot be done here, and says why; no failure."""


class Context:
    """What a handler speaks to: stages it enters and rows it yields."""

    def __init__(self, send, skip: list[str]) -> None:
        self._send = send
        self._skip = skip
        self._left_out: set[str] = set()
        self.current: str | None = None

    def stage(self, name: str, seconds: float | None = None) -> bool:
        """Announce a stage and how long it may take; False where it is to be left out (a row says so, once)."""
        if name in self._skip:
            if name not in self._left_out:
                self._left_out.add(name)
                self.row("skipped", stage=name, error="failed hard before")
            return False
        self.current = name
        self._send({"stage": name, "seconds": seconds})
        faulthandler.cancel_dump_traceback_later()
        if seconds is not None:  # just before it is ended for being late, the process says where it is
            faulthandler.dump_traceback_later(max(0.9 * seconds, seconds - 1.0))
        return True

    def row(self, status: str, **values) -> None:
        self._send({"row": {"status": status} | values})


def as_json(message: dict) -> str:
    """The message in a line; null for what is not finite, which JSON has no number for."""
    try:
        return json.dumps(message, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(message), parse_constant=lambda name: None)
        return json.dumps(finite)


def describe(error: BaseException, characters: int = 20000) -> dict[str, str]:
    """``error``, in a line or so, and the whole ``traceback``, as fields of a row."""
    places = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(places[-1].filename)}:{places[-1].lineno})" if places else ""
    text = f"{type(error).__name__}: {error}".strip()
    whole = "".join(traceback.format_exception(error))
    return {"error": text[:600] + place, "traceback": whole[-characters:]}


def run_stage(context: Context, name: str, function, seconds: float | None = None, **labels):
    """Call ``function()`` as a stage of so many seconds; what it raises becomes a row. Returns its value, or None."""
    if not context.stage(name, seconds):
        return None
    try:
        return function()
    except Unsupported as error:
        context.row("unsupported", stage=name, error=str(error)[:300], **labels)
    except AssertionError as error:
        context.row("fail", stage=name, **describe(error), **labels)
    except Exception as error:
        _die_with_the_device()
        context.row("error", stage=name, **describe(error), **labels)
    return None


def _die_with_the_device() -> None:
    """End the process if its CUDA context is gone: the pool goes on in a new one, without this stage."""
    if device_is_lost():
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(3)


def device_is_lost() -> bool:
    """Has an illegal access or a failed launch left the CUDA context unusable?"""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def die_with_the_parent() -> None:
    """Have the kernel end this process when the thread that started it ends: a hung one would live on for ever."""
    PR_SET_PDEATHSIG = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _change_environment(variables: dict[str, str]) -> None:
    """Set what the gate has decided since this process started."""
    from .families import leave_out_dead

    if any(os.environ.get(name) != value for name, value in variables.items()):
        os.environ.update(variables)
        leave_out_dead()


def main() -> None:
    die_with_the_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log, not between the answers

    faulthandler.enable()

    def send(message: dict) -> None:
        answers.write(as_json(message) + "\n")

    for name in sys.argv[1:]:
        importlib.import_module(name)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    with _count_compilations() as counted:
        send({"ready": True})
        serve(send, counted)


def _count_compilations():
    """Counts the kernels that Triton found in its cache, and those that it compiled; nothing without Triton."""
    from . import cache

    try:
        import triton  # noqa: F401
    except ImportError:
        return contextlib.nullcontext(cache.Compilations())
    return cache.count_compilations()


def serve(send, counted) -> None:
    """Answer task after task."""
    torch = sys.modules.get("torch")
    for line in sys.stdin:
        task = json.loads(line)
        context = Context(send, task["skip"])
        end = "done"
        try:
            _change_environment(task["environment"])
            module, function = task["handler"].split(":")
            getattr(importlib.import_module(module, __package__), function)(context, **task["arguments"])
        except Exception as error:
            traceback.print_exc()
            _die_with_the_device()
            status = "fail" if isinstance(error, AssertionError) else "error"
            context.row(status, stage=context.current, **describe(error))
            end = "error"
        _die_with_the_device()  # a fault that no call has reported yet
        faulthandler.cancel_dump_traceback_later()
        gc.collect()
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        send({"end": end, "hits": counted.hits.total(), "compiled": counted.misses.total()})
        counted.hits.clear()
        counted.misses.clear()


if __name__ == "__main__":
    # One module object, whether a handler imports it or it is the script.
    sys.modules["benchmarks.gpu.worker"] = sys.modules["__main__"]
    main()
