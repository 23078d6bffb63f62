"""Writing files: whole or not at all, through symlinks, and straight into what is no regular file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.train.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What an operating system answers where a file may be written but not replaced, a mounted one for example.
_NOT_REPLACEABLE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EXDEV, errno.EROFS)


def write_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new file, whose content then becomes that of ``path`` in one step.

    A symlink is followed, and a file that is replaced keeps its mode and its owner.  A device, a FIFO or a socket
    takes the content itself: it is never replaced.

    Raises:
        OutputError: as :func:`check_outputs`.
    """
    target, status = _target_of(path)
    if status is not None and _is_stream(path, status):
        _write_straight(path, write)
        return
    temporary = _beside(target)
    try:
        write(temporary)
        if status is not None:
            _take_mode_and_owner(temporary, status)
        os.replace(temporary, target)
    except OSError as error:
        if status is None or error.errno not in _NOT_REPLACEABLE:
            raise
        _write_straight(target, write)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """:func:`write_file` of a text, as UTF-8."""
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def json_text(value: Any) -> str:
    """A value as a file of JSON holds it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: str | Path, value: Any) -> None:
    """:func:`write_file` of a value as JSON."""
    write_text(path, json_text(value))


def write_figure(path: str | Path, figure: Figure, dpi: int) -> None:
    """:func:`write_file` of a figure of matplotlib, as PNG."""
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def create_file(path: Path, text: str) -> None:
    """Write a file that must not be there yet: of several who try at once, one succeeds.

    Raises:
        FileExistsError: it is there already.
    """
    temporary = _beside(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)  # whole at once, unlike O_EXCL and a write
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
    finally:
        temporary.unlink(missing_ok=True)


def check_outputs(paths: dict[str, Path | None], inputs: Sequence[Path] = ()) -> None:
    """Raise unless :func:`write_file` can write each of ``paths``, by the name of what gave it; None is left out.

    Raises:
        OutputError: one is a directory or may not be written, its own directory is missing or may not be written,
            its symlinks go round in a circle, or it is another one's file or one of ``inputs``.
    """
    taken = {os.path.realpath(path): "is read" for path in inputs}
    for name, path in paths.items():
        if path is None:
            continue
        try:
            target, status = _target_of(path)
        except OutputError as error:
            raise OutputError(f"{name} {error}") from error
        if status is None and not os.access(target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{name} {path}: nothing may be written into the directory {target.parent}")
        if status is not None and _is_stream(path, status):
            continue
        if str(target) in taken:
            raise OutputError(f"{name} {path}: this file {taken[str(target)]}; another name is needed")
        taken[str(target)] = f"is written for {name} already"


def check_output_directory(path: Path, name: str) -> None:
    """Raise unless ``path``, which ``name`` gave, is a directory to write into, or can be made one."""
    existing = path
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"{name} {path}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{name} {path}: nothing may be written into the directory {existing}")


def _target_of(path: str | Path) -> tuple[Path, os.stat_result | None]:
    """The file behind all symlinks, and its status, None where there is none yet."""
    target = Path(os.path.realpath(path))
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise OutputError(f"{path}: the directory {target.parent} does not exist") from None
        return target, None
    except OSError as error:  # a circle of symlinks, a name that is too long, a parent that is a file
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    if stat.S_ISDIR(status.st_mode):
        raise OutputError(f"{path}: is a directory; a file's name is needed")
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path}: may not be written")
    return target, status


def _is_stream(path: str | Path, status: os.stat_result) -> bool:
    """Is it open elsewhere, as FIFOs, devices and /dev/stdout are, so that another file in its place is lost?"""
    names_an_open_file = os.path.abspath(path).startswith(("/dev/", "/proc/")) and os.path.islink(path)
    return names_an_open_file or not stat.S_ISREG(status.st_mode)


def _beside(path: Path) -> Path:
    return path.with_name(f".fastattn-{secrets.token_hex(8)}")


def _write_straight(target: str | Path, write: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        content = Path(directory) / "content"
        write(content)
        with open(content, "rb") as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)


def _take_mode_and_owner(path: Path, status: os.stat_result) -> None:
    own = path.stat()
    if (own.st_uid, own.st_gid) != (status.st_uid, status.st_gid):
        with contextlib.suppress(PermissionError):  # only root gives files away
            os.chown(path, status.st_uid, status.st_gid)
    os.chmod(path, stat.S_IMODE(status.st_mode))
