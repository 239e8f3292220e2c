"""Plots of a manifest, drawn with matplotlib into a file (.png, .svg or .pdf)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from grasp.core.destination import check_file
from grasp.core.writing import whole_file
from grasp.errors import RecipeError
from grasp.report.kept import Kept
from grasp.report.look import light
from grasp.report.picture import Box, Cross, Mark, picture_of

KEPT = "#c1440e"
PIXELS, POINTS, NARROWER = 100, 72, 0.9
"""Of a drawing, and typographic ones, an inch; matplotlib's font is wider than a browser's."""


def check_picture(path: Path) -> None:
    """Raise `RecipeError` where a picture cannot be written: asked before any work is done."""
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lstrip(".") not in kinds:
        raise RecipeError(
            f"--output {path}: not a picture matplotlib writes; allowed:"
            f" {', '.join('.' + kind for kind in kinds)}"
        )
    check_file(path, "--output")


def overview(manifest: dict[str, Any], path: Path) -> Path:
    """The picture of what every layer kept, in light colours."""
    drawing = picture_of(manifest, Kept.of(manifest))
    figure = Figure(figsize=(drawing.width / PIXELS, drawing.height / PIXELS), dpi=2 * PIXELS)
    figure.set_facecolor(light("surface"))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.set_axis_off()
    for mark in drawing.marks:
        _paint(axes, mark)
    return _written(figure, path)


def _paint(axes: Axes, mark: Mark) -> None:
    """One mark of a drawing; the axes' units are its pixels."""
    if isinstance(mark, Box):
        place, colour = (mark.x, mark.y), light(mark.colour)
        axes.add_patch(Rectangle(place, mark.width, mark.height, color=colour, linewidth=0))
    elif isinstance(mark, Cross):
        ends = [mark.x - mark.size / 2, mark.x + mark.size / 2]
        low, high = mark.y - mark.size / 2, mark.y + mark.size / 2
        for way in ([low, high], [high, low]):
            axes.plot(ends, way, color=light("muted"), linewidth=0.8)
    else:
        axes.text(
            mark.x,
            mark.y,
            mark.text.replace("$", r"\$"),
            fontsize=mark.size * NARROWER * POINTS / PIXELS,
            color=light(mark.colour),
            ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
            va="baseline",
            weight="bold" if mark.bold else "normal",
        )


def spectra(
    redundancy: dict[int, float], kind: str, singular_values: dict[str, list[float]], path: Path
) -> Path:
    """For `inspect`: redundancy per layer, and the share of each matrix's squared singular values
    that its largest ones hold.
    """
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(11, 7), layout="constrained")
    top.bar(list(redundancy), list(redundancy.values()), color=KEPT)
    top.set_yscale("log")
    top.set_xlabel("decoder layer")
    top.set_ylabel("block influence\n(low = redundant)" if kind == "bi" else "angular distance / π")
    top.margins(x=0.01)
    by_name: dict[str, list[list[float]]] = {}
    for matrix, values in singular_values.items():
        by_name.setdefault(matrix.rsplit(".", 1)[-1], []).append(values)
    for name, group in by_name.items():
        length = min(len(values) for values in group)
        shares = [_energy(values) for values in group]
        mean = [sum(share[k] for share in shares) / len(shares) for k in range(length)]
        bottom.plot([(k + 1) / length for k in range(length)], mean, label=name)
    bottom.set_xlabel("share of singular groups, largest σ first")
    bottom.set_ylabel("share of Σσ², mean over layers")
    bottom.legend(frameon=False, ncols=4)
    bottom.margins(x=0.01)
    return _written(figure, path)


def _written(figure: Figure, path: Path) -> Path:
    """The picture in its file, whole or not at all."""
    try:
        with whole_file(path) as scratch:
            figure.savefig(scratch, dpi=max(140, figure.dpi), format=path.suffix.lstrip("."))
    finally:
        pyplot.close(figure)
    return path


def _energy(values: list[float]) -> list[float]:
    total, running, shares = sum(v * v for v in values) or 1.0, 0.0, []
    for value in values:
        running += value * value
        shares.append(running / total)
    return shares
