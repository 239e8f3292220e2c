"""Pictures of results/training-free.json and results/paper-table-3*.json, for docs/paper.md.

python benchmarks/plot_tables.py [results] [-o docs]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from panels import by_logarithm, finish

from grasp.core.results import Result, Results

OURS, PAPER, OTHERS = "#c1440e", "#4a6fa5", "#8a8a8a"
NAMED = {"grasp-fisher": OURS, "grasp": PAPER}
COLORS = ("#7a9a01", "#8e5ea2", "#b8860b", "#2e2e2e", "#3aa6a0", "#999999")
"""Of the others, in turn."""
FAR = 1e4
"""A perplexity beyond this is noise: a model that says nothing. It is drawn at the edge."""


def values(row: Result) -> list[float]:
    """The perplexities of a row, text by text."""
    return [score.value for score in row.scores if score.unit == "perplexity"]


def texts(rows: list[Result]) -> list[str]:
    found = next(row.scores for row in rows if row.scores)
    return [Path(score.name).name for score in found if score.unit == "perplexity"]


def methods(rows: list[Result], path: Path) -> None:
    """A line a method, best first by the second text; filled: the calibration's domain."""
    dense = next(row for row in rows if row.method == "dense")
    rows = sorted((row for row in rows if row is not dense), key=lambda row: values(row)[1])
    figure, axes = pyplot.subplots(figsize=(7.5, 0.34 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        color = NAMED.get(row.method, OTHERS)
        points = [min(value, FAR) for value in values(row)]
        axes.plot(points, [place] * len(points), color=color, linewidth=1, zorder=1)
        axes.scatter(points[0], place, color=color, s=30, zorder=2)
        axes.scatter(points[1], place, color="white", edgecolor=color, s=30, zorder=2)
    for value, style in zip(values(dense), ("-", ":"), strict=True):
        axes.axvline(value, color="#2e2e2e", linewidth=0.9, linestyle=style, zorder=0)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    ticks = (30, 50, 100, 200, 500, 1000, 2000, 5000, FAR)
    axes.set_xticks(ticks, [*(f"{tick:,}" for tick in ticks[:-1]), "beyond"], fontsize=8)
    axes.xaxis.minorticks_off()
    calibrated, other = texts(rows)
    axes.set_xlabel(f"perplexity: filled on {calibrated}, open on {other}; lines: the dense model")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def sizes(rows: list[Result], path: Path) -> None:
    """Perplexity against the share removed, a line a method, a panel a text."""
    dense = next(row for row in rows if row.method == "dense")
    names = list(dict.fromkeys(row.method for row in rows if row is not dense))
    others = dict(zip([name for name in names if name not in NAMED], COLORS, strict=False))
    shares = sorted({row.fields["ratio"] for row in rows if row is not dense})
    figure, panels = pyplot.subplots(1, 2, figsize=(8.5, 4), sharey=True, layout="constrained")
    for number, (axes, text) in enumerate(zip(panels, texts(rows), strict=True)):
        for name in names:
            color = NAMED.get(name) or others[name]
            own = sorted(
                (row.fields["ratio"], min(values(row)[number], FAR))
                for row in rows
                if row.method == name
            )
            axes.plot(*zip(*own, strict=True), "o-", color=color, label=name, markersize=4.5)
        axes.axhline(values(dense)[number], color="#2e2e2e", linewidth=0.9, linestyle=":")
        ticks = (30, 50, 100, 200, 500, 1000, 3000, FAR)
        by_logarithm(axes, ticks, [*(f"{tick:,}" for tick in ticks[:-1]), "beyond"], text)
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
        axes.set_xlabel("share of all parameters removed")
    panels[0].set_ylabel("perplexity (dotted: dense)")
    finish(figure, panels, path, 6)


PICTURES = {"training-free": methods, "paper-table-3": sizes, "paper-table-3-trained": sizes}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    for name, draw in PICTURES.items():
        path = arguments.results / f"{name}.json"
        if path.is_file():
            rows = [row for row in Results.read(path).rows if not row.error]
            draw(rows, arguments.output / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
