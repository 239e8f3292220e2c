"""Pictures and Markdown tables of results/fisher.json, for docs/fisher.md.

    python benchmarks/plot_fisher.py [results/fisher.json] [-o docs]

Writes fisher-sizes.png (perplexity against size), fisher-prediction.png (predicted against real
loss rise) and fisher-tokens.png (perplexity against calibration tokens), and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LINES = {
    "grasp-fisher": ("grasp-fisher", "#c1440e", "o-"),
    "one": ("--rounds 1", "#d9825b", "o:"),
    "ranks": ("ranks alone (--parts ranks)", "#e3b49a", "o--"),
    "dense": ("no pairs (--shape dense)", "#3f7f5f", "D-"),
    "shortgpt": ("layers removed (shortgpt)", "#4a6fa5", "s-"),
    "grasp": ("the paper's method (grasp)", "#2e2e2e", "^-"),
    "plain": ("plain SVD, uniform", "#9aa5b1", "v-"),
}


def line_of(row: dict[str, Any]) -> str:
    """Which line of the size plot a row belongs to."""
    if row["method"] != "grasp-fisher":
        return str(row["method"])
    if row.get("basis") == "plain":
        return "plain"
    if row.get("shape") == "dense":
        return "dense"
    if "parts" in row:
        return str(row["parts"]) + (", pairs" if row.get("storage") == "pair" else "")
    return "grasp-fisher" if row.get("rounds") == 2 else "one"


def sizes(rows: list[dict[str, Any]], dense: dict[str, Any], path: Path) -> None:
    """Perplexity against parameters, one line a method."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, text, title in zip(
        panels, ("wikitext2", "ptb"), ("WikiText-2 test", "PTB valid (another domain)"), strict=True
    ):
        for key, (label, color, style) in LINES.items():
            points = sorted(
                (r["parameters"] / 1e6, r[text])
                for r in rows
                if line_of(r) == key and r[text] < 3e4
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=color,
                    label=label,
                    markersize=4.5,
                    linewidth=1.4,
                )
        axes.axhline(dense[text], color="black", linewidth=0.8, linestyle=":")
        axes.annotate(
            "dense",
            (0.995, dense[text]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
        axes.set_yscale("log")
        axes.set_xlabel("parameters, millions")
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("perplexity")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)


def prediction(
    rows: list[dict[str, Any]], single: list[dict[str, Any]], dense: dict[str, Any], path: Path
) -> None:
    """Predicted against real rise of the loss: whole models at several ratios, and groups dropped
    from one matrix at a time.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for (name, label), color in zip(
        (("seen_rise", "as seen on the calibration text"), ("expected_rise", "forecast")),
        ("#9aa5b1", "#c1440e"),
        strict=True,
    ):
        points = [(r[name], math.log(r["wikitext2"] / dense["wikitext2"])) for r in rows]
        left.scatter(*zip(*points, strict=True), color=color, label=label, s=20)
    left.set_title("whole models, 16 to 128 blocks, WikiText-2 test", fontsize=10)
    for number, matrix in enumerate(dict.fromkeys(r["path"] for r in single)):
        points = [
            (_expected(r), math.log(r["wikitext2"] / dense["wikitext2"]))
            for r in single
            if r["path"] == matrix
        ]
        points = [(x, y) for x, y in points if y > 0]
        short = matrix.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "")
        right.plot(
            *zip(*points, strict=True),
            "o-",
            color=pyplot.cm.viridis(number / 8),
            label=f"layer {short}",
            markersize=4.5,
            linewidth=1,
        )
    right.set_title("groups of one matrix dropped, WikiText-2 test", fontsize=10)
    for axes, chosen, share in ((left, rows, 0.15), (right, single, 0.3)):
        low = min(map(_expected, chosen)) / 1.5
        high = max(map(_expected, chosen)) * 1.5
        axes.plot([low, high], [low, high], color="black", linewidth=0.9)
        axes.fill_between(
            [low, high],
            [(1 - share) * low, (1 - share) * high],
            [(1 + share) * low, (1 + share) * high],
            color="#9aa5b1",
            alpha=0.3,
            label=f"within {share:.0%}",
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("expected loss rise, nats a token")
        axes.legend(frameon=False, fontsize=8)
    left.set_ylabel("real loss rise, nats a token")
    figure.savefig(path, dpi=140)


def _expected(row: dict[str, Any]) -> float:
    """The rise that was expected; of rows from before there was a forecast, on the calibration
    text.
    """
    return float(row.get("expected_rise", row.get("predicted_rise")))


def tokens(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against calibration blocks at one size."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    by_seed: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append((row["blocks"] * 512, row["wikitext2"]))
    for seed, points in sorted(by_seed.items()):
        axes.plot(
            *zip(*sorted(points), strict=True),
            "o-",
            label=f"draw of blocks: seed {seed}",
            markersize=4.5,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("calibration tokens")
    axes.set_ylabel("perplexity, WikiText-2 test, at 105.8 M")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)


def table(heads: tuple[str, ...], lines: list[tuple[Any, ...]]) -> None:
    """A Markdown table on stdout."""
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for line in lines:
        print("| " + " | ".join(str(cell) for cell in line) + " |")
    print()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("results/fisher.json"))
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    named = json.loads(arguments.results.read_text())["rows"]
    dense, rows = named["dense"], [row for name, row in named.items() if name != "dense"]
    swept = [row for row in rows if row["section"] == "sizes"]
    ours = [row for row in swept if line_of(row) == "grasp-fisher"]
    sizes(swept, dense, arguments.output / "fisher-sizes.png")
    forecast = [row for row in rows if "expected_rise" in row and row["section"] != "matrices"]
    prediction(
        forecast,
        [row for row in rows if row["section"] == "matrices"],
        dense,
        arguments.output / "fisher-prediction.png",
    )
    ladder = sorted({row["ratio"] for row in swept})
    cells = {(line_of(row), row["ratio"]): row for row in swept}
    there = [key for key in LINES if any(line == key for line, _ in cells)]
    table(
        ("ratio", *(LINES[key][0] for key in there)),
        [(f"{ratio:.4g}", *(_pair(cells.get((key, ratio))) for key in there)) for ratio in ladder],
    )
    table(
        (
            "may be smaller",
            "rounds",
            "blocks",
            "ratio",
            "seen",
            "forecast",
            "real",
            "real / forecast",
        ),
        [
            (
                "no pairs" if row.get("shape") else row.get("parts", "ranks,channels"),
                row.get("rounds", 1),
                row["blocks"],
                f"{row['ratio']:.4g}",
                f"{row['seen_rise']:.3f}",
                f"{row['expected_rise']:.3f}",
                f"{math.log(row['wikitext2'] / dense['wikitext2']):.3f}",
                f"{math.log(row['wikitext2'] / dense['wikitext2']) / row['expected_rise']:.2f}",
            )
            for row in sorted(
                forecast,
                key=lambda row: (
                    str(row.get("parts", row.get("shape"))),
                    row.get("rounds", 1),
                    row["blocks"],
                    row["ratio"],
                ),
            )
        ],
    )
    table(
        ("score", "basis", "uniform", "per-layer", "global"),
        [
            (
                score,
                basis,
                *(
                    _pair(_find(rows, "switches", score=score, basis=basis, allocation=a))
                    for a in ("uniform", "per-layer", "global")
                ),
            )
            for score in ("taylor", "magnitude")
            for basis in ("plain", "input", "fisher")
        ],
    )
    anchor = min((row["ratio"] for row in ours), key=lambda ratio: abs(ratio - 0.21347))
    drawn = [row for row in rows if row["section"] == "tokens" and row.get("rounds") == 2]
    drawn.append(cells["grasp-fisher", anchor])
    if len(drawn) > 1:
        tokens(drawn, arguments.output / "fisher-tokens.png")
    table(
        ("blocks of 512", "seed", "WikiText-2 / PTB"),
        [
            (row["blocks"], row["seed"], _pair(row))
            for row in sorted(drawn, key=lambda row: (row["blocks"], row["seed"]))
        ],
    )
    single = [row for row in rows if row["section"] == "matrices"]
    table(
        ("matrix", "rank kept", "predicted rise", "real rise"),
        [
            (
                r["path"],
                r["rank"],
                f"{_expected(r):.4f}",
                f"{math.log(r['wikitext2'] / dense['wikitext2']):.4f}",
            )
            for r in single
        ],
    )
    other = [(row["source"], _pair(row)) for row in rows if row["section"] == "domains"]
    table(("calibrated on", "WikiText-2 / PTB"), other)
    parts = [(row["parts"], _pair(row)) for row in rows if row["section"] == "parts"]
    table(("may be smaller", "WikiText-2 / PTB"), parts)
    return 0


def _pair(row: dict[str, Any] | None) -> str:
    """Perplexity on WikiText-2 test, and on PTB valid where it was measured."""
    if row is None:
        return ""
    return " / ".join(
        f"{row[text]:.1f}" if row[text] < 1e4 else "> 10,000"
        for text in ("wikitext2", "ptb")
        if text in row
    )


def _find(rows: list[dict[str, Any]], section: str, **fields: Any) -> dict[str, Any] | None:
    return next(
        (
            row
            for row in rows
            if row["section"] == section and all(row.get(k, "") == v for k, v in fields.items())
        ),
        None,
    )


if __name__ == "__main__":
    sys.exit(main())
