"""The colours and type of the report, once: charts, style sheet and script all read them here.

Every colour has a light and a dark value. A chart is written in the light ones; a drawn SVG then
names them by CSS variable, and the script swaps them in the interactive chart, so both follow the
reader's `prefers-color-scheme`. The series colours differ in hue and in lightness, so that they
stay apart for colour-blind readers; charts use shapes beside them. The dense model is grey
everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

COLOURS: dict[str, tuple[str, str]] = {
    "page": ("#f6f7f9", "#0f1114"),
    "surface": ("#fefefe", "#171a1f"),
    "ink": ("#1c2127", "#e6e9ed"),
    "muted": ("#59636e", "#9ba6b2"),
    "rule": ("#d6dbe1", "#343b44"),
    "grid": ("#e6eaee", "#272d35"),
    "dense": ("#737d88", "#97a1ac"),
    "left": ("#b6bfc8", "#4b5561"),
    "s0": ("#0b6db5", "#5ab0f2"),
    "s1": ("#c74e0a", "#ff9252"),
    "s2": ("#00866a", "#35c99f"),
    "s3": ("#9c4796", "#df97d8"),
    "s4": ("#8a6800", "#e0b440"),
    "s5": ("#3d4ca6", "#9fabff"),
    "s6": ("#a3293d", "#ff8c9a"),
    "s7": ("#2b7a8c", "#6fc7d8"),
}
"""name -> (light, dark)."""
SERIES = tuple(name for name in COLOURS if re.fullmatch(r"s\d", name))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def light(name: str) -> str:
    """The colour that charts are written in."""
    return COLOURS[name][0]


def colours_of(methods: Iterable[str]) -> dict[str, str]:
    """A colour for every method, the same in every chart."""
    named = [method for method in dict.fromkeys(methods) if method != "dense"]
    return {
        "dense": light("dense"),
        **{method: light(SERIES[number % len(SERIES)]) for number, method in enumerate(named)},
    }


def variables(column: int, names: Collection[str] = tuple(COLOURS)) -> str:
    """These colours as CSS declarations: column 0 light, 1 dark."""
    found = ((name, pair) for name, pair in COLOURS.items() if name in names)
    return " ".join(f"--{name}: {pair[column]};" for name, pair in found)


def by_variable(svg: str) -> str:
    """A drawn chart whose colours are CSS variables in place of the light ones."""
    names = {pair[0]: name for name, pair in COLOURS.items()}

    def swap(found: re.Match[str]) -> str:
        name = names.get(found[2].lower())
        return found[0] if name is None else f'{found[1]}="var(--{name})"'

    return re.sub(r'\b(fill|stroke|stop-color)="(#[0-9a-fA-F]{6})"', swap, svg)


def config() -> dict[str, Any]:
    """Vega-Lite configuration of every chart."""
    ink, muted, rule, grid = (light(name) for name in ("ink", "muted", "rule", "grid"))
    return {
        "background": light("surface"),
        "font": FONT,
        "padding": 4,
        "view": {"stroke": None},
        "title": {
            "anchor": "start",
            "frame": "bounds",
            "color": ink,
            "fontSize": 13,
            "fontWeight": 600,
            "offset": 10,
            "subtitleColor": muted,
            "subtitleFontSize": 11.5,
            "subtitlePadding": 4,
        },
        "axis": {
            "labelColor": muted,
            "titleColor": muted,
            "labelFontSize": 11,
            "titleFontSize": 11.5,
            "titleFontWeight": 400,
            "gridColor": grid,
            "domainColor": rule,
            "tickColor": rule,
            "tickSize": 4,
            "labelLimit": 150,
            "titlePadding": 7,
        },
        "axisY": {"domain": False, "ticks": False},
        "legend": {
            "labelColor": ink,
            "titleColor": muted,
            "labelFontSize": 11.5,
            "titleFontSize": 11.5,
            "titleFontWeight": 400,
            "labelLimit": 200,
            "symbolStrokeWidth": 2,
            "orient": "bottom",
            "columnPadding": 14,
        },
        "range": {"category": [light(name) for name in SERIES]},
    }
