"""The few numbers a reader looks for first: of the compressed models, the best in each thing that
was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grasp.report.figures import heading, ratio_to_dense
from grasp.report.rows import Column, Row, reference
from grasp.report.table import value_of
from grasp.report.wording import count, number, percent, short_name


@dataclass(frozen=True)
class Highlight:
    """`what` was measured, the best `value`, of which model, and what it is to be compared with."""

    what: str
    value: str
    label: str
    beside: str = ""


def highlights(rows: Sequence[Row], columns: Sequence[Column]) -> list[Highlight]:
    """At most five; none where there is but one, which the table shows as well."""
    made = [row for row in rows if not row.is_dense and not row.result.error]
    found: list[Highlight] = []
    sized = [row for row in made if row.result.ratio]
    if sized:
        row = max(sized, key=lambda row: row.result.ratio or 0.0)
        dense = reference(row, rows)
        sizes = [
            one.result.parameters
            for one in (dense, row)
            if one is not None and one.result.parameters
        ]
        found.append(
            Highlight(
                "Most removed",
                percent(row.result.ratio or 0.0),
                row.label,
                " → ".join(map(count, sizes)),
            )
        )
    for unit, most in (("perplexity", 2), ("share of dense", 1), ("top-1 agreement", 1)):
        for column in [column for column in columns if column.unit == unit][:most]:
            found += _of_column(column, made, rows)
    speeds = [column for column in columns if column.unit == "tokens/s"]
    faster = [
        (ratio, column, row)
        for column in speeds
        for row in made
        if (ratio := ratio_to_dense(column, row, rows)) is not None
    ]
    if faster:
        ratio, column, row = max(faster, key=lambda one: one[0])
        score = column.of(row)
        told = (
            f"{heading(column)}: {number(score.value, 3)} tokens/s"
            if score is not None
            else heading(column)
        )
        found.append(Highlight("Largest speed-up", f"{ratio:.2f} ×", row.label, told))
    return found[:5] if len(found) > 1 else []


def _of_column(column: Column, made: Sequence[Row], rows: Sequence[Row]) -> list[Highlight]:
    values = [(value, row) for row in made if (value := column.value(row)) is not None]
    if not values:
        return []
    value, row = (min if column.lower_is_better else max)(values, key=lambda one: one[0])
    score, dense = column.of(row), reference(row, rows)
    other = None if dense is None else column.of(dense)
    assert score is not None
    what = {
        "perplexity": "Lowest perplexity on",
        "share of dense": "Task scores kept of dense,",
        "top-1 agreement": "Same top token as dense on",
    }[column.unit]
    beside = (
        [f"dense {value_of(column, other)}, × {value / other.value:.2f}"]
        if other is not None and other.value
        else []
    )
    beside += [f"{percent(row.result.ratio)} removed"] if row.result.ratio else []
    return [
        Highlight(
            f"{what} {short_name(column.name)}",
            value_of(column, score),
            row.label,
            "; ".join(beside),
        )
    ]
