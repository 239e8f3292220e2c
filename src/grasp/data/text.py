"""DATA in, text out: a named set, a file, or `pydoc`, the language reference inside every Python
(where there is no network).
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import logging
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE

from grasp.core.hub import reachable
from grasp.core.records import Text
from grasp.data.files import FILE_TYPES, PLAIN, file_type, plain_text, rows_of
from grasp.errors import DataError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedSet:
    """A set known by name. `hub`: arguments of `datasets.load_dataset`; `field`: its text column;
    `join`: what goes between rows; `like`: what files of its two splits are called.
    """

    about: str
    hub: tuple[str, ...] = ()
    field: str = "text"
    join: str = "\n\n"
    splits: tuple[str, str] = ("train", "test")
    revision: str | None = None
    most_rows: int | None = None
    like: tuple[str, str] = ("", "")
    line_ends: bool = False

    def row(self, line: str) -> str:
        """The row that a line of the set's own text file is. WikiText's rows keep their line end,
        its blank lines are empty rows.
        """
        text = line.strip()
        return line + "\n" if self.line_ends and text else text


NAMED: dict[str, NamedSet] = {
    "pydoc": NamedSet(
        "the language reference inside Python (pydoc_data.topics);"
        " one topic in five is held out for evaluation"
    ),
    "self": NamedSet(
        "text sampled from the model itself, from its beginning-of-sequence token at temperature 1"
    ),
    "wikitext2": NamedSet(
        "WikiText-2 raw, rows joined by a blank line",
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        like=("wiki.train.raw", "wiki.test.raw"),
        line_ends=True,
    ),
    "ptb": NamedSet(
        "Penn Treebank, Mikolov's preprocessing",
        ("ptb-text-only/ptb_text_only",),
        "sentence",
        " ",
        revision="refs/convert/parquet",
        like=("ptb.train.txt", "ptb.test.txt"),
    ),
    "c4": NamedSet(
        "C4, English, the first documents",
        ("allenai/c4", "en"),
        splits=("train", "validation"),
        most_rows=4000,
        like=("c4-train.jsonl.gz", "c4-validation.jsonl.gz"),
    ),
    "alpaca": NamedSet(
        "Stanford Alpaca instructions with answers",
        ("tatsu-lab/alpaca",),
        splits=("train", "train"),
        like=("alpaca.json", "alpaca.json"),
    ),
}


@dataclass(frozen=True)
class Source:
    """The rows of a text source as they stand in it: texts or objects. `join` goes between them
    where they are read as one text; `where` names flag and source in messages.
    """

    name: str
    where: str
    rows: tuple[Any, ...]
    join: str


def read_text(
    data: str, *, split: str, text_field: str | None = None, tokenizer: Any = None
) -> Text:
    """All text of DATA, as `read_source` finds it. Raises `DataError`, also if it holds no text."""
    source = read_source(data, split=split, text_field=text_field)
    known, first = NAMED.get(data), source.rows[0] if source.rows else None
    if known and text_field is None and isinstance(first, dict) and known.field in first:
        text_field = known.field
    found = Text(data, tuple(row_texts(source, text_field, tokenizer)), source.join)
    if not any(row.strip() for row in found.rows):
        raise DataError(f"{source.where}: holds no text")
    return found


def read_source(data: str, *, split: str, text_field: str | None = None) -> Source:
    """The rows of DATA. `split` "train" or "test" picks the part of a named set; a file is read
    whole. Raises `DataError`.

    `NAME=PATH` reads a local copy of a named set by that set's own rules: a line of
    `wikitext2=wiki.test.raw` is a row, for example.
    """
    flag = "--ppl" if split == "test" else "--data"
    where = f"{flag} {data}"
    if text_field is not None and not has_columns(data):
        raise DataError(
            f"--text-field {text_field}: {data} is plain text and has no columns; leave it out"
        )
    if data == "pydoc":
        return Source(data, where, _pydoc(split), "\n\n")
    if data in NAMED and data != "self":
        return Source(data, where, _from_hub(data, split), NAMED[data].join)
    name, _, place = data.partition("=")
    known = NAMED[name] if place and name in NAMED and NAMED[name].hub else None
    path = Path(os.path.expandvars(place if known else data)).expanduser()
    if not path.is_file():
        names = [name for name in NAMED if name != "self" or split == "train"]
        raise DataError(
            f"{where}: neither a file nor a known set; allowed: {', '.join(names)}, NAME=PATH, or a"
            f" path{did_you_mean(data, names)}"
        )
    kind = file_type(path.name)
    if kind is None:
        raise DataError(f"{where}: unknown file type; allowed: {', '.join(FILE_TYPES)}")
    try:
        if kind not in PLAIN:
            return Source(data, where, tuple(rows_of(path, kind)), "\n\n")
        whole = plain_text(path)
    except (OSError, ValueError, EOFError, RecursionError, zlib.error, csv.Error) as failure:
        raise DataError(
            f"{where}: cannot be read: {' '.join(str(failure).split())[:200]}"
        ) from failure
    if known:
        return Source(
            data, where, tuple(known.row(line) for line in whole.splitlines()), known.join
        )
    return Source(data, where, (whole,), "")


def sources(data: str) -> list[str]:
    """The texts that DATA names: several are separated by commas, unless there is a file of that
    very name.
    """
    return (
        [data] if Path(data).expanduser().is_file() else [name.strip() for name in data.split(",")]
    )


def has_columns(data: str) -> bool:
    """Whether DATA is made of rows with columns, one of which --text-field can name."""
    known = NAMED.get(data)
    return bool(known.hub) if known else file_type(data) not in PLAIN


def fields_of(names: Sequence[str], text_field: str | None) -> list[str | None]:
    """For each of several texts the column to read: --text-field is for those that have columns.
    Raises `DataError` where none has.
    """
    if text_field is not None and not any(map(has_columns, names)):
        raise DataError(
            f"--text-field {text_field}: {', '.join(names)} is plain text and has no columns; leave"
            " it out"
        )
    return [text_field if has_columns(name) else None for name in names]


_SURROGATE = re.compile("[\ud800-\udfff]")
TEXT_FIELDS = ("text", "content", "page", "document", "sentence")
"""Columns tried in this order where --text-field is not given."""


def row_texts(source: Source, field: str | None, tokenizer: Any) -> list[str]:
    """The text of every row. Rows that hold none (null, NaN, no such column where others have it)
    are left out, blank ones stay as they are; both are counted, and said of a user's file. Raises
    `DataError` with the row's number.
    """
    found = [
        row_text(row, number, source.where, field, tokenizer)
        for number, row in enumerate(source.rows, start=1)
    ]
    texts = [text for text in found if text is not None]
    if found and not texts and field is not None:
        row = source.rows[0]
        raise DataError(
            f"--text-field {field}: no row of {source.name} has such text; it has"
            f" {', '.join(map(str, row))}{did_you_mean(field, map(str, row))}"
        )
    empty = sum(text is None or not text.strip() for text in found)
    if empty and len(found) > 1 and source.name.partition("=")[0] not in NAMED:
        logger.warning("%s: %s of %s rows are empty", source.where, f"{empty:,}", f"{len(found):,}")
    return texts


def row_text(row: Any, number: int, where: str, field: str | None, tokenizer: Any) -> str | None:
    """The text of row `number` (`where`: flag and source, for messages), None where it has none:
    the named field; else chat messages through the template, an Alpaca triple, or a usual column.
    """
    if row is None or isinstance(row, str) or is_missing(row):
        return cell_text(row, number, where)
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: row {number} is neither text nor an object but {type(row).__name__}"
        )
    if field is not None:
        return cell_text(row.get(field), number, where)
    if isinstance(row.get("messages"), list):
        return (
            str(through_template(tokenizer, row["messages"], number, where, tokenize=False))
            if row["messages"]
            else None
        )
    if "instruction" in row and "output" in row:
        parts = [
            cell_text(row.get(name), number, where) for name in ("instruction", "input", "output")
        ]
        return "\n\n".join(part for part in parts if part) or None
    known = [name for name in (*TEXT_FIELDS, "messages") if name in row]
    # a list is not text, but another column may be
    for name in sorted(known, key=lambda name: isinstance(row[name], (list, dict))):
        text = cell_text(row[name], number, where)
        if text is not None:
            return text
    if known:
        return None
    raise DataError(
        f"{where}: no column holds text under a usual name; choose one of"
        f" {', '.join(map(str, row))} with --text-field"
    )


def is_missing(value: Any) -> bool:
    """Whether a row or cell is null, or NaN, which tables write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def cell_text(value: Any, number: int, where: str) -> str | None:
    """A cell as text: a number as it is written; None for null and NaN. Raises `DataError` for
    anything else.

    Half of a surrogate pair, which JSON can write and UTF-8 cannot, becomes the replacement
    character.
    """
    if is_missing(value):
        return None
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATE.sub("\ufffd", value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"{where}: row {number} holds {type(value).__name__} where text should be; choose a column"
        " of text with --text-field"
    )


def through_template(
    tokenizer: Any, messages: Sequence[Any], number: int, where: str, **options: Any
) -> Any:
    """What the tokenizer's chat template makes of the messages of row `number`. Raises `DataError`
    with the template's own words.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError(
            f"{where}: has chat messages, but the model's tokenizer has no chat template; name a"
            " plain --text-field"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as failure:  # a template is a program of the model's; it may fail in any way
        said = " ".join(str(failure).split())[:200] or type(failure).__name__
        raise DataError(
            f"{where}: row {number}: the model's chat template refuses it: {said}; change or leave"
            " out such rows, or name a plain --text-field"
        ) from failure


def _pydoc(split: str) -> tuple[str, ...]:
    """Topics of the language reference; every fifth (by a hash of its name) is held out as the test
    split.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    held_out = [
        name for name in sorted(topics) if hashlib.sha256(name.encode()).digest()[0] % 5 == 0
    ]
    if split == "test":
        return tuple(topics[name] for name in held_out)
    # topics quote one another: a held-out paragraph is taken out of every other topic too
    parts = {" ".join(part.split()) for name in held_out for part in topics[name].split("\n\n")}
    train = [
        part
        for name in sorted(topics)
        if name not in held_out
        for part in topics[name].split("\n\n")
    ]
    return tuple(part for part in train if " ".join(part.split()) not in parts)


def _from_hub(name: str, split: str) -> tuple[Any, ...]:
    """The rows of a named set through `datasets`, with the local way out where the hub cannot be
    reached.
    """
    known, flag = NAMED[name], "--ppl" if split == "test" else "--data"
    way_out = (
        f"give a local copy instead (for example {flag}"
        f" {name}=path/to/{known.like[split == 'test']}), or use {flag} pydoc"
    )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"{flag} {name}: needs the package datasets (pip install 'grasp-llm[data]'); {way_out}"
        ) from None
    if not reachable() and not HF_HUB_OFFLINE:
        raise DataError(
            f"{flag} {name}: the Hugging Face hub cannot be reached; {way_out}, or set"
            " HF_HUB_OFFLINE=1 to use your cache"
        )
    chosen = known.splits[split == "test"]
    try:
        rows = datasets.load_dataset(
            *known.hub, split=chosen, streaming=known.most_rows is not None, revision=known.revision
        )
        return tuple(_head(rows, known.most_rows))
    except Exception as failure:  # the hub client raises many kinds; all mean the same to the user
        raise DataError(
            f"{flag} {name}: the Hugging Face hub did not give it"
            f" ({' '.join(str(failure).split())[:120]}); {way_out}"
        ) from failure


def _head(rows: Any, most: int | None) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        if most is not None and number >= most:
            return
        yield row
