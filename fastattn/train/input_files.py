"""Reading files that anyone may have written: bounded in size, UTF-8, JSON whose fields are what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastattn.models.fields import check_value, is_a, shown
from fastattn.train.errors import DataError

#: Bytes of the largest file that is read whole.
MOST_BYTES = 1 << 30


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file, of a FIFO too.

    Raises:
        DataError: it cannot be read, or is longer than ``most``, as a device may be without end.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise DataError(path, None, error.strerror or str(error)) from error
    if len(data) > most:
        raise DataError(path, None, f"more than {most} bytes, the most that is read")
    return data


def decode(path: str | Path, data: bytes) -> str:
    """The text of a file, without a byte-order mark; a DataError names the line that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(path, line, f"not UTF-8 (byte 0x{data[error.start]:02x})") from error


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """The value in a file of JSON.

    Raises:
        DataError: it cannot be read, is no JSON, is nested too deep, or names a key of an object twice.  NaN and
            infinities are let through: the checks of the fields find them.
    """
    text = decode(path, read_bytes(path, most))
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise DataError(path, error.lineno, f"not JSON: {error.msg}") from error
    except RecursionError:
        raise DataError(path, None, "not JSON that can be read: it is nested too deep") from None
    except ValueError as error:  # also an int of thousands of digits
        raise DataError(path, None, f"not JSON: {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(n for n in names if names.count(n) > 1))} stands twice in one object")
    return found


class Fields:
    """An object of a file of JSON, whose fields are asked for by name and type."""

    def __init__(self, path: Path, where: str, value: Any):
        self.path, self.where = path, where
        if not isinstance(value, dict):
            raise self.error(f"must be an object, got {shown(value)}")
        self.values = value

    def error(self, problem: str) -> DataError:
        return DataError(self.path, None, f"{self.where}: {problem}")

    def get(self, name: str, hint: Any, *default: Any) -> Any:
        """The field, checked by :func:`fastattn.models.fields.check_value`; the default where it is missing."""
        if name not in self.values:
            if default:
                return default[0]
            raise self.error(f"{name} is missing")
        value = self.values[name]
        try:
            check_value(name, value, hint)
        except (TypeError, ValueError) as error:
            raise self.error(str(error)) from error
        return value

    def objects(self, name: str) -> list[Fields]:
        """The field, a list of objects."""
        value = self.values.get(name)
        if not isinstance(value, list):
            raise self.error(f"{name} must be a list, got {shown(value) if name in self.values else 'nothing'}")
        return [Fields(self.path, f"{self.where}: {name}[{i}]", part) for i, part in enumerate(value)]


def is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(is_a(value, kind) for value in values)
