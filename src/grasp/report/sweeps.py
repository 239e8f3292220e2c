"""Which fields were varied: rows of one method that differ in one field and are alike in all others
make a sweep over it.

Two fields that change together (a retain ratio and the number of layers that keeps the size) are
one sweep, named after the first. A field that only repeats the run, the seed, does not tell rows
apart: its runs are points over the same place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grasp.report.rows import Row
from grasp.report.wording import plain

REPEATS = ("seed",)
SIZES = ("ratio", "target_parameters")
"""Fields that set the size: the charts over size show them already."""
PREFERRED = ("retain_ratio", "num_samples", "score", "data")


@dataclass(frozen=True)
class Place:
    """A row in a sweep: the field's value, and the line (of equal other fields) it belongs to."""

    row: Row
    value: Any
    line: str


@dataclass(frozen=True)
class Sweep:
    """Rows over the values of `field`. Numbers make lines, other values bars."""

    field: str
    is_numeric: bool
    places: tuple[Place, ...]


def sweeps_of(rows: Sequence[Row], most: int = 6) -> list[Sweep]:
    """Every sweep among the rows, numeric fields first; at most so many.

    A field of words whose rows all lie on the lines of a numeric sweep tells those lines apart, and
    has no charts of its own.
    """
    measured = [
        row for row in rows if not row.result.error and not row.is_dense and row.result.scores
    ]
    fields = sorted(
        {name for row in measured for name in row.result.fields} - set(REPEATS) - set(SIZES),
        key=lambda name: (_rank(name), name),
    )
    over = [sweep for name in fields if (sweep := _over(name, measured)) is not None]
    found: list[Sweep] = []
    for sweep in sorted(over, key=lambda sweep: not sweep.is_numeric):
        labels = {place.row.label for place in sweep.places}
        shown = any(
            other.is_numeric
            and not sweep.is_numeric
            and labels <= {place.row.label for place in other.places}
            for other in found
        )
        if not shown and not any(_partition(sweep) == _partition(other) for other in found):
            found.append(sweep)
    return found[:most]


def _rank(name: str) -> int:
    return PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)


def _partition(sweep: Sweep) -> set[frozenset[str]]:
    """The rows with equal values: the same for two fields that change together."""
    together: dict[str, set[str]] = {}
    for place in sweep.places:
        together.setdefault(_key(place.value), set()).add(place.row.label)
    return {frozenset(labels) for labels in together.values()}


def _over(field: str, rows: Sequence[Row]) -> Sweep | None:
    """The sweep over one field, or None where nothing varies in it alone."""
    lines: list[list[Row]] = []
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        if any(field in row.result.fields for row in mine):
            others = [
                name for name in _names(mine) if name != field and not _follows(name, field, mine)
            ]
            alike: dict[str, list[Row]] = {}
            for row in mine:
                alike.setdefault(_key([row.result.fields.get(name) for name in others]), []).append(
                    row
                )
            lines += [
                members
                for members in alike.values()
                if len({_key(row.result.fields.get(field)) for row in members}) > 1
            ]
    values = [row.result.fields.get(field) for members in lines for row in members]
    known = [value for value in values if value is not None]
    is_numeric = bool(known) and all(_is_number(value) for value in known)
    places = [
        Place(row, row.result.fields.get(field), name)
        for name, members in zip(_named(lines, field), lines, strict=True)
        for row in members
        if not is_numeric or row.result.fields.get(field) is not None
    ]
    if len({_key(place.value) for place in places}) < 2:
        return None
    return Sweep(field, is_numeric, tuple(places))


def _named(lines: Sequence[Sequence[Row]], field: str) -> list[str]:
    """What tells the lines apart: the method where it differs, then the other fields that do."""
    firsts = [members[0] for members in lines]
    varied = [
        name
        for name in _names(firsts)
        if name != field and len({_key(row.result.fields.get(name)) for row in firsts}) > 1
    ]
    methods = {row.method for row in firsts}
    named = []
    for row in firsts:
        told = [
            f"{name.replace('_', ' ')} {plain(row.result.fields[name])}"
            for name in varied
            if name in row.result.fields
        ]
        named.append(", ".join([*([row.method] if len(methods) > 1 else []), *told]) or row.method)
    return named


def _names(rows: Sequence[Row]) -> list[str]:
    return [
        name
        for name in dict.fromkeys(name for row in rows for name in row.result.fields)
        if name not in REPEATS
    ]


def _follows(name: str, field: str, rows: Sequence[Row]) -> bool:
    """Whether `name` is a function of `field` and the other way round, over rows that differ in
    both.
    """
    pairs = {
        (_key(row.result.fields.get(field)), _key(row.result.fields.get(name))) for row in rows
    }
    values, others = {value for value, _ in pairs}, {other for _, other in pairs}
    return len(pairs) == len(values) == len(others) > 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
