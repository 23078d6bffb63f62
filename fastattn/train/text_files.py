"""Readers of text data.  Every error names the file and the line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from fastattn.train.archives import tar_texts
from fastattn.train.errors import DataError
from fastattn.train.input_files import decode, read_bytes

#: One field of a CSV file may be a whole review.
csv.field_size_limit(1 << 24)


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """The two columns of a tab-separated file without a header.  Blank lines are skipped."""
    pairs = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != 2:
            raise DataError(path, number, f"expected two columns separated by a tab, found {len(columns)}")
        source, target = (column.strip() for column in columns)
        if not source or not target:
            raise DataError(path, number, f"the {'first' if not source else 'second'} column is empty")
        pairs.append((source, target))
    return _not_empty(path, pairs, "pairs")


def read_aligned(source_path: str | Path, target_path: str | Path) -> list[tuple[str, str]]:
    """Two files, line i of one the translation of line i of the other.  Lines blank in both are skipped."""
    sources, targets = list(_lines(source_path)), list(_lines(target_path))
    if len(sources) != len(targets):
        raise DataError(
            target_path,
            min(len(sources), len(targets)) + 1,
            f"{len(targets)} lines, but {source_path} has {len(sources)}; the files must correspond line by line",
        )
    pairs = []
    for (number, source), (_, target) in zip(sources, targets, strict=True):
        source, target = source.strip(), target.strip()
        if bool(source) != bool(target):
            blank = target_path if source else source_path
            raise DataError(blank, number, "blank, but its counterpart is not")
        if source:
            pairs.append((source, target))
    return _not_empty(source_path, pairs, "pairs")


def read_labelled(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    labels: Sequence[str] | None = None,
) -> list[tuple[str, str]]:
    """(text, label) from a CSV file, or a tab-separated one (``.tsv``, ``.tab``), whose header names the columns.

    With ``labels``, any other label is an error.
    """
    delimiter = "\t" if Path(path).suffix.lower() in (".tsv", ".tab") else ","
    text = _decode(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        header = next(reader, None)
        if not header:
            raise DataError(path, None, "the file is empty")
        for column in (text_column, label_column):
            if column not in header:
                found = ", ".join(map(repr, header))
                raise DataError(path, 1, f"no column {column!r}; the header has {found}")
        text_index, label_index = header.index(text_column), header.index(label_column)
        start = reader.line_num + 1
        for row in reader:
            number, start = start, reader.line_num + 1  # a quoted field may span lines: name the first
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(path, number, f"expected {len(header)} fields, found {len(row)}")
            example, label = row[text_index].strip(), row[label_index].strip()
            if not example:
                raise DataError(path, number, f"the column {text_column!r} is empty")
            if not label:
                raise DataError(path, number, f"the column {label_column!r} is empty")
            if labels is not None and label not in labels:
                known = ", ".join(map(repr, labels))
                raise DataError(path, number, f"the label {label!r} is not one of {known}")
            rows.append((example, label))
    except csv.Error as error:
        raise DataError(path, reader.line_num, f"malformed: {error}") from error
    return _not_empty(path, rows, "examples")


def read_imdb(path: str | Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(train, test) lists of (text, "neg" or "pos") from IMDB's folder ``aclImdb`` or its tar.

    The layout (Maas et al., 2011) is ``{train,test}/{neg,pos}/*.txt``, perhaps below ``aclImdb/``.
    """
    splits: dict[tuple[str, str], list[tuple[str, str]]] = {}
    reader = _tar_members if Path(path).is_file() else _folder_members
    for split, label, text in reader(Path(path)):
        splits.setdefault((split, label), []).append((text, label))
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            if (split, label) not in splits:
                raise DataError(path, None, f"no reviews in {split}/{label}/*.txt: not the IMDB data set")
    return splits["train", "neg"] + splits["train", "pos"], splits["test", "neg"] + splits["test", "pos"]


def _folder_members(root: Path) -> Iterator[tuple[str, str, str]]:
    root = root / "aclImdb" if (root / "aclImdb").is_dir() else root
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            for file in sorted((root / split / label).glob("*.txt")):
                yield split, label, _decode(file)


def _tar_members(path: Path) -> Iterator[tuple[str, str, str]]:
    found = []
    for name, data in tar_texts(path):
        parts = PurePosixPath(name).parts
        if len(parts) >= 3 and parts[-3] in ("train", "test") and parts[-2] in ("neg", "pos"):
            found.append((*parts[-3:], data))
    for split, label, name, data in sorted(found):
        yield split, label, _decode_bytes(f"{path}/{split}/{label}/{name}", data)


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    return enumerate(_decode(path).removesuffix("\n").split("\n"), 1)


def _decode(path: str | Path) -> str:
    return _decode_bytes(path, read_bytes(path))


def _decode_bytes(path: str | Path, data: bytes) -> str:
    if not data.strip():
        raise DataError(path, None, "the file is empty")
    return decode(path, data).replace("\r\n", "\n")


def _not_empty(path, rows, what):
    if not rows:
        raise DataError(path, None, f"no {what} in the file")
    return rows
