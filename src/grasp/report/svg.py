"""A drawing as SVG text: in a page, in the page's colours; as a file, light or dark as the reader's
screen is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from itertools import groupby

from grasp.report import look
from grasp.report.picture import Box, Cross, Drawing, Mark, Words


def inline(drawing: Drawing, name: str) -> str:
    """An element of a page that has the colours of `look.variables`; `name` is an id of its own."""
    return look.by_variable(_svg(drawing, f'role="img" aria-labelledby="{name}"', name))


def file(drawing: Drawing) -> str:
    """A whole file, with both sets of colours in it."""
    body = look.by_variable(_svg(drawing, 'role="img" xmlns="http://www.w3.org/2000/svg"', "what"))
    used = set(re.findall(r"var\(--([\w-]+)\)", body))
    light, dark = (look.variables(column, used) for column in (0, 1))
    style = f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
    head, rest = body.split(">", 1)
    return f"{head}><style>{style}</style>{rest}"


def _svg(drawing: Drawing, attributes: str, name: str) -> str:
    width, height = _n(drawing.width), _n(drawing.height)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" font-family="{escape(look.FONT)}" {attributes}>',
        f'<title id="{name}">{escape(drawing.described)}</title>',
        f'<path d="M0 0H{width}V{height}H0z" fill="{look.light("surface")}"/>',
    ]
    for _, some in groupby(drawing.marks, _kind):
        parts += _together(list(some))
    return "".join(parts) + "</svg>\n"


def _kind(mark: Mark) -> tuple[str, ...]:
    """Marks of one kind that follow each other share an element."""
    colour = "" if isinstance(mark, Cross) else mark.colour
    return type(mark).__name__, colour


def _together(marks: list[Mark]) -> Iterator[str]:
    if isinstance(marks[0], Words):
        yield f'<g fill="{look.light(marks[0].colour)}">'
        yield from (_words(mark) for mark in marks if isinstance(mark, Words))
        yield "</g>"
        return
    paint = (
        f'fill="{look.light(marks[0].colour)}"'
        if isinstance(marks[0], Box)
        else f'fill="none" stroke="{look.light("muted")}" stroke-width="1.2"'
    )
    yield f"<g {paint}>"
    for said, some in groupby(marks, lambda mark: getattr(mark, "told", "")):
        path = "".join(map(_outline, some))
        end = f"><title>{escape(said)}</title></path>" if said else "/>"
        yield f'<path d="{path}"{end}'
    yield "</g>"


def _outline(mark: Mark) -> str:
    if isinstance(mark, Box):
        x, y, width, height = map(_n, (mark.x, mark.y, mark.width, mark.height))
        return f"M{x} {y}h{width}v{height}h-{width}z"
    assert isinstance(mark, Cross)
    half, size = mark.size / 2, _n(mark.size)
    left, top, low = _n(mark.x - half), _n(mark.y - half), _n(mark.y + half)
    return f"M{left} {top}l{size} {size}M{left} {low}l{size} -{size}"


def _words(mark: Words) -> str:
    anchor = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
    weight = ' font-weight="600"' if mark.bold else ""
    place = f'x="{_n(mark.x)}" y="{_n(mark.y)}" font-size="{_n(mark.size)}"'
    return f"<text {place}{anchor}{weight}>{escape(mark.text)}</text>"


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
