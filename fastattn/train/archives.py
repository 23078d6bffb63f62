"""Texts in a tar archive that anyone may have packed: a small file can expand to more than any memory holds."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastattn.train.errors import DataError, brief

#: Bytes of the largest member that is read (a text), and of the whole archive, expanded.  IMDB's are 14 KB and 0.4 GB.
MOST_OF_A_MEMBER, MOST_OF_ALL = 1 << 24, 1 << 32

_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


def tar_texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each ``.txt`` file in a tar archive, perhaps compressed (gzip, bzip2, xz).

    Raises:
        DataError: it is no tar archive or is damaged, or expands beyond MOST_OF_A_MEMBER or MOST_OF_ALL.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        expand = _COMPRESSED.get(start, open)
        with expand(path, "rb") as file, tarfile.open(fileobj=_Bounded(path, file), mode="r:") as archive:
            for member in archive:
                if not member.isfile() or not member.name.endswith(".txt"):
                    continue
                if member.size > MOST_OF_A_MEMBER:  # of a sparse one too, whose holes take no room in the archive
                    raise DataError(path, None, f"{member.name!r} has {member.size} bytes, too many for a text")
                yield member.name, archive.extractfile(member).read()
            file.seek(archive.offset)  # tarfile takes a header that it cannot read for the end
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise DataError(path, None, f"truncated or damaged at byte {archive.offset} of the tar file")
    except DataError:
        raise
    except Exception as error:  # the readers of damaged archives raise many kinds
        raise DataError(path, None, f"truncated, or not a tar file ({brief(error)})") from error


class _Bounded(io.RawIOBase):
    """A file of which no one asks for much at once or reads far into it; tarfile believes what headers say."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_OF_A_MEMBER:
            raise DataError(self._path, None, f"a part of {size} bytes is too large for an archive of texts")
        self._require_room(self.tell() + size)
        return self._file.read(size)

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            self._require_room(position)
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _require_room(self, position: int) -> None:
        if position > MOST_OF_ALL:
            raise DataError(self._path, None, f"expands to more than {MOST_OF_ALL} bytes")
