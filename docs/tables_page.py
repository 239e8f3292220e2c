"""The tables of docs/paper.md, from the results of experiments/paper-table-*.toml and
training-free.toml.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from grasp.core.results import Result, Results
from grasp.core.score import Score

SIZES = {"paper-table-3", "paper-table-3-trained"}
"""Experiments that ask for several sizes: a line a method, a column a size."""
UNTIMED = {"paper-table-1", "paper-table-2"}
"""Run beside other work, and with pauses: their seconds say nothing."""


def table(path: Path) -> list[str]:
    """The lines of the table of one results file."""
    rows = Results.read(path).rows
    return by_size(rows) if path.stem in SIZES else by_method(rows, path.stem not in UNTIMED)


def by_method(rows: Sequence[Result], timed: bool = True) -> list[str]:
    """A line a row: size, perplexities, tasks, time where it was `timed`, and memory."""
    texts = names(rows, ("perplexity",))
    tasks = names(rows, tuple(unit for unit in units(rows) if unit != "perplexity"))
    heads = [
        "",
        "removed, %",
        *(Path(text).name for text in texts),
        *(f"{task}, {metric}" if (metric := metric_of(rows[0], task)) else task for task in tasks),
        *(["compression, s"] if timed else []),
        "peak memory, GB",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    for row in rows:
        if row.error:
            cells = [row.label, f"failed: {row.error}", *[""] * (len(heads) - 2)]
        else:
            cells = [
                row.label,
                f"{100 * (row.ratio or 0):.1f}",
                *(shown(row.score("perplexity", text)) for text in texts),
                *(shown(of_task(row, task)) for task in tasks),
                *(
                    [f"{math.fsum(row.seconds.values()):.0f}" if row.seconds else ""]
                    if timed
                    else []
                ),
                f"{row.peak_memory / 1e9:.1f}" if row.peak_memory else "",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def by_size(rows: Sequence[Result]) -> list[str]:
    """A line a method, a column a size, the perplexities on all texts in a cell."""
    texts = names(rows, ("perplexity",))
    sizes = sorted({row.fields["ratio"] for row in rows if "ratio" in row.fields})
    lines = [
        "| "
        + " / ".join(Path(text).name for text in texts)
        + " | dense | "
        + " | ".join(f"{100 * size:g} %" for size in sizes)
        + " |",
        "|---|" + "--:|" * (1 + len(sizes)),
    ]
    dense = next(row for row in rows if row.method == "dense")
    methods = dict.fromkeys(of_size(row) for row in rows if "ratio" in row.fields)
    for place, method in enumerate(methods):
        own = {row.fields["ratio"]: row for row in rows if of_size(row) == method}
        cells = [cell(own[size], texts) if size in own else "" for size in sizes]
        first = cell(dense, texts) if place == 0 else ""
        lines.append("| " + " | ".join([method, first, *cells]) + " |")
    return lines


def metric_of(row: Result, task: str) -> str | None:
    """The metric of a task that enters the mean over tasks."""
    mean = next((score for score in row.scores if score.name == "mean"), None)
    return None if mean is None else mean.protocol.get("metrics", {}).get(task)


def of_task(row: Result, task: str) -> Score | None:
    """The score of a task that enters the mean over tasks, or its first."""
    found = [score for score in row.scores if score.name == task]
    metric = metric_of(row, task)
    return next((score for score in found if score.unit == metric), found[0] if found else None)


def of_size(row: Result) -> str:
    """What a row is called without its size."""
    return row.label.replace(f" ratio {row.fields.get('ratio')}", "")


def cell(row: Result, texts: Sequence[str]) -> str:
    if row.error:
        return "failed"
    return " / ".join(shown(row.score("perplexity", text)) for text in texts)


def shown(score: Score | None) -> str:
    """A perplexity with a digit behind the point, a task in percent with its standard error."""
    if score is None:
        return ""
    if score.unit == "perplexity":
        value = score.value
        return f"{value:.1f}" if value < 1e3 else f"{value:,.0f}" if value < 1e5 else "> 100,000"
    return f"{100 * score.value:.1f}" + (f" ± {100 * score.stderr:.1f}" if score.stderr else "")


def units(rows: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(score.unit for row in rows for score in row.scores))


def names(rows: Sequence[Result], of: tuple[str, ...]) -> list[str]:
    """What was measured in these units, in order."""
    return list(
        dict.fromkeys(score.name for row in rows for score in row.scores if score.unit in of)
    )
