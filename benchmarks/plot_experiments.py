"""Pictures of results/{retain,samples,calibration,iterative,scores}.json, for docs/experiments.md.

python benchmarks/plot_experiments.py [results] [-o docs]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from grasp.core.results import Result, Results

COLORS = ("#c1440e", "#4a6fa5", "#7a9a01", "#2e2e2e")
NUMERIC = {
    "retain": ("retain_ratio", "retain ratio: share of the parameters of a replaced matrix"),
    "samples": ("num_samples", "calibration blocks of 512 tokens"),
}
NAMED = {
    "calibration": ("data", "calibrated on"),
    "iterative": ("iterative", ""),
    "scores": ("score", "groups ranked by"),
}
WORDS = {"True": "iterative", "False": "one-shot", "self": "text of the model itself"}
TICKS = (30, 50, 100, 200, 300, 500)
LEVELS = {"dense": ":", "shortgpt": "--"}
"""Rows that are levels in every picture: the dense model, and the one without the layers (only
retain.json has it).
"""


def texts_of(rows: list[Result]) -> list[str]:
    return list(
        dict.fromkeys(
            score.name for row in rows for score in row.scores if score.unit == "perplexity"
        )
    )


def value(row: Result, text: str) -> float:
    score = row.score("perplexity", text)
    assert score is not None
    return score.value


def line(name: str, rows: list[Result], levels: list[Result], axes: Axes) -> None:
    """Perplexity against a number: one line a text."""
    field, label = NUMERIC[name]
    for color, text in zip(COLORS, texts_of(rows), strict=False):
        points = sorted((row.fields[field], value(row, text)) for row in rows)
        axes.plot(
            *zip(*points, strict=True),
            "o-",
            color=color,
            label=f"on {Path(text).name}",
            markersize=4.5,
        )
        for level in levels:
            axes.axhline(
                value(level, text), color=color, linewidth=0.9, linestyle=LEVELS[level.method]
            )
    if name == "samples":
        axes.set_xscale("log", base=2)
    axes.set_xticks([row.fields[field] for row in rows], [f"{row.fields[field]:g}" for row in rows])
    axes.set_yscale("log")
    axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
    axes.yaxis.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("perplexity")


def bars(name: str, rows: list[Result], levels: list[Result], axes: Axes) -> None:
    """Perplexity by row, from 0: one bar a text, the best row first by the first text."""
    field, label = NAMED[name]
    texts = texts_of(rows)
    rows = sorted(rows, key=lambda row: value(row, texts[0]))
    for number, (color, text) in enumerate(zip(COLORS, texts, strict=False)):
        places = [place + (number - (len(texts) - 1) / 2) * 0.36 for place in range(len(rows))]
        drawn = axes.barh(
            places,
            [value(row, text) for row in rows],
            height=0.34,
            color=color,
            label=f"on {Path(text).name}",
        )
        axes.bar_label(
            drawn,
            fmt="%.0f",
            padding=3,
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
        for level in levels:
            axes.axvline(
                value(level, text),
                color=color,
                linewidth=0.9,
                linestyle=LEVELS[level.method],
                zorder=0,
            )
    said = [Path(str(row.fields[field])).name for row in rows]
    axes.set_yticks(range(len(rows)), [WORDS.get(word, word) for word in said])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(value(row, text) for row in rows for text in texts))
    axes.set_xlabel("perplexity")
    axes.set_ylabel(label)


def draw(name: str, rows: list[Result], levels: list[Result], path: Path) -> None:
    tall = name in NUMERIC or name == "scores"
    figure, axes = pyplot.subplots(figsize=(7.5, 4.4 if tall else 2.9), layout="constrained")
    (line if name in NUMERIC else bars)(name, rows, levels, axes)
    axes.spines[["top", "right"]].set_visible(False)
    for level in levels:
        axes.plot(
            [],
            [],
            color="#2e2e2e",
            linewidth=0.9,
            linestyle=LEVELS[level.method],
            label={"dense": "dense", "shortgpt": "the layers removed"}[level.method],
        )
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    found = {
        name: path
        for name in (*NUMERIC, *NAMED)
        if (path := arguments.results / f"{name}.json").is_file()
    }
    rows = {
        name: [row for row in Results.read(path).rows if not row.error]
        for name, path in found.items()
    }
    levels = {row.method: row for part in rows.values() for row in part if row.method in LEVELS}
    for name, part in rows.items():
        draw(
            name,
            [row for row in part if row.method not in LEVELS],
            list(levels.values()),
            arguments.output / f"experiments-{name}.png",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
