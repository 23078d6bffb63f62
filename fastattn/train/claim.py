"""One run to a directory, and one process at a time that trains it.

A new run claims its directory by making ``run.json``, which of several who try at once one can (``O_EXCL``).
While it trains, and while one that was resumed does, the directory is locked; the system lets go of a lock when
its process ends, however it ends, so none outlives a crash.  What a crash leaves is a run like any other, which
``--resume`` takes up: from its checkpoint, or from the start where there was none yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastattn.train.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not a POSIX system: new runs are told apart, resumed ones are not
    fcntl = None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, which is made.

    Raises:
        CheckpointError: another process, or another run of this one, holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{directory}: another run is training there now") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
