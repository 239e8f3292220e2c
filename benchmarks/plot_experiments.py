"""Pictures of results/{retain,samples,calibration,scores,iterative}.json, for docs/experiments.md.

python benchmarks/plot_experiments.py [results] [-o docs]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from grasp.core.results import Result, Results

COLORS = ("#c1440e", "#4a6fa5", "#7a9a01", "#2e2e2e")
NUMERIC = {"retain": ("retain_ratio", "retain ratio"), "samples": ("num_samples", "calibration blocks of 512 tokens")}


def texts_of(rows: list[Result]) -> list[str]:
    return list(dict.fromkeys(score.name for row in rows for score in row.scores if score.unit == "perplexity"))


def value(row: Result, text: str) -> float:
    score = row.score("perplexity", text)
    assert score is not None
    return score.value


def line(name: str, rows: list[Result], axes: Axes) -> None:
    """Perplexity against a number: one line a text, rows without the field as levels."""
    field, label = NUMERIC[name]
    for color, text in zip(COLORS, texts_of(rows), strict=False):
        points = [(row.fields[field], value(row, text)) for row in rows if field in row.fields and row.method == "grasp"]
        axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=Path(text).name, markersize=4.5)
        for row, style in ((row, ":" if row.method == "dense" else "--") for row in rows if row.method in ("dense", "shortgpt")):
            axes.axhline(value(row, text), color=color, linewidth=0.9, linestyle=style)
    axes.set_xlabel(f"{label} (dotted: dense" + (", dashed: the layers removed)" if name == "retain" else ")"))


def bars(name: str, rows: list[Result], axes: Axes) -> None:
    """Perplexity by row: one bar a text."""
    texts = texts_of(rows)
    for number, (color, text) in enumerate(zip(COLORS, texts, strict=False)):
        places = [place + (number - (len(texts) - 1) / 2) * 0.26 for place in range(len(rows))]
        axes.bar(places, [value(row, text) for row in rows], width=0.24, color=color, label=Path(text).name)
    axes.set_xticks(
        range(len(rows)), [row.label.replace("grasp ", "").replace("data ", "") for row in rows], rotation=20, ha="right", fontsize=8
    )


def draw(name: str, rows: list[Result], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7.5, 4.4), layout="constrained")
    kind: Callable[[str, list[Result], Axes], None] = line if name in NUMERIC else bars
    kind(name, rows, axes)
    axes.set_yscale("log")
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axes.set_ylabel("perplexity")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    for name in ("retain", "samples", "calibration", "scores", "iterative"):
        if not (arguments.results / f"{name}.json").is_file():
            continue
        found = Results.read(arguments.results / f"{name}.json")
        draw(name, [row for row in found.rows if not row.error], arguments.output / f"experiments-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
