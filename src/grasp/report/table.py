"""Rows and columns -> the report's table: texts, sort keys and marks, ready for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from grasp.core.score import Score
from grasp.report.rows import SETTINGS, Column, Row, best, odd_ones, protocol, total_seconds
from grasp.report.wording import count, duration, number, percent, plain, settings, size


@dataclass(frozen=True)
class Cell:
    """A number on the page: `key` sorts it, `extra` is its uncertainty, `hint` its protocol."""

    text: str = ""
    key: float | None = None
    extra: str = ""
    hint: str = ""
    best: bool = False
    odd: bool = False


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    row: Row
    about: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """`groups`: headings with the number of columns under each. `protocols`: (column, settings all
    share, (model, its own settings)).
    """

    groups: tuple[tuple[str, int], ...]
    heads: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    protocols: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]
    has_best: bool
    has_odd: bool


def value_of(column: Column, score: Score) -> str:
    """A score in the way of its unit."""
    if column.is_share:
        return percent(score.value)
    if column.unit in ("s", "ms") and math.isfinite(score.value):
        return duration(score.value / (1000 if column.unit == "ms" else 1))
    if column.unit in ("bytes", "B"):
        return size(score.value)
    return number(score.value, 3 if column.group == "Speed" else 4)


def _uncertainty(column: Column, score: Score) -> str:
    def show(value: float | int) -> str:
        return f"{100 * value:.1f}" if column.is_share else number(value, 3)

    if score.interval is not None:
        return f"{show(score.interval[0])} – {show(score.interval[1])}"
    return f"± {show(score.stderr)}" if score.stderr is not None else ""


def table_of(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """The table of all models."""
    sizes = {
        "parameters": [_cell(row.result.parameters, count) for row in rows],
        "removed": [_cell(row.result.ratio or None, percent) for row in rows],
        "bytes": [_cell(row.result.num_bytes, size) for row in rows],
    }
    costs = {
        "made in": [
            _cell(total_seconds(row.result), duration, settings(row.result.seconds)) for row in rows
        ],
        "peak memory": [_cell(row.result.peak_memory, size) for row in rows],
    }
    filled = {("Size", (head, "")): cells for head, cells in sizes.items()}
    for column in columns:
        filled[column.group, column.head] = _cells(column, rows)
    filled |= {("Cost", (head, "")): cells for head, cells in costs.items()}
    filled = {key: cells for key, cells in filled.items() if any(cell.text for cell in cells)}
    lines = [
        Line(row, _about(row), tuple(cells[number] for cells in filled.values()))
        for number, row in enumerate(rows)
    ]
    every = [cell for cells in filled.values() for cell in cells]
    return Table(
        tuple(
            (group, len(list(members)))
            for group, members in groupby(filled, key=lambda key: key[0])
        ),
        tuple(head for _, head in filled),
        tuple(lines),
        tuple(_protocol(column, rows) for column in columns),
        any(cell.best for cell in every),
        any(cell.odd for cell in every),
    )


def _about(row: Row) -> str:
    """The method and its fields, on one line."""
    fields = settings({key: value for key, value in row.result.fields.items() if value is not None})
    return " · ".join(part for part in ("" if row.is_dense else row.result.method, fields) if part)


def _cell(value: float | int | None, show: Callable[[Any], str], hint: str = "") -> Cell:
    return Cell() if value is None else Cell(show(value), float(value), hint=hint)


def _cells(column: Column, rows: Sequence[Row]) -> list[Cell]:
    top, odd = best(column, rows), odd_ones(column, rows)
    cells = []
    for row in rows:
        score = column.of(row)
        if score is None:
            cells.append(Cell())
            continue
        hint = f"{column.unit}: {settings(protocol(score))}"
        key = score.value if math.isfinite(score.value) else None
        cells.append(
            Cell(
                value_of(column, score),
                key,
                _uncertainty(column, score),
                hint,
                row.label in top,
                row.label in odd,
            )
        )
    return cells


def _protocol(column: Column, rows: Sequence[Row]) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """What all numbers of a column have in common, and what is each one's own."""
    found = {row.label: protocol(score) for row in rows if (score := column.of(row)) is not None}
    first = next(iter(found.values()))
    common = {
        key: value
        for key, value in first.items()
        if all(plain(one.get(key)) == plain(value) for one in found.values())
    }
    own = {
        label: {key: value for key, value in one.items() if key not in common}
        for label, one in found.items()
    }
    differing = {
        label: {key: value for key, value in one.items() if key in SETTINGS or len(found) > 1}
        for label, one in own.items()
    }
    return (
        f"{column.group}: {', '.join(part for part in column.head if part)}",
        settings({"unit": column.unit, **common}),
        tuple((label, settings(values)) for label, values in differing.items() if values),
    )
