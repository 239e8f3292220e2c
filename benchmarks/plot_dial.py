"""Picture of results/dial.json and results/rank_or_bits.json, for docs/quantization.md.

python benchmarks/plot_dial.py [results] [-o docs/dial.png]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from panels import by_logarithm, finish

TEXTS = {"wikitext2": "WikiText-2 test", "ptb": "PTB valid"}
LINES = {
    "dial": ("#c1440e", "the dial: ranks, channels and bits"),
    "bits": ("#4a6fa5", "bits alone, chosen by the same prices"),
    "widths": ("#7a9a01", "one width for all, groups of 64"),
}
"""Section of results/dial.json -> colour and name."""
GREY = "#8a8a8a"
TICKS = (30, 40, 50, 60, 80, 100, 150, 200, 300)
MOST = 400.0
"""A perplexity beyond this is left out."""


def mixtures(rows: dict[str, Any]) -> list[dict[str, float]]:
    """Low rank in plain pairs or pivoted, then rounded: the best of each size."""
    found: dict[float, dict[str, float]] = {}
    for row in rows.values():
        point = {"megabytes": row["bytes"] / 1e6, **{text: row[text] for text in TEXTS}}
        if row["ratio"] and row["bits"].startswith("int") and row["wikitext2"] < MOST:
            best = found.setdefault(row["target"], point)
            found[row["target"]] = min(best, point, key=lambda one: one["wikitext2"])
    return sorted(found.values(), key=lambda one: one["megabytes"])


def draw(dial: dict[str, Any], others: dict[str, Any], path: Path) -> None:
    """A panel a text; megabytes against perplexity."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    dense = dial["dense"]
    lines = [
        (color, name, [row for row in dial.values() if row["section"] == section and is_own(row)])
        for section, (color, name) in LINES.items()
    ]
    lines.append((GREY, "low rank, then 8 or 4 bits for all", mixtures(others)))
    for axes, (text, title) in zip(panels, TEXTS.items(), strict=True):
        for color, name, rows in lines:
            points = sorted((row["megabytes"], row[text]) for row in rows if row[text] < MOST)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=name, markersize=4.5)
        axes.axhline(dense[text], color="#2e2e2e", linewidth=0.9, linestyle=":")
        by_logarithm(axes, TICKS, [str(tick) for tick in TICKS], title)
        axes.set_xlabel(f"megabytes (as it was: {dense['megabytes']:.0f})")
    panels[0].set_ylabel("perplexity (dotted: as it was)")
    finish(figure, panels, path, 2)


def is_own(row: dict[str, Any]) -> bool:
    """Whether the row has no groups of 32, in which smollm2 was stored before."""
    return bool(row["kinds"]) and not any(kind.endswith("/32") for kind in row["kinds"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/dial.png"))
    arguments = parser.parse_args()
    dial, others = (
        json.loads((arguments.results / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        for name in ("dial", "rank_or_bits")
    )
    draw(dial, others, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
