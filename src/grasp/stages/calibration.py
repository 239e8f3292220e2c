"""Text in, `Calibration` out: N whole blocks of token ids, drawn at seeded random places.

DATA is a named set, a file, `self` (sampled from the model) or `pydoc` (the language reference inside every Python, the default
where there is no network). All text of a source is joined and tokenised once; a sample is a block of `seq_len` tokens that starts
anywhere in it, never a line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import Tensor

from grasp.core.decoder import Decoder
from grasp.core.hub import reachable
from grasp.core.records import Calibration
from grasp.core.sweep import Progress, silent
from grasp.errors import DataError, NumericsError, did_you_mean


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


NAMED: dict[str, NamedSet] = {
    "pydoc": NamedSet("the language reference inside Python (pydoc_data.topics); one topic in five is held out for evaluation"),
    "self": NamedSet("text sampled from the model itself, from its beginning-of-sequence token at temperature 1"),
    "wikitext2": NamedSet("WikiText-2 raw, rows joined by a blank line", ("Salesforce/wikitext", "wikitext-2-raw-v1"), like="wiki.train.raw"),
    "ptb": NamedSet("Penn Treebank, Mikolov's preprocessing", ("ptb-text-only/ptb_text_only",), "sentence", " ", revision="refs/convert/parquet", like="ptb.train.txt"),
    "c4": NamedSet("C4, English, the first documents", ("allenai/c4", "en"), splits=("train", "validation"), most_rows=4000, like="c4.jsonl.gz"),
    "alpaca": NamedSet("Stanford Alpaca instructions with answers", ("tatsu-lab/alpaca",), splits=("train", "train"), like="alpaca.json"),
}  # fmt: skip

FILE_TYPES = (".txt", ".raw", ".md", ".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


def calibrate(
    model: Decoder,
    data: str,
    *,
    num_samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    text_field: str | None = None,
    progress: Progress = silent,
) -> Calibration:
    """`num_samples` blocks of `seq_len` tokens of DATA; of several, separated by commas, equally many of each.

    Raises `DataError` where there is too little text.
    """
    check_lengths(model, num_samples, seq_len)
    names = [data] if Path(data).expanduser().is_file() else [name.strip() for name in data.split(",")]
    if num_samples < len(names):
        raise DataError(f"--num-samples {num_samples}: too few for {len(names)} texts; give at least one block a text")
    shares = [num_samples // len(names) + (place < num_samples % len(names)) for place in range(len(names))]
    parts = [_draw(model, name, share, seq_len, seed, text_field, progress) for name, share in zip(names, shares, strict=True)]
    if len(parts) == 1:
        return parts[0]
    hashes = hashlib.sha256(" ".join(part.text_hash for part in parts).encode()).hexdigest()
    return Calibration(torch.cat([part.ids for part in parts]), data, seed, text_hash=hashes)


def _draw(model: Decoder, data: str, num_samples: int, seq_len: int, seed: int, text_field: str | None, progress: Progress) -> Calibration:
    """`num_samples` blocks of one text."""
    generator = torch.Generator().manual_seed(seed)
    if data == "self":
        return Calibration(_sample_from(model, num_samples, seq_len, seed, progress), "self", seed)
    text = read_text(data, split="train", text_field=text_field, tokenizer=model.tokenizer)
    stream = tokenize(model, text)
    bos = bos_of(model)
    body = seq_len - (bos is not None)
    if len(stream) < body:
        raise DataError(
            f"--data {data}: {len(stream):,} tokens are too few for one block of --seq-len {seq_len}; give more text or a smaller --seq-len"
        )
    starts = torch.randint(0, len(stream) - body + 1, (num_samples,), generator=generator)
    ids = torch.stack([stream[start : start + body] for start in starts.tolist()])  # num_samples, body
    if bos is not None:
        ids = torch.cat([torch.full((num_samples, 1), bos), ids], dim=1)
    return Calibration(ids, data, seed, text_hash=hashlib.sha256(text.encode("utf-8", "replace")).hexdigest())


def check_lengths(model: Decoder, num_samples: int, seq_len: int) -> None:
    """Raise `DataError` for block counts and lengths that cannot be."""
    if num_samples < 1:
        raise DataError(f"--num-samples {num_samples}: must be 1 or more")
    limit = getattr(model.config, "max_position_embeddings", None)
    if seq_len < 2 or (limit is not None and seq_len > limit):
        raise DataError(f"--seq-len {seq_len}: must be from 2 to {limit or 'the length'}, the longest the model reads")


def bos_of(model: Decoder) -> int | None:
    """The token every block must begin with, for families that need one; else None."""
    return model.tokenizer.bos_token_id if model.family.bos_per_block and model.tokenizer is not None else None


def tokenize(model: Decoder, text: str) -> Tensor:
    """The whole text as one stream of ids (num_tokens,), special tokens only where the tokenizer itself puts them."""
    if model.tokenizer is None:
        raise DataError("text needs a tokenizer, and this model has none; give a `Calibration` of token ids")
    special = bos_of(model) is None
    return model.tokenizer(text, return_tensors="pt", add_special_tokens=special, verbose=False).input_ids[0]


def read_text(data: str, *, split: str, text_field: str | None = None, tokenizer: Any = None) -> str:
    """All text of DATA. `split` "train" or "test" picks the part of a named set; a file is read whole. Raises `DataError`."""
    flag = "--ppl" if split == "test" else "--data"
    if data == "pydoc":
        return _pydoc(split)
    if data in NAMED and data != "self":
        return _from_hub(data, split)
    path = Path(data).expanduser()
    if not path.is_file():
        known = [name for name in NAMED if name != "self" or split == "train"]
        raise DataError(f"{flag} {data}: neither a file nor a known set; allowed: {', '.join(known)}, or a path{did_you_mean(data, known)}")
    kind = next((suffix for suffix in sorted(FILE_TYPES, key=len, reverse=True) if path.name.endswith(suffix)), None)
    if kind is None:
        raise DataError(f"{flag} {data}: unknown file type; allowed: {', '.join(FILE_TYPES)}")
    try:
        if kind in (".txt", ".raw", ".md"):
            text = path.read_text(encoding="utf-8")
        else:
            text = "\n\n".join(_row_text(row, f"{flag} {data}", text_field, tokenizer) for row in _rows(path, kind))
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as failure:
        raise DataError(f"{flag} {data}: cannot be read: {' '.join(str(failure).split())[:200]}") from failure
    if not text.strip():
        raise DataError(f"{flag} {data}: holds no text")
    return text


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


def _row_text(row: Any, where: str, field: str | None, tokenizer: Any) -> str:
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


def _pydoc(split: str) -> str:
    """Topics of the language reference; every fifth (by a hash of its name) is held out as the test split."""
    topics = importlib.import_module("pydoc_data.topics").topics
    held_out = [name for name in sorted(topics) if hashlib.sha256(name.encode()).digest()[0] % 5 == 0]
    if split == "test":
        return "\n\n".join(topics[name] for name in held_out)
    # topics quote one another: a held-out paragraph is taken out of every other topic too
    parts = {" ".join(part.split()) for name in held_out for part in topics[name].split("\n\n")}
    train = [part for name in sorted(topics) if name not in held_out for part in topics[name].split("\n\n")]
    return "\n\n".join(part for part in train if " ".join(part.split()) not in parts)


def _from_hub(name: str, split: str) -> str:
    """A named set through `datasets`, with the local way out where the hub cannot be reached."""
    known, flag = NAMED[name], "--ppl" if split == "test" else "--data"
    way_out = f"give a local file instead (for example {flag} path/to/{known.like}), or use {flag} pydoc"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"{flag} {name}: needs the package datasets (pip install 'grasp-llm[data]'); {way_out}") from None
    if not reachable() and not HF_HUB_OFFLINE:
        raise DataError(f"{flag} {name}: the Hugging Face hub cannot be reached; {way_out}, or set HF_HUB_OFFLINE=1 to use your cache")
    chosen = known.splits[split == "test"]
    try:
        rows = datasets.load_dataset(*known.hub, split=chosen, streaming=known.most_rows is not None, revision=known.revision)
        texts = [
            _row_text(row, f"{flag} {name}", known.field if known.field in row else None, None) for row in _head(rows, known.most_rows)
        ]
    except DataError:
        raise
    except Exception as failure:  # the hub client raises many kinds; all mean the same to the user
        raise DataError(
            f"{flag} {name}: the Hugging Face hub did not give it ({' '.join(str(failure).split())[:120]}); {way_out}"
        ) from failure
    return known.join.join(texts)


def _head(rows: Any, most: int | None) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        if most is not None and number >= most:
            return
        yield row


@torch.no_grad()
def _sample_from(model: Decoder, num_samples: int, seq_len: int, seed: int, progress: Progress) -> Tensor:
    """Blocks that the model writes itself, temperature 1, end-of-sequence forbidden so that blocks are whole."""
    begin = model.config.bos_token_id if model.config.bos_token_id is not None else model.config.eos_token_id
    if begin is None:
        raise DataError("--data self: the model has no beginning-of-sequence token to start from; use --data pydoc or a file")
    batch, blocks = 16, []
    with torch.random.fork_rng():  # leaves the caller's random state as it was
        torch.manual_seed(seed)
        for first in range(0, num_samples, batch):
            progress("sampling text from the model", first, num_samples)
            start = torch.full((min(batch, num_samples - first), 1), begin, device=model.device)
            try:
                block = model.model.generate(
                    start,
                    attention_mask=torch.ones_like(start),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=seq_len - 1,
                    max_new_tokens=seq_len - 1,
                    pad_token_id=begin,
                )
            except RuntimeError as failure:  # torch cannot draw from probabilities that are not finite
                raise NumericsError(
                    f"--data self: the model's probabilities are not finite; {model.first_non_finite(start, None)}"
                ) from failure
            blocks.append(block)
    progress("sampling text from the model", num_samples, num_samples)
    return torch.cat(blocks).cpu()
