"""What was measured: one `Result` a model, and the results files that `grasp eval`, `bench`,
`compare` and `demo` write and `grasp report` reads.

A results file is one JSON object:

    {"kind": "grasp-results", "format_version": 1, "title": ..., "command": ..., "rows": [a Result
    each], "versions": {...}, "machine": {...}}

Scores of all kinds are rows of one table, told apart by `unit`:

    perplexity        token perplexity on the text `name` (protocol: word_perplexity, bits_per_byte,
                      seq_len, ...)
    nats/token        KL divergence from the dense model on the text `name`
    top-1 agreement   share of positions where both models predict the same token
    perplexity ratio  to the dense model's, on the same blocks
    acc, acc_norm, exact_match, ...
                      a task's metric as lm-eval names it; `name` is the task, "mean" their mean
    share of dense    a mean of tasks over the dense model's
    tokens/s, s, bytes, ...
                      speed and memory; `name` says of what ("decode", "prefill", "time to first
                      token", ...)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec import Struct

from grasp.core import documents
from grasp.core.score import Score
from grasp.core.writing import whole_file
from grasp.errors import CheckpointError

KIND, FORMAT_VERSION = "grasp-results", 1


@dataclass(frozen=True)
class Generation:
    """A greedy continuation of a fixed prompt. `repetition`: share of its 4-grams that it has said
    before, 0 to 1; `ended`: by itself.
    """

    prompt: str
    text: str
    num_tokens: int = 0
    repetition: float = 0.0
    ended: bool = False


@dataclass(frozen=True)
class Result:
    """Everything measured about one model. `method` is "" for a model that grasp did not make;
    `error` says why nothing was measured.

    `ratio`: share of the dense model's parameters that is gone. `seconds` by step; `peak_memory` in
    bytes; `notes` are warnings that belong to the numbers; `key` is a hash of all that made the
    row, where something did that can do it again.
    """

    label: str
    model: str
    method: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    num_bytes: int | None = None
    ratio: float | None = None
    scores: tuple[Score, ...] = ()
    generations: tuple[Generation, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int | None = None
    notes: tuple[str, ...] = ()
    error: str = ""
    key: str = ""

    def score(self, unit: str, name: str | None = None) -> Score | None:
        """The first score of this unit (and name)."""
        return next((s for s in self.scores if s.unit == unit and name in (None, s.name)), None)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is empty is left out."""
        values = {
            **self.__dict__,
            "fields": dict(self.fields),
            "seconds": dict(self.seconds),
            "scores": [score.to_json() for score in self.scores],
            "generations": [vars(one) for one in self.generations],
            "notes": list(self.notes),
        }
        return {key: value for key, value in values.items() if value not in (None, "", (), [], {})}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Result:
        """The inverse of `to_json`. Raises `KeyError`, `TypeError` or `ValueError` where it is
        none.
        """
        values = dict(found)
        values["scores"] = tuple(Score.from_json(score) for score in values.get("scores", ()))
        values["generations"] = tuple(
            Generation(**{**one, "repetition": float(one.get("repetition", 0))})
            for one in values.get("generations", ())
        )
        values["ratio"] = None if values.get("ratio") is None else float(values["ratio"])
        # JSON knows no whole floats
        values["seconds"] = {
            name: float(value) for name, value in values.get("seconds", {}).items()
        }
        values["notes"] = tuple(values.get("notes", ()))
        return cls(**values)


class _Score(Struct):
    """A score as it is written: its protocol beside its value. Typed is what a table prints."""

    name: str
    value: float
    unit: str
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    word_perplexity: float | None = None
    bits_per_byte: float | None = None
    num_blocks: int | None = None
    num_tokens: int | None = None
    batch_size: int | None = None
    prompt_len: int | None = None
    new_tokens: int | None = None
    rounds: int | None = None
    threads: int | None = None
    low: float | None = None
    high: float | None = None
    p95: float | None = None


class _Row(Struct, forbid_unknown_fields=True):
    """A `Result` as it is written."""

    label: str
    model: str
    method: str = ""
    fields: dict[str, Any] = {}
    parameters: int | None = None
    num_bytes: int | None = None
    ratio: float | None = None
    scores: tuple[_Score, ...] = ()
    generations: tuple[Generation, ...] = ()
    seconds: dict[str, float] = {}
    peak_memory: int | None = None
    notes: tuple[str, ...] = ()
    error: str = ""
    key: str = ""


class _Head(Struct):
    kind: str
    format_version: int


class _File(_Head):
    rows: list[_Row]
    title: str | None = ""
    command: str | None = ""
    versions: dict[str, str] | None = None
    machine: dict[str, Any] | None = None
    about: dict[str, Any] | None = None


@dataclass(frozen=True)
class Results:
    """A results file: rows, and where they come from."""

    rows: tuple[Result, ...]
    title: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object of the file."""
        head = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "command": self.command,
            "about": dict(self.about),
        }
        return {
            **head,
            "rows": [row.to_json() for row in self.rows],
            "versions": dict(self.versions),
            "machine": dict(self.machine),
        }

    def write(self, path: Path) -> None:
        """Write the file whole or not at all. Raises `CheckpointError`."""
        with whole_file(path) as scratch:
            scratch.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a results file. Raises `CheckpointError` where it is damaged, something else, or of
        a newer format.
        """
        found, hint = documents.read_json(path), "the file is damaged"
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise CheckpointError(
                f"{path}: is no results file of grasp; grasp eval, bench, compare and demo write"
                " them"
            )
        if documents.check(path, found, _Head, hint).format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: written by a newer grasp; run `pip install -U grasp-llm`"
            )
        documents.check(path, found, _File, hint)
        rows = tuple(Result.from_json(row) for row in found["rows"])
        title, command = (str(found.get(key) or "") for key in ("title", "command"))
        versions, machine, about = (
            dict(found.get(key) or {}) for key in ("versions", "machine", "about")
        )
        return cls(rows, title, command, versions, machine, about)


def is_results(path: Path) -> bool:
    """Whether a file begins as results files do: another one is never replaced."""
    try:
        with path.open("rb") as file:
            begin = file.read(4096)
    except OSError:
        return False
    return not begin.strip() or re.search(rf'"kind"\s*:\s*"{KIND}"'.encode(), begin) is not None
