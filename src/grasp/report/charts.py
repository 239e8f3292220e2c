"""Records -> Altair charts: what is drawn, with which marks.

A chart is written for a column some 340 pixels wide and in light colours; the page stretches and
recolours it. Charts over all layers are `WIDE`. Sentences about how to read a chart are the page's,
not the chart's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import altair as alt
from altair.utils.schemapi import debug_mode

from grasp.report.axes import axis_of, number_format, scale_of, ticks
from grasp.report.look import light

NARROW, WIDE, HEIGHT = 340, 900, 210
SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
)
Record = Mapping[str, Any]


def unchecked() -> AbstractContextManager[None]:
    """While it holds, Altair does not check charts against its schema: that takes longer than
    drawing them, and the tests do it.
    """
    return debug_mode(False)


def spec_of(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The Vega-Lite of a chart, unchecked."""
    spec: dict[str, Any] = chart.to_dict(validate=False)
    spec.pop("config", None)  # the page has one for all
    return spec


def _data(records: Sequence[Record]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=list(records)))


def _whole(
    layers: Sequence[alt.Chart],
    title: str,
    subtitle: str = "",
    width: int = NARROW,
    height: int = HEIGHT,
) -> alt.LayerChart:
    """Layers on the same axes as one chart of this width, title and axes included."""
    head = alt.TitleParams(title, limit=width - 30)
    if subtitle:
        head["subtitle"] = subtitle
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    return alt.LayerChart(layer=list(layers), title=head, width=width, height=height, autosize=fit)


def _by_method(
    colours: Mapping[str, str], records: Sequence[Record], legend: bool = True
) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape by method, with one legend for both."""
    shown = {record["method"] for record in records}
    order = [method for method in colours if method in shown]
    shapes = [SHAPES[list(colours).index(method) % len(SHAPES)] for method in order]
    key: Any = alt.Legend(title=None, columns=3) if legend else None
    return (
        alt.Color(
            "method:N",
            scale=alt.Scale(domain=order, range=[colours[method] for method in order]),
            legend=key,
        ),
        alt.Shape("method:N", scale=alt.Scale(domain=order, range=shapes), legend=key),
    )


def against_size(
    records: Sequence[Record],
    colours: Mapping[str, str],
    title: str,
    unit: str,
    share: bool,
    front: Sequence[Record],
    note: str = "",
) -> alt.LayerChart:
    """A measure over the size, a point each model; one line a method through its best models at
    every size.

    A record: parameters (millions), value, method, model, about. `front` holds the records of the
    lines.
    """
    colour, shape = _by_method(colours, records)
    values = [record["value"] for record in records]
    x = alt.X(
        "parameters:Q",
        title="parameters, millions",
        scale=alt.Scale(zero=False, padding=14),
        axis=alt.Axis(tickCount=5, format=",.6~g"),
    )
    y = alt.Y("value:Q", title=unit, scale=scale_of(values, not share), axis=axis_of(values, share))
    lines = (
        _data(front)
        .mark_line(strokeWidth=2, opacity=0.75, aria=False)
        .encode(x, y, colour, order="parameters:Q")
    )
    tips = _tips(
        ("model", ""),
        ("about", ""),
        ("parameters", ",.1f"),
        ("value", number_format(share)),
        value=unit,
        about="fields",
        parameters="million parameters",
    )
    points = (
        _data(records)
        .mark_point(filled=True, size=75, opacity=1)
        .encode(x, y, colour, shape, tooltip=tips)
    )
    dense = [record["value"] for record in records if record["method"] == "dense"]
    return _whole(
        [*(_level(value) for value in dense[:1]), *([lines] if front else []), points], title, note
    )


def _level(value: float | int) -> alt.Chart:
    """The dense model's value, across the chart."""
    rule = alt.Chart(alt.InlineData(values=[{"value": value}]))
    return rule.mark_rule(
        strokeDash=[4, 4], color=light("dense"), strokeWidth=1.2, aria=False
    ).encode(alt.Y("value:Q"))


def _tips(*fields: tuple[str, str], **titles: str) -> list[alt.Tooltip]:
    """Tooltips: (field, number format; "" for text), and what to call some of the fields."""
    return [
        alt.Tooltip(
            f"{field}:{'Q' if form else 'N'}",
            title=titles.get(field, field),
            format=form or alt.Undefined,
        )
        for field, form in fields
    ]


def bars(
    records: Sequence[Record],
    colours: Mapping[str, str],
    title: str,
    unit: str,
    share: bool = False,
) -> alt.LayerChart:
    """One horizontal bar a model in the order given. A record: model, method, value, told (written
    behind the bar), low and high or None.
    """
    colour, _ = _by_method(colours, records, legend=False)
    order = [record["model"] for record in records]
    top = max((record["end"] for record in records), default=1) or 1
    # room for the words on both sides, by their length: nobody knows the reader's font
    names = min(150.0, 6.5 * max(len(label) for label in order) + 8)
    behind = 6.2 * max(len(record["told"]) for record in records) + 12
    plot = NARROW - 30 - names
    end = top * plot / max(plot - behind, 0.35 * plot)
    x = alt.X(
        "value:Q",
        title=unit,
        scale=alt.Scale(domain=[0, end]),
        axis=alt.Axis(tickCount=4, format=".0%" if share else ".4~s"),
    )
    y = alt.Y(
        "model:N",
        title=None,
        sort=order,
        axis=alt.Axis(labelLimit=names, minExtent=names, labelPadding=6, labelColor=light("ink")),
    )
    base = _data(records)
    tips = _tips(("model", ""), ("value", number_format(share)), value=unit)
    bar = base.mark_bar(height=15, cornerRadiusEnd=2).encode(x, y, colour, tooltip=tips)
    text = base.mark_text(align="left", dx=5, fontSize=11, color=light("ink"), aria=False).encode(
        alt.X("end:Q"), y, text="told:N"
    )
    spread = base.mark_rule(strokeWidth=1.5, color=light("ink"), opacity=0.7, aria=False).encode(
        alt.X("low:Q"), y, x2="high:Q"
    )
    known = any(record["low"] is not None for record in records)
    return _whole([bar, *([spread] if known else []), text], title, height=26 * len(order))


def over_field(
    records: Sequence[Record],
    field: str,
    title: str,
    unit: str,
    share: bool,
    rule: float | int | None,
) -> alt.LayerChart:
    """A measure over a numeric field, one line for every `line`. `rule`: the dense model's value. A
    record: x, value, line, model, mean.
    """
    values = [record["value"] for record in records] + ([rule] if rule is not None else [])
    lines = list(dict.fromkeys(record["line"] for record in records))
    key: Any = alt.Legend(title=None, columns=2) if len(lines) > 1 else None
    colour = alt.Color(
        "line:N",
        sort=lines,
        scale=alt.Scale(domain=lines, range=[light(f"s{n % 8}") for n in range(len(lines))]),
        legend=key,
    )
    base = _data(records)
    places = sorted({record["x"] for record in records})
    marks = alt.Axis(
        format=".6~g",
        labelOverlap=True,
        **({"values": places} if len(places) <= 10 else {"tickCount": 6}),
    )
    x = alt.X(
        "x:Q",
        title=field.replace("_", " "),
        scale=alt.Scale(zero=False, nice=False, padding=14),
        axis=marks,
    )
    y = alt.Y("value:Q", title=unit, scale=scale_of(values, not share), axis=axis_of(values, share))
    mean = base.mark_line(strokeWidth=2, aria=False).encode(x, alt.Y("mean:Q", title=unit), colour)
    tips = _tips(
        ("model", ""),
        ("line", ""),
        ("x", ",.4~g"),
        ("value", number_format(share)),
        value=unit,
        x=field.replace("_", " "),
    )
    points = base.mark_point(filled=True, size=60, opacity=1).encode(x, y, colour, tooltip=tips)
    return _whole([*([_level(rule)] if rule is not None else []), mean, points], title)


def block_influence(records: Sequence[Record], colour: str, kind: str) -> alt.LayerChart:
    """A bar a layer, logarithmic; edited layers in the method's colour."""
    states = [
        state
        for state in ("edited", "removed", "untouched")
        if any(record["state"] == state for record in records)
    ]
    fills = {"edited": colour, "removed": light("ink"), "untouched": light("left")}
    shown = [record["shown"] for record in records] + [records[0]["floor"]]
    named = "block influence" if kind == "bi" else "angular distance" if kind == "angular" else kind
    marks = (
        _data(records)
        .mark_bar(cornerRadiusEnd=1.5)
        .encode(
            alt.X(
                "layer:O",
                title="decoder layer",
                axis=alt.Axis(labelAngle=0, labelOverlap=True),
                scale=alt.Scale(paddingInner=0.25),
            ),
            alt.Y(
                "shown:Q",
                title=f"{named} (low = redundant)",
                scale=alt.Scale(type="log", domainMin=records[0]["floor"], nice=False),
                axis=alt.Axis(format=".6~g", values=ticks(shown)),
            ),
            alt.Y2("floor:Q"),
            alt.Color(
                "state:N",
                scale=alt.Scale(domain=states, range=[fills[state] for state in states]),
                legend=alt.Legend(title=None),
            ),
            tooltip=_tips(("layer", ".0f"), ("score", ".4~g"), ("state", "")),
        )
    )
    return _whole([marks], "Redundancy of every layer", width=WIDE, height=190)


def layer_losses(records: Sequence[Record]) -> alt.LayerChart:
    """Predicted rise of the loss, a bar a layer, attention and MLP on each other."""
    shown = {record["part"] for record in records}
    fills = {"attention": "s5", "MLP": "s7", "whole layer": "dense"}
    parts = [part for part in fills if part in shown or part != "whole layer"]
    marks = (
        _data(records)
        .mark_bar()
        .encode(
            alt.X(
                "layer:O",
                title="decoder layer",
                axis=alt.Axis(labelAngle=0, labelOverlap=True),
                scale=alt.Scale(paddingInner=0.25),
            ),
            alt.Y("loss:Q", title="nats a token", axis=alt.Axis(format=".6~g", tickCount=4)),
            alt.Color(
                "part:N",
                scale=alt.Scale(domain=parts, range=[light(fills[part]) for part in parts]),
                legend=alt.Legend(title=None),
            ),
            tooltip=_tips(("layer", ".0f"), ("part", ""), ("loss", ".3~g")),
        )
    )
    return _whole([marks], "Where the predicted loss comes from", width=WIDE, height=150)


def groups(
    records: Sequence[Record], colour: str, title: str, subtitle: str, score: str, by_rank: bool
) -> alt.LayerChart:
    """Score against σ (the paper's Figure 2), or, where the largest are kept anyway, against the
    group's number. Both logarithmic in score.
    """
    sigmas, scores = ([record[key] for record in records] for key in ("sigma", "score"))
    log = alt.Scale(type="log", nice=False, padding=8)
    x = alt.X(
        "sigma:Q",
        title="singular value σ",
        scale=log,
        axis=alt.Axis(format=".6~g", values=ticks(sigmas, 5)),
    )
    if by_rank:
        x = alt.X("group:Q", title="singular group, largest first", axis=alt.Axis(tickCount=5))
    states = ["kept", "left out"]
    marks = (
        _data(records)
        .mark_point(filled=True, size=16, opacity=0.85, aria=False)
        .encode(
            x,
            alt.Y(
                "score:Q",
                title=f"score ({score}, higher = keep)",
                scale=log,
                axis=alt.Axis(format=".6~g", values=ticks(scores)),
            ),
            alt.Color(
                "state:N",
                scale=alt.Scale(domain=states, range=[colour, light("left")]),
                legend=alt.Legend(title=None),
            ),
            alt.Order("state:N", sort="descending"),
            tooltip=_tips(("group", ".0f"), ("sigma", ".4~g"), ("score", ".4~g"), ("state", "")),
        )
    )
    return _whole([marks], title, subtitle)


def recovery(records: Sequence[Record]) -> alt.LayerChart:
    """Loss over training steps; the held-out one is what counts."""
    kinds = ["training", "held out"]
    marks = (
        _data(records)
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=25))
        .encode(
            alt.X("step:Q", title="step"),
            alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
            alt.Color(
                "kind:N",
                scale=alt.Scale(domain=kinds, range=[light("left"), light("s1")]),
                legend=alt.Legend(title=None),
            ),
            tooltip=_tips(("step", ",.0f"), ("kind", ""), ("loss", ".4~f")),
        )
    )
    return _whole([marks], "Loss while recovering", width=WIDE, height=200)
