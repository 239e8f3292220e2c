"""Files of text as they are found -> their rows: with or without a byte order mark, semicolons for
commas, and no other encoding than UTF-8.

Everything here raises `OSError`, `ValueError` or what the file type's reader raises;
`grasp.stages.text` says it to the user.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE_TYPES = (".txt", ".raw", ".md", ".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
PLAIN = (".txt", ".raw", ".md")
"""File types without rows or columns."""

_HEAD = 4096


def file_type(name: str) -> str | None:
    """The ending of a file's name that says what is in it; None if it is none of `FILE_TYPES`."""
    return next(
        (kind for kind in sorted(FILE_TYPES, key=len, reverse=True) if name.endswith(kind)), None
    )


def plain_text(path: Path) -> str:
    """All text of a file of a `PLAIN` type."""
    with _open(path, ".txt") as file:
        return _read(file)


def rows_of(path: Path, kind: str) -> Iterator[Any]:
    """The rows of a file of any other type: objects, texts, or whatever stands there."""
    if kind == ".parquet":
        yield from _parquet(path)
        return
    with _open(path, kind) as file:
        if kind == ".json":
            value = json.loads(_read(file))
            yield from value if isinstance(value, list) else [value]
        elif kind == ".csv":
            yield from _csv(file)
        else:
            for number, line in enumerate(_lines(file), start=1):
                if line.strip():
                    yield _parsed(line, number)


@contextmanager
def _open(path: Path, kind: str) -> Iterator[io.TextIOWrapper]:
    """The file as text, after a look at its first bytes. Raises `ValueError` where they are not
    UTF-8's.
    """
    with gzip.open(path) if kind.endswith(".gz") else path.open("rb") as raw:
        head = raw.read(_HEAD)
    convert = f"convert it: iconv -f %s -t UTF-8 {path.name} > utf8{kind}"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        name = "UTF-32" if head.startswith(b"\xff\xfe\0\0") else "UTF-16"
        raise ValueError(f"it is {name}, not UTF-8; {convert % name}")
    if head.count(0) * 8 > len(head):
        raise ValueError(
            f"it holds NUL bytes: binary, or UTF-16 without a mark; if so, {convert % 'UTF-16LE'}"
        )
    with (
        gzip.open(path) if kind.endswith(".gz") else path.open("rb") as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file,
    ):
        yield file


def _read(file: io.TextIOWrapper) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as failure:
        raise _not_utf8(failure) from None


def _lines(file: io.TextIOWrapper) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as failure:
        raise _not_utf8(failure) from None


def _not_utf8(failure: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"it is not UTF-8 (byte 0x{failure.object[failure.start]:02x}); convert it, for example:"
        " iconv -f LATIN1 -t UTF-8"
    )


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as failure:
        raise ValueError(f"line {number}: {failure}") from None


def _csv(file: io.TextIOWrapper) -> Iterator[Any]:
    """Rows by column. A header without a comma is split where spreadsheets put something else."""
    # documents are longer than the module's limit of 128 KiB
    usual = csv.field_size_limit(sys.maxsize)
    try:
        lines = _lines(file)
        header = next(lines, "")
        separator = (
            "," if "," in header else next((mark for mark in (";", "\t") if mark in header), ",")
        )
        yield from csv.DictReader(_with(header, lines), delimiter=separator)
    finally:
        csv.field_size_limit(usual)


def _with(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _parquet(path: Path) -> Iterator[Any]:
    try:
        # comes with `datasets`; loaded only for parquet files
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            "parquet needs the package pyarrow: pip install 'grasp-llm[data]'"
        ) from None
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, ValueError):
        raise
    except Exception as failure:  # pyarrow's own errors are of many kinds
        raise ValueError(str(failure)) from failure
