"""A kernel that hangs: seen after seconds, dumped where the machine can, and ended with its process.

A process that waits for a hung kernel waits for ever, so a launch is followed by an event that is polled.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

#: Seconds that a launch may take on the device, once its host part is done.
LAUNCH_SECONDS = 5.0
#: Seconds for a core dump, and for reading it.
DUMP_SECONDS, READ_SECONDS = 8.0, 20.0
#: Dumps of one run: each costs the seconds above.
MOST_DUMPS = 2
HUNG_EXIT = 4
#: Registers and code are enough to say where each warp waits; memory would make the file large.
DUMP_FLAGS = "skip_nonrelocated_elf_images,skip_global_memory,skip_shared_memory,skip_local_memory,"
DUMP_FLAGS += "skip_constbank_memory,skip_abort"
WARPS = 16

_armed: dict[str, Path] = {}


def launch(context, family: str, call, device: str, folder: str | None = None, **labels):
    """Call ``call`` and wait for the device; its value. A hang ends this process, after a row that names it."""
    value = call()
    if not finished(device, LAUNCH_SECONDS):
        error = f"the device did not finish within {LAUNCH_SECONDS:.0f} s"
        labels = {"stage": context.current, "family": family} | labels
        context.row("hang", error=error, **labels)
        context.stage(context.current, DUMP_SECONDS + READ_SECONDS + 5.0)  # the time that the dump takes
        with contextlib.suppress(Exception):
            context.row("note", text=core_dump(family, folder)[-6000:], **labels)
        os._exit(HUNG_EXIT)
    return value


def finished(device: str, seconds: float) -> bool:
    """Wait for what has been launched; False if it takes longer. Raises what the device reports."""
    if device != "cuda":
        return True
    import torch

    event = torch.cuda.Event()
    event.record()
    end = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > end:
            return False
        time.sleep(1e-3)
    return True


def arm() -> None:
    """Have the driver wait for a request to dump the GPU's state. Before CUDA starts in this process."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-core-"))
    _armed.update(pipe=folder / "pipe", core=folder / "core")
    os.environ.update(
        CUDA_ENABLE_USER_TRIGGERED_COREDUMP="1",
        CUDA_COREDUMP_PIPE=str(_armed["pipe"]),
        CUDA_COREDUMP_FILE=str(_armed["core"]),
        CUDA_COREDUMP_GENERATION_FLAGS=DUMP_FLAGS,
    )


def core_dump(family: str, folder: str | None) -> str:
    """Where each warp of the hung kernel waits, as cuda-gdb tells it; or why that cannot be told.

    The text is also kept in ``folder``.
    """
    if not _armed:
        return "no dump: this process has not asked for one before CUDA started"
    debugger = tool("cuda-gdb")
    if debugger is None:
        return "no dump: cuda-gdb is not installed"
    kept = None if folder is None else Path(folder)
    if kept is not None and len(list(kept.glob("hang-*.txt"))) >= MOST_DUMPS:
        return f"no dump: there are {MOST_DUMPS} already"
    try:
        _request()
        text = _read(debugger)
    except Exception as error:
        text = f"no dump: {type(error).__name__}: {error}"
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"hang-{family.replace('/', '-')}.txt").write_text(text)
    return text


def _request() -> None:
    """Ask for the dump, and wait until its file is there and no longer grows."""
    pipe = os.open(_armed["pipe"], os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(pipe, bytes(4096))
    finally:
        os.close(pipe)
    core, size = _armed["core"], -1
    end = time.monotonic() + DUMP_SECONDS
    while time.monotonic() < end:
        time.sleep(0.7)
        now = core.stat().st_size if core.exists() else 0
        if now and now == size:
            return
        size = now
    if not size:
        raise TimeoutError(f"no core file within {DUMP_SECONDS:.0f} s")


def _read(debugger: str) -> str:
    commands = [f"target cudacore {_armed['core']}", "info cuda kernels", "info cuda warps"]
    for warp in range(WARPS):
        commands += [f"cuda device 0 sm 0 warp {warp} lane 0", "x/3i $pc"]
    command = [debugger, "-batch", "-nx"]
    for text in commands:
        command += ["-ex", text]
    return run_for(command, READ_SECONDS)


def run_for(command: list[str], seconds: float, **options) -> str:
    """What a command prints within a time limit, after which it and its children are ended."""
    limited = [*(["timeout", "--kill-after=1", f"{seconds:.0f}"] if shutil.which("timeout") else []), *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    try:
        return subprocess.run(limited, timeout=seconds + 3.0, check=False, errors="replace", **pipes, **options).stdout
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or ""
        return printed if isinstance(printed, str) else printed.decode(errors="replace")


def tool(name: str) -> str | None:
    """The path of one of CUDA's tools, also where it is not on the search path."""
    found = shutil.which(name)
    if found is not None:
        return found
    patterns = (f"/usr/local/cuda*/bin/{name}", f"/opt/nvidia/*/*/{name}")
    return next((path for pattern in patterns for path in sorted(glob.glob(pattern)) if os.access(path, os.X_OK)), None)
