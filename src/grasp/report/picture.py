"""The picture of what every layer kept: where each mark stands, in pixels from the top left.

One column a decoder layer, one row a matrix or a width. A bar's height is the share that is left,
before the whole in grey. Its colour and form say how: grey is as it was, orange became narrower,
two thin bars are the two thin matrices of a low-rank pair, a cross is gone. `svg.py` writes the
marks down; `plots.py` paints them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grasp.report.kept import ATTENTION, MLP, Cell, Kept, Strip
from grasp.report.kept_words import in_a_line, spread
from grasp.report.wording import count, percent

LEFT, RIGHT, PLOT = 118, 168, 690
"""Room for names, for numbers, and for the layers between them."""
WIDEST, MOST_LAYERS = 46, 230
"""Of a column; of more layers, every k-th is drawn."""
ROW, BETWEEN, HEAD = 24, 7, 24
DENSE, NARROW, PAIR, BEHIND = "left", "s1", "s0", "grid"
"""Names of colours in `look.COLOURS`."""
HEADS = {ATTENTION: "Attention", MLP: "MLP"}


@dataclass(frozen=True)
class Box:
    """A rectangle; `told`: what it says when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    told: str = ""


@dataclass(frozen=True)
class Cross:
    """Two strokes about a point, `size` across."""

    x: float
    y: float
    size: float
    told: str = ""


@dataclass(frozen=True)
class Words:
    """A line of text; `anchor`: "start", "middle" or "end" of it is at x."""

    x: float
    y: float
    text: str
    size: float = 12
    colour: str = "ink"
    anchor: str = "start"
    bold: bool = False


Mark = Box | Cross | Words


@dataclass(frozen=True)
class Drawing:
    """Marks on a sheet, and what they show in words."""

    width: float
    height: float
    marks: tuple[Mark, ...]
    described: str


@dataclass(frozen=True)
class Columns:
    """Which layers are drawn, and where."""

    layers: range
    pitch: float

    @classmethod
    def of(cls, num_layers: int) -> Columns:
        """As wide as there is room."""
        layers = range(0, num_layers, -(-num_layers // MOST_LAYERS) or 1)
        return cls(layers, min(WIDEST, PLOT / max(len(layers), 1)))

    @property
    def bar(self) -> float:
        """Width of a bar."""
        return self.pitch - max(0.6, min(5.0, 0.22 * self.pitch))

    @property
    def end(self) -> float:
        """Where the last column ends."""
        return LEFT + len(self.layers) * self.pitch

    def x(self, place: int) -> float:
        """Where the bar of a column begins."""
        return LEFT + place * self.pitch + (self.pitch - self.bar) / 2


def picture_of(manifest: Mapping[str, Any], kept: Kept) -> Drawing:
    """The picture of a checkpoint."""
    columns = Columns.of(kept.num_layers)
    marks: list[Mark] = [
        Words(16, 28, "What every layer kept", 16, bold=True),
        Words(16, 48, _about(manifest, columns, kept.num_layers), 12, "muted"),
    ]
    width = max(columns.end + RIGHT, 700.0)
    y = _legend(kept, marks, width)
    marks += [
        Words(columns.end + 14, y + 12, "kept", 11, "muted"),
        Words(columns.end + 56, y + 12, "ranks or widths", 11, "muted"),
    ]
    groups: list[tuple[str, Sequence[Strip]]] = [("Whole layer", [kept.whole] * bool(kept.strips))]
    groups += [(HEADS[part], strips) for part, strips in kept.parts.items()]
    groups.append(("Widths: how many are left", kept.widths))
    for number, (head, strips) in enumerate(group for group in groups if group[1]):
        marks.append(Words(16, y + 13, head, 12, bold=True))
        y += HEAD - 2
        for strip in strips:
            height = ROW if number else 1.8 * ROW
            marks += _strip(strip, y, height, columns)
            y += height + BETWEEN
        y += 8
    marks += _axis(columns, y)
    return Drawing(width, y + 36, tuple(marks), f"What every layer kept. {in_a_line(kept)}.")


def _about(manifest: Mapping[str, Any], columns: Columns, num_layers: int) -> str:
    """The line below the title."""
    sizes, step = manifest["parameters"], columns.layers.step
    parts = [
        str(manifest["model"]["source"] or "a model in memory")[-60:],
        f"by {manifest['method']['name']}"[:40],
        (
            f"{count(sizes['before'])} → {count(sizes['after'])} parameters"
            f" ({percent(1 - sizes['after'] / sizes['before'])} removed)"
        ),
        *([f"layers 0, {step}, {2 * step} … of {num_layers}"] if step > 1 else []),
    ]
    return "  ·  ".join(parts)


def _legend(kept: Kept, marks: list[Mark], width: float) -> float:
    """The forms that there are, and what they mean; returns where the next row begins."""
    cells = [cell for strip in (*kept.strips, *kept.widths) for cell in strip.cells.values()]
    known = {
        "dense, as it was": Cell(1, 1),
        "dense, but narrower": Cell(1, 1, narrower=True),
        "low-rank: two thin matrices": Cell(1, 1, rank=1),
        "narrower and low-rank": Cell(1, 1, rank=1, narrower=True),
        "gone": Cell(1, 0),
    }
    x, y = 16.0, 62.0
    for text, like in known.items():
        if not any(_look(cell) == _look(like) for cell in cells):
            continue
        room = 20 + 6.7 * len(text) + 22
        if x + room > width:
            x, y = 16.0, y + 20
        marks += [*_bar(like, x, y, 13, 13), Words(x + 20, y + 11, text)]
        x += room
    text = "Each column is a decoder layer. A bar's height is the share that is left."
    marks.append(Words(16, y + 34, text, 12, "muted"))
    return y + 50


def _look(cell: Cell) -> tuple[bool, bool, bool]:
    return not cell.left, bool(cell.left) and cell.rank is not None, cell.narrower


def _strip(strip: Strip, y: float, height: float, columns: Columns) -> Iterator[Mark]:
    """One row: its name, its bars, its numbers."""
    middle = y + height / 2 + 4
    whole = strip.name == "all matrices"
    yield Words(LEFT - 8, middle, _cut(strip.name), 12, "muted", "end")
    there = [
        (columns.x(place), layer, strip.cells[layer])
        for place, layer in enumerate(columns.layers)
        if layer in strip.cells
    ]
    yield from (Box(x, y, columns.bar, height, BEHIND) for x, _, cell in there if cell.left)
    for x, layer, cell in there:
        yield from _bar(cell, x, y, columns.bar, height, _said(layer, strip, cell), whole)
    yield Words(columns.end + 14, middle, f"{100 * strip.share:.0f} %", 12, "ink", bold=True)
    yield Words(columns.end + 56, middle, _numbers(strip), 11.5, "muted")


def _bar(
    cell: Cell, x: float, y: float, width: float, height: float, said: str = "", whole: bool = False
) -> Iterator[Mark]:
    """What is left of a cell of this size."""
    if not cell.left:
        yield Cross(x + width / 2, y + height / 2, min(9.0, 0.9 * width, 0.6 * height), said)
        return
    tall = max(1.0, cell.share * height)
    top = y + height - tall
    if whole:
        yield Box(x, top, width, tall, "muted", said)
    elif cell.rank is None:
        yield Box(x, top, width, tall, NARROW if cell.narrower else DENSE, said)
    else:
        gap = max(0.8, min(2.0, 0.14 * width))
        thin = (width - gap) / 2
        yield Box(x, top, thin, tall, NARROW if cell.narrower else PAIR, said)
        yield Box(x + thin + gap, top, thin, tall, PAIR, said)


def _said(layer: int, strip: Strip, cell: Cell) -> str:
    """What a bar says when it is pointed at; nothing of what is as it was."""
    if cell.whole:
        return ""
    left = f": {cell.how}" if not cell.left else f": {cell.left:,} of {cell.of:,}"
    how = "" if strip.is_width or not cell.left or cell.how == "dense" else f", {cell.how}"
    return f"layer {layer}, {strip.name}{left}{how}"


def _axis(columns: Columns, y: float) -> Iterator[Mark]:
    """The layers' numbers."""
    room = next((n for n in (1, 2, 5, 10, 20, 50) if n * columns.pitch >= 22), 100)
    for place, layer in enumerate(columns.layers):
        if place % room == 0:
            x = columns.x(place) + columns.bar / 2
            yield Words(x, y + 4, str(layer), 11, "muted", "middle")
    middle = (LEFT + columns.end) / 2
    yield Words(middle, y + 22, "decoder layer", 11.5, "muted", "middle")


def _numbers(strip: Strip) -> str:
    """The range of its ranks or widths."""
    found = spread(strip.lefts if strip.is_width else strip.ranks).replace(" to ", "–")
    if strip.is_width:
        return found if strip.most in strip.lefts else f"{found} of {strip.most:,}"
    return f"rank {found}" if strip.ranks else ""


def _cut(name: str) -> str:
    return name if len(name) <= 17 else f"…{name[-16:]}"
