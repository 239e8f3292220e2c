"""DATA in, text out: a named set, a file, or `pydoc`, the language reference inside every Python (where there is no network)."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE

from grasp.core.hub import reachable
from grasp.core.records import Text
from grasp.errors import DataError, did_you_mean


@dataclass(frozen=True)
class NamedSet:
    """A set known by name. `hub`: arguments of `datasets.load_dataset`; `field`: its text column; `join`: what goes between rows."""

    about: str
    hub: tuple[str, ...] = ()
    field: str = "text"
    join: str = "\n\n"
    splits: tuple[str, str] = ("train", "test")
    revision: str | None = None
    most_rows: int | None = None
    like: str = ""
    line_ends: bool = False

    def row(self, line: str) -> str:
        """The row that a line of the set's own text file is. WikiText's rows keep their line end, its blank lines are empty rows."""
        text = line.strip()
        return line + "\n" if self.line_ends and text else text


NAMED: dict[str, NamedSet] = {
    "pydoc": NamedSet("the language reference inside Python (pydoc_data.topics); one topic in five is held out for evaluation"),
    "self": NamedSet("text sampled from the model itself, from its beginning-of-sequence token at temperature 1"),
    "wikitext2": NamedSet("WikiText-2 raw, rows joined by a blank line", ("Salesforce/wikitext", "wikitext-2-raw-v1"), like="wiki.train.raw", line_ends=True),
    "ptb": NamedSet("Penn Treebank, Mikolov's preprocessing", ("ptb-text-only/ptb_text_only",), "sentence", " ", revision="refs/convert/parquet", like="ptb.train.txt"),
    "c4": NamedSet("C4, English, the first documents", ("allenai/c4", "en"), splits=("train", "validation"), most_rows=4000, like="c4.jsonl.gz"),
    "alpaca": NamedSet("Stanford Alpaca instructions with answers", ("tatsu-lab/alpaca",), splits=("train", "train"), like="alpaca.json"),
}  # fmt: skip

FILE_TYPES = (".txt", ".raw", ".md", ".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


@dataclass(frozen=True)
class Source:
    """The rows of a text source as they stand in it: texts or objects. `join` goes between them where they are read as one text;
    `where` names flag and source in messages."""

    name: str
    where: str
    rows: tuple[Any, ...]
    join: str


def read_text(data: str, *, split: str, text_field: str | None = None, tokenizer: Any = None) -> Text:
    """All text of DATA, as `read_source` finds it. Raises `DataError`, also where it holds no text."""
    source = read_source(data, split=split, text_field=text_field)
    known = NAMED.get(data)
    rows = []
    for row in source.rows:
        named = known.field if known and text_field is None and isinstance(row, dict) and known.field in row else text_field
        rows.append(row_text(row, source.where, named, tokenizer))
    found = Text(data, tuple(rows), source.join)
    if not found.whole.strip():
        raise DataError(f"{source.where}: holds no text")
    return found


def read_source(data: str, *, split: str, text_field: str | None = None) -> Source:
    """The rows of DATA. `split` "train" or "test" picks the part of a named set; a file is read whole. Raises `DataError`.

    `NAME=PATH` reads a local copy of a named set by that set's own rules: a line of `wikitext2=wiki.test.raw` is a row, for example.
    """
    flag = "--ppl" if split == "test" else "--data"
    where = f"{flag} {data}"
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
            f"{where}: neither a file nor a known set; allowed: {', '.join(names)}, NAME=PATH, or a path{did_you_mean(data, names)}"
        )
    kind = next((suffix for suffix in sorted(FILE_TYPES, key=len, reverse=True) if path.name.endswith(suffix)), None)
    if kind is None:
        raise DataError(f"{where}: unknown file type; allowed: {', '.join(FILE_TYPES)}")
    try:
        if kind not in (".txt", ".raw", ".md"):
            return Source(data, where, tuple(_rows(path, kind)), "\n\n")
        if known:
            lines = path.read_text(encoding="utf-8").splitlines()
            return Source(data, where, tuple(known.row(line) for line in lines), known.join)
        return Source(data, where, (path.read_text(encoding="utf-8"),), "")
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as failure:
        raise DataError(f"{where}: cannot be read: {' '.join(str(failure).split())[:200]}") from failure


def _rows(path: Path, kind: str) -> Iterator[Any]:
    if kind in (".jsonl", ".jsonl.gz"):
        opener: Callable[..., Any] = gzip.open if kind.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    elif kind == ".json":
        value = json.loads(path.read_text(encoding="utf-8"))
        yield from value if isinstance(value, list) else [value]
    elif kind == ".csv":
        usual = csv.field_size_limit(sys.maxsize)  # documents are longer than the module's limit of 128 KiB
        try:
            with path.open(newline="", encoding="utf-8") as lines:
                yield from csv.DictReader(lines)
        finally:
            csv.field_size_limit(usual)
    else:
        try:
            parquet = importlib.import_module("pyarrow.parquet")  # comes with `datasets`; loaded only for parquet files
        except ImportError:
            raise ValueError("parquet needs the package pyarrow: pip install 'grasp-llm[data]'") from None
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()


TEXT_FIELDS = ("text", "content", "page", "document", "sentence")
"""Columns tried in this order where --text-field is not given."""


def row_text(row: Any, where: str, field: str | None, tokenizer: Any) -> str:
    """The text of one row (`where`: flag and source, for messages): the named field; else chat messages through the template, an Alpaca triple, or a usual column."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is neither text nor an object but {type(row).__name__}")
    if field is not None:
        if not isinstance(row.get(field), str):
            raise DataError(
                f"--text-field {field}: a row of {where.partition(' ')[2]} has no such text; it has {', '.join(map(str, row))}{did_you_mean(field, row)}"
            )
        return row[field]
    if isinstance(row.get("messages"), list):
        if tokenizer is None or not tokenizer.chat_template:
            raise DataError(f"{where}: has chat messages, but the model's tokenizer has no chat template; name a plain --text-field")
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    if "instruction" in row and "output" in row:
        return "\n\n".join(part for part in (row["instruction"], row.get("input", ""), row["output"]) if part)
    for name in TEXT_FIELDS:
        if isinstance(row.get(name), str):
            return row[name]
    raise DataError(f"{where}: no column holds text under a usual name; choose one of {', '.join(map(str, row))} with --text-field")


def _pydoc(split: str) -> tuple[str, ...]:
    """Topics of the language reference; every fifth (by a hash of its name) is held out as the test split."""
    topics = importlib.import_module("pydoc_data.topics").topics
    held_out = [name for name in sorted(topics) if hashlib.sha256(name.encode()).digest()[0] % 5 == 0]
    if split == "test":
        return tuple(topics[name] for name in held_out)
    # topics quote one another: a held-out paragraph is taken out of every other topic too
    parts = {" ".join(part.split()) for name in held_out for part in topics[name].split("\n\n")}
    train = [part for name in sorted(topics) if name not in held_out for part in topics[name].split("\n\n")]
    return tuple(part for part in train if " ".join(part.split()) not in parts)


def _from_hub(name: str, split: str) -> tuple[Any, ...]:
    """The rows of a named set through `datasets`, with the local way out where the hub cannot be reached."""
    known, flag = NAMED[name], "--ppl" if split == "test" else "--data"
    way_out = f"give a local copy instead (for example {flag} {name}=path/to/{known.like}), or use {flag} pydoc"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"{flag} {name}: needs the package datasets (pip install 'grasp-llm[data]'); {way_out}") from None
    if not reachable() and not HF_HUB_OFFLINE:
        raise DataError(f"{flag} {name}: the Hugging Face hub cannot be reached; {way_out}, or set HF_HUB_OFFLINE=1 to use your cache")
    chosen = known.splits[split == "test"]
    try:
        rows = datasets.load_dataset(*known.hub, split=chosen, streaming=known.most_rows is not None, revision=known.revision)
        return tuple(_head(rows, known.most_rows))
    except Exception as failure:  # the hub client raises many kinds; all mean the same to the user
        raise DataError(
            f"{flag} {name}: the Hugging Face hub did not give it ({' '.join(str(failure).split())[:120]}); {way_out}"
        ) from failure


def _head(rows: Any, most: int | None) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        if most is not None and number >= most:
            return
        yield row
