"""The models of a report, one `Row` each, and what was measured of them, one `Column` each.

Two numbers share a column when they have the same unit and name. Where a model has several such
(the decode speed at two batch sizes, say), the settings that tell them apart become part of the
column. Numbers in one column whose settings differ between models must not be compared; such cells
are marked.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp.core.results import Result
from grasp.core.score import Score
from grasp.report.reading import Checkpoint, Material
from grasp.report.wording import plain, short_name

SETTINGS = (
    "batch_size",
    "prompt_len",
    "new_tokens",
    "compile",
    "num_fewshot",
    "limit",
    "num_examples",
    "filter",
    "version",
    "harness",
    "seq_len",
    "stride",
    "bos",
    "join",
    "num_blocks",
    "num_tokens",
    "num_prompts",
    "num_tasks",
    "split",
    "device",
    "dtype",
    "threads",
    "attention",
    "against",
)
"""Entries of a protocol that say how a number was made. The others are further numbers."""
GROUPS = {
    "perplexity": "Perplexity",
    **dict.fromkeys(("nats/token", "top-1 agreement", "perplexity ratio"), "Close to dense"),
    **dict.fromkeys(("repetition", "tokens", "same beginning"), "Greedy text"),
    **dict.fromkeys(("tokens/s", "requests/s", "s", "ms", "s/token", "ms/token"), "Speed"),
    **dict.fromkeys(("bytes", "bytes/s", "GB/s", "B"), "Memory"),
}
"""unit -> the heading its columns stand under. Others are metrics of tasks, or of speed where the
protocol has a prompt length.
"""
ORDER = ("Perplexity", "Close to dense", "Tasks", "Greedy text", "Speed", "Memory")
LOWER_IS_BETTER = (
    "perplexity",
    "nats/token",
    "perplexity ratio",
    "repetition",
    "s",
    "ms",
    "s/token",
    "ms/token",
    "bytes",
    "B",
)
NO_BEST = ("tokens", "bytes/s", "GB/s")
SHARES = ("top-1 agreement", "share of dense", "repetition", "same beginning")


@dataclass(frozen=True)
class Row:
    """A model in the report. No other has its `label`; `file` is where it was read, `anchor` its
    checkpoint's place on the page.
    """

    result: Result
    label: str
    file: Path | None
    anchor: str = ""

    @property
    def is_dense(self) -> bool:
        """A model that nothing was taken from."""
        return self.result.method in ("", "dense") and not self.result.ratio

    @property
    def method(self) -> str:
        """The method that made it; "dense" for what nothing was taken from, "other" where that is
        not known.
        """
        return "dense" if self.is_dense else self.result.method or "other"


@dataclass(frozen=True)
class Column:
    """One measure, under the heading `group`. `setting` tells it from others of its unit and name;
    shares of one are shown in percent.
    """

    unit: str
    name: str
    setting: tuple[tuple[str, str], ...] = ()
    group: str = "Tasks"
    lower_is_better: bool = False
    is_share: bool = False

    @property
    def head(self) -> tuple[str, str]:
        """For the head of a table: the text, task or thing measured; and below it metric and
        settings.
        """
        told = {
            "nats/token": "KL",
            "top-1 agreement": "same top token",
            "perplexity ratio": "× perplexity",
            "perplexity": "",
        }
        told["mean of tasks"] = "of tasks"
        parts = [
            told.get(self.unit, self.unit),
            *(f"{key.replace('_', ' ')} {value}" for key, value in self.setting),
        ]
        return "mean" if self.name == "mean" else short_name(self.name), ", ".join(
            part for part in parts if part
        )

    def of(self, row: Row) -> Score | None:
        """The row's number, where it has one."""
        for score in row.result.scores:
            alike = (score.unit, score.name) == (self.unit, self.name)
            if alike and all(_setting(score, key) == value for key, value in self.setting):
                return score
        return None

    def value(self, row: Row) -> float | int | None:
        """The row's value, where it has one that can be drawn and compared."""
        score = self.of(row)
        return score.value if score is not None and math.isfinite(score.value) else None


def rows_of(material: Material) -> list[Row]:
    """A row for every result; where there are no results files, one for every checkpoint."""
    found = [(result, path) for path, results in material.results for result in results.rows]
    labels = Counter(result.label for result, _ in found)
    seen: Counter[str] = Counter()
    rows = []
    for result, path in found:
        label = (
            result.label
            if labels[result.label] == 1 or len(material.results) == 1
            else f"{result.label} ({path.stem})"
        )
        seen[label] += 1
        label = label if seen[label] == 1 else f"{label} #{seen[label]}"
        rows.append(Row(result, label, path, _anchor(result, path, material.checkpoints)))
    named = enumerate(zip(material.checkpoints, material.names, strict=True))
    return rows or [_row(checkpoint, label, number) for number, (checkpoint, label) in named]


def _row(checkpoint: Checkpoint, label: str, number: int) -> Row:
    result = Result(
        label,
        str(checkpoint.path),
        checkpoint.method,
        checkpoint.fields,
        checkpoint.after,
        ratio=checkpoint.ratio,
        seconds=checkpoint.seconds,
    )
    return Row(result, label, None, f"checkpoint-{number}")


def _anchor(result: Result, file: Path, checkpoints: Sequence[Checkpoint]) -> str:
    """The place on the page of the checkpoint that a result was measured on."""
    wanted = (
        {Path(result.model).absolute(), (file.absolute().parent / result.model)}
        if result.model
        else set()
    )
    places = {place.resolve() for place in wanted}
    exact = [number for number, one in enumerate(checkpoints) if one.path.resolve() in places]
    near = [
        number
        for number, one in enumerate(checkpoints)
        if one.name == Path(result.model).name and result.method == one.method
    ]
    chosen = exact or (near if len(near) == 1 else [])
    return f"checkpoint-{chosen[0]}" if chosen else ""


def reference(row: Row, rows: Sequence[Row]) -> Row | None:
    """The dense model a row is compared with: of the same file, if that has one."""
    dense = [one for one in rows if one.is_dense and not one.result.error]
    return next((one for one in dense if one.file == row.file), dense[0] if dense else None)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Everything that was measured of any row, in reading order."""
    tell: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        alike: dict[tuple[str, str], list[Score]] = {}
        for score in row.result.scores:
            alike.setdefault((score.unit, score.name), []).append(score)
        for key, scores in alike.items():
            known = tell.setdefault(key, [])
            known += [name for name in _differing(scores) if name not in known]
    found: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[Score]] = {}
    for row in rows:
        for score in row.result.scores:
            setting = tuple((key, _setting(score, key)) for key in tell[score.unit, score.name])
            found.setdefault((score.unit, score.name, setting), []).append(score)
    columns = [Column(*key, *_nature(scores)) for key, scores in found.items()]
    return sorted(
        columns,
        key=lambda column: (
            ORDER.index(column.group),
            column.name == "mean",
            column.unit == "share of dense",
        ),
    )


def _nature(scores: Sequence[Score]) -> tuple[str, bool, bool]:
    """(heading, lower is better, the values are shares of one) for the scores of a column."""
    unit, first = scores[0].unit, scores[0].protocol
    group = GROUPS.get(unit) or (
        "Speed" if "prompt_len" in first and "harness" not in first else "Tasks"
    )
    lower = unit in LOWER_IS_BETTER or any(
        score.protocol.get("lower_is_better") for score in scores
    )
    shares = group == "Tasks" and not lower and all(0 <= score.value <= 1 for score in scores)
    return group, lower, unit in SHARES or shares


def _differing(scores: Sequence[Score]) -> list[str]:
    """The settings in which several scores of one model differ; what else differs is only used
    where no known setting does.
    """
    keys = list(dict.fromkeys(key for score in scores for key in score.protocol))
    differ = [key for key in keys if len({_setting(score, key) for score in scores}) > 1]
    known = [key for key in SETTINGS if key in differ]
    return (
        known or [key for key in differ if not isinstance(scores[0].protocol.get(key), float)][:1]
    )


def _setting(score: Score, key: str) -> str:
    return plain(score.protocol.get(key, "–"))


def odd_ones(column: Column, rows: Sequence[Row]) -> set[str]:
    """Labels of the rows whose number in this column was made under other settings than most."""
    told: dict[str, str] = {}
    for row in rows:
        score = column.of(row)
        if score is not None:
            known = {
                key: score.protocol.get(key)
                for key in SETTINGS
                if key in score.protocol and key != "against"
            }
            told[row.label] = json.dumps(known, sort_keys=True, default=str)
    usual = Counter(told.values()).most_common(1)
    return {label for label, one in told.items() if one != usual[0][0]} if usual else set()


def best(column: Column, rows: Sequence[Row]) -> set[str]:
    """Labels of the compressed models that are best in a column, with those whose numbers cannot be
    told from the best one's.

    None where fewer than two can be compared, or none is worse.
    """
    odd = odd_ones(column, rows)
    found = {}
    for row in rows:
        score = column.of(row)
        if (
            score is not None
            and column.value(row) is not None
            and not row.is_dense
            and row.label not in odd
        ):
            found[row.label] = score
    if len(found) < 2 or column.unit in NO_BEST:
        return set()
    top = (min if column.lower_is_better else max)(found.values(), key=lambda score: score.value)
    chosen = {label for label, score in found.items() if not told_apart(score, top)}
    return chosen if len(chosen) < len(found) else set()


def told_apart(one: Score, other: Score) -> bool:
    """Whether two numbers differ by more than their uncertainty: 95 % intervals that do not meet,
    or two standard errors of the difference.
    """
    if one.interval is not None and other.interval is not None:
        return one.interval[0] > other.interval[1] or other.interval[0] > one.interval[1]
    if one.stderr is not None and other.stderr is not None:
        return abs(one.value - other.value) > 1.96 * math.hypot(one.stderr, other.stderr)
    return one.value != other.value


def total_seconds(result: Result) -> float | int | None:
    """What making the model took, all steps together."""
    return sum(result.seconds.values()) if result.seconds else None


def protocol(score: Score) -> Mapping[str, Any]:
    """How a number was made, known settings first."""
    first = [key for key in SETTINGS if key in score.protocol]
    return {
        key: score.protocol[key]
        for key in [*first, *(key for key in score.protocol if key not in first)]
    }
