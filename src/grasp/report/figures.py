"""Rows and checkpoints -> the figures of a report: which charts there are, their records, and each
one in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from grasp.report import anatomy, charts
from grasp.report.reading import Checkpoint
from grasp.report.rows import Column, Row, reference, total_seconds
from grasp.report.sweeps import Place, Sweep
from grasp.report.wording import count, duration, number, plain, settings, short_name

Colours = Mapping[str, str]


@dataclass(frozen=True)
class Figure:
    """A chart as Vega-Lite, and what it shows in words for those who cannot see it."""

    spec: dict[str, Any]
    described: str
    wide: bool = False


def heading(column: Column) -> str:
    """The title of a chart of this column."""
    name = "mean of tasks" if column.name == "mean" else short_name(column.name)
    told = {"nats/token": "KL from dense", "perplexity": "Perplexity"}.get(column.unit)
    setting = "".join(f", {key.replace('_', ' ')} {value}" for key, value in column.setting)
    plain_name = column.group == "Speed" or name == column.unit
    title = f"{told} on {name}" if told else name if plain_name else f"{name}, {column.unit}"
    return f"{title[:1].upper()}{title[1:]}{setting}"


def measures(columns: Sequence[Column], texts: int = 3) -> list[Column]:
    """The columns worth a chart: perplexities, the divergence from dense, the mean of the tasks or
    else a few tasks.
    """
    perplexities = [column for column in columns if column.unit == "perplexity"][:texts]
    divergence = [column for column in columns if column.unit == "nats/token"][:1]
    tasks = [
        column for column in columns if column.group == "Tasks" and column.unit != "share of dense"
    ]
    return (
        perplexities
        + ([column for column in tasks if column.name == "mean"] or tasks)[:2]
        + divergence
    )


def over_size(rows: Sequence[Row], columns: Sequence[Column], colours: Colours) -> list[Figure]:
    """Every measure against the number of parameters, where models of two sizes have it."""
    found = []
    for column in measures(columns):
        records: list[dict[str, Any]] = []
        for row in rows:
            value = column.value(row)
            if value is not None and row.result.parameters:
                records.append(
                    {
                        "model": row.label,
                        "method": row.method,
                        "parameters": row.result.parameters / 1e6,
                        "value": value,
                        "about": settings(row.result.fields) or "–",
                    }
                )
        if len({record["parameters"] for record in records}) < 2:
            continue
        title, share = heading(column), column.is_share
        told = "; ".join(
            f"{r['model']} {number(r['value'])} at {r['parameters']:,.1f} M parameters"
            for r in records[:30]
        )
        drawn, note = _on_the_scale(records) if column.unit == "perplexity" else (records, "")
        chart = charts.against_size(
            drawn, colours, title, column.unit, share, _fronts(drawn, column.lower_is_better), note
        )
        found.append(Figure(charts.spec_of(chart), f"{title} against size. {told}."))
    return found


def _on_the_scale(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The records without models that are broken, which would squash the others on the axis; and a
    note that says so.
    """
    ceiling = 10.0 ** math.ceil(
        math.log10(100 * max(min(record["value"] for record in records), 1e-6))
    )
    drawn = [record for record in records if record["value"] <= ceiling]
    missing = len(records) - len(drawn)
    return drawn, f"{missing} above {ceiling:,.0f} not drawn" if missing else ""


def _fronts(records: Sequence[Mapping[str, Any]], lower: bool) -> list[Mapping[str, Any]]:
    """Of every method with several sizes, the models that no smaller one of it beats."""
    kept: list[Mapping[str, Any]] = []
    for method in dict.fromkeys(
        record["method"] for record in records if record["method"] != "dense"
    ):
        front: list[Mapping[str, Any]] = []
        for record in sorted(
            (r for r in records if r["method"] == method),
            key=lambda r: (r["parameters"], r["value"] if lower else -r["value"]),
        ):
            if not front or (
                record["value"] < front[-1]["value"]
                if lower
                else record["value"] > front[-1]["value"]
            ):
                if front and record["parameters"] < 1.005 * front[-1]["parameters"]:
                    front.pop()  # as good as the same size
                front.append(record)
        kept += front if len(front) > 1 else []
    return kept


def speeds(
    rows: Sequence[Row], columns: Sequence[Column], colours: Colours, most: int = 8
) -> list[Figure]:
    """Bars for every speed in tokens a second, with the ratio to the dense model."""
    found = []
    for column in [column for column in columns if column.unit == "tokens/s"][:most]:
        records = []
        for row in rows:
            score, value = column.of(row), column.value(row)
            if score is None or value is None:
                continue
            ratio = ratio_to_dense(column, row, rows)
            told = number(value, 3) + ("" if ratio is None else f" ({ratio:.2f}×)")
            low, high = (
                score.interval
                if score.interval and all(map(math.isfinite, score.interval))
                else (None, None)
            )
            records.append(
                {
                    "model": row.label,
                    "method": row.method,
                    "value": value,
                    "told": told,
                    "low": low,
                    "high": high,
                    "end": high or value,
                }
            )
        if records:
            title = heading(column)
            told = "; ".join(f"{record['model']} {record['told']}" for record in records)
            found.append(
                Figure(
                    charts.spec_of(charts.bars(records, colours, title, "tokens a second")),
                    f"{title}, tokens a second: {told}.",
                )
            )
    return found


def ratio_to_dense(column: Column, row: Row, rows: Sequence[Row]) -> float | int | None:
    """A speed over the dense model's: as measured pair by pair where the protocol holds it, else
    the quotient. None for dense itself.
    """
    score, dense = column.of(row), reference(row, rows)
    other = None if dense is None else column.of(dense)
    if score is None or row.is_dense:
        return None
    known = score.protocol.get("ratio_to_dense", score.protocol.get("ratio"))
    if isinstance(known, (int, float)):
        return float(known)
    return score.value / other.value if other is not None and other.value else None


def sweep_figures(
    sweep: Sweep, rows: Sequence[Row], columns: Sequence[Column], colours: Colours
) -> list[Figure]:
    """What a field does to every measure, and to the time it took."""
    found = []
    for column in measures(columns, texts=2):
        values = [
            (place, value)
            for place in sweep.places
            if (value := column.value(place.row)) is not None
        ]
        dense = reference(sweep.places[0].row, rows)
        rule = None if dense is None else column.value(dense)
        found.append(
            _sweep_figure(
                sweep, values, heading(column), column.unit, column.is_share, rule, colours
            )
        )
    times = [
        (place, seconds)
        for place in sweep.places
        if (seconds := total_seconds(place.row.result)) is not None
    ]
    found.append(_sweep_figure(sweep, times, "Time to make it", "seconds", False, None, colours))
    return [figure for figure in found if figure is not None]


def _sweep_figure(
    sweep: Sweep,
    values: Sequence[tuple[Place, float | int]],
    title: str,
    unit: str,
    share: bool,
    rule: float | int | None,
    colours: Colours,
) -> Figure | None:
    places: dict[tuple[str, str], list[tuple[Place, float | int]]] = {}
    for place, value in values:
        places.setdefault(
            (place.line, plain(place.value if place.value is not None else "default")), []
        ).append((place, value))
    if len({shown for _, shown in places}) < 2:
        return None
    means = {key: fmean(value for _, value in members) for key, members in places.items()}
    many = len({line for line, _ in places}) > 1
    told = "; ".join(
        f"{line + ', ' if many else ''}{shown}: {number(mean)}"
        for (line, shown), mean in means.items()
    )
    described = f"{title} over {sweep.field.replace('_', ' ')}. {told}."
    if sweep.is_numeric:
        records = [
            {
                "x": place.value,
                "value": value,
                "line": line,
                "model": place.row.label,
                "mean": means[line, shown],
            }
            for (line, shown), members in places.items()
            for place, value in members
        ]
        return Figure(
            charts.spec_of(charts.over_field(records, sweep.field, title, unit, share, rule)),
            described,
        )
    bars = []
    for (line, shown), members in places.items():
        label = f"{shown} · {line}" if many else shown
        told_value = (
            duration(means[line, shown]) if unit == "seconds" else number(means[line, shown])
        )
        bars.append(
            {
                "model": label,
                "method": members[0][0].row.method,
                "value": means[line, shown],
                "low": None,
                "high": None,
                "end": means[line, shown],
                "told": told_value + (f" ({len(members)} runs)" if len(members) > 1 else ""),
            }
        )
    return Figure(charts.spec_of(charts.bars(bars, colours, title, unit, share)), described)


def checkpoint_figures(
    checkpoint: Checkpoint, colours: Colours, matrices: int
) -> dict[str, list[Figure]]:
    """The figures of a checkpoint by what they say: redundancy, losses, groups, recovery."""
    colour = colours[checkpoint.method]
    found: dict[str, list[Figure]] = {}
    if checkpoint.redundancy:
        layers = ", ".join(map(str, sorted(checkpoint.edited))) or "none"
        low = min(checkpoint.redundancy, key=checkpoint.redundancy.__getitem__)
        chart = charts.block_influence(
            anatomy.block_influence(checkpoint), colour, checkpoint.redundancy_kind
        )
        words = (
            f"Redundancy of {len(checkpoint.redundancy)} layers. Lowest: layer {low},"
            f" {number(checkpoint.redundancy[low])}. Edited: {layers}."
        )
        found["redundancy"] = [Figure(charts.spec_of(chart), words, wide=True)]
    losses = anatomy.layer_losses(checkpoint)
    if losses:
        words = (
            "Predicted rise of the loss by layer,"
            f" {number(sum(record['loss'] for record in losses))} nats a token in all."
        )
        found["losses"] = [Figure(charts.spec_of(charts.layer_losses(losses)), words, wide=True)]
    for matrix in anatomy.shown_matrices(checkpoint, matrices):
        drawn, title = anatomy.groups(matrix), f"Layer {matrix.layer}, {matrix.name}"
        told = f"kept {len(matrix.kept)} of {matrix.groups} groups" + (
            "" if len(drawn) == matrix.groups else f", {len(drawn)} drawn"
        )
        chart = charts.groups(drawn, colour, title, told, matrix.score, matrix.keeps_the_first)
        found.setdefault("groups", []).append(
            Figure(charts.spec_of(chart), f"{matrix.path}: {told}, by score {matrix.score}.")
        )
    curve = anatomy.recovery(checkpoint)
    if curve:
        words = (
            f"Loss while recovering: {number(curve[0]['loss'])} at step {curve[0]['step']:g},"
            f" {number(curve[-1]['loss'])} at step {curve[-1]['step']:g}."
        )
        found["recovery"] = [Figure(charts.spec_of(charts.recovery(curve)), words, wide=True)]
    return found


def summary(checkpoint: Checkpoint) -> str:
    """How small a checkpoint became, in one line."""
    return (
        f"{count(checkpoint.before)} → {count(checkpoint.after)} parameters"
        f" ({100 * checkpoint.ratio:.1f} % removed)"
    )
