"""Writes docs/reference.md from the code (every command's --help, the methods, the families, the
texts), docs/methods.md from the methods, and the tables of docs/experiments.md, docs/paper.md,
docs/recovery.md, docs/quantization.md and docs/serving.md from results/*.json. `--check` only
compares.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from methods_page import methods_page
from tables_page import names, table

from grasp.cli import cli
from grasp.core.families import FAMILIES
from grasp.core.fields import declared
from grasp.core.results import Result, Results
from grasp.data.files import FILE_TYPES
from grasp.data.text import NAMED
from grasp.methods import available
from grasp.recipes.calibration import CalibrationRecipe
from grasp.recipes.memory import MemoryRecipe
from grasp.recipes.model import ModelSource

OUTPUT, EXPERIMENTS, PAPER, RECOVERY, QUANTIZATION, SERVING, METHODS = (
    Path(__file__).with_name(f"{name}.md")
    for name in (
        "reference",
        "experiments",
        "paper",
        "recovery",
        "quantization",
        "serving",
        "methods",
    )
)
RESULTS = Path(__file__).parents[1] / "results"
TIMED = {"iterative"}
"""Experiments that are about time; the others ran beside other work."""
SHARED = (ModelSource, CalibrationRecipe, MemoryRecipe)
"""Parts whose flags several commands have."""
PLACE = re.compile(r"<!-- results: ([\w-]+) -->.*?<!-- end -->", re.DOTALL)


def reference() -> str:
    parts = [
        (
            "<!-- Written by docs/generate.py from the code; do not edit. `make docs` writes it"
            " anew. -->"
        ),
        "",
        "# Reference",
        "",
        "## Commands",
    ]
    root = click.Context(cli, info_name="grasp", terminal_width=100)
    parts += ["", "```", cli.get_help(root), "```"]
    for name in cli.list_commands(root):
        command = cli.commands[name]
        context = click.Context(command, info_name=name, parent=root, terminal_width=100)
        parts += ["", f"### grasp {name}", "", "```", own_help(command.get_help(context)), "```"]
    parts += ["", "## Shared flags", ""]
    parts += [
        "The same in every command that has them; in Python, arguments of the same names.",
        "",
    ]
    for part in SHARED:
        parts += [f"### {part.title}", "", *flag_table(part), ""]
    parts += ["## Methods", "", "Flags of `grasp compress --method NAME`.", ""]
    for name, method in available().items():
        parts += [
            f"### {name}",
            "",
            inspect.cleandoc(method.__doc__ or ""),
            "",
            f"Paper: <{method.paper}>",
            "",
            *flag_table(method),
            "",
        ]
    parts += [
        "## Families",
        "",
        (
            "| family | model type | layers | attention | mlp | norms |"
            " embeddings, final norm, head | KV groups | notes |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in FAMILIES:
        assert row.ends is not None
        ends = (row.ends.embedding, row.ends.positions, row.ends.norm, row.ends.head)
        inside = [[path for _, path in part] for part in (row.attention, row.mlp)]
        names = [
            " ".join(f"`{path.rsplit('.', 1)[-1]}`" for path in paths if path)
            for paths in (*inside, row.norms.all, ends)
        ]
        parts.append(
            f"| {row.name} | {', '.join(row.model_types)} | `{row.layers}` | {' | '.join(names)} |"
            f" {'yes' if row.heads_by_width else 'no'} | {row.notes} |"
        )
    parts += [
        "",
        "Norms: those before the matrices first, then those behind them, then those of queries and"
        " keys. KV groups: whether whole ones can be taken out of a layer with plain smaller"
        " matrices, because the attention code takes the number of heads from their width. MLP"
        " channels can in every family.",
    ]
    parts += ["", "## Texts (`--data`, `--ppl`)", "", "| DATA | what | from |", "|---|---|---|"]
    for name, known in NAMED.items():
        parts.append(
            f"| `{name}` | {known.about} |"
            f" {'hub: ' + '/'.join(known.hub) if known.hub else 'no network needed'} |"
        )
    parts += [f"| a path | {', '.join(FILE_TYPES)} | no network needed |", ""]
    return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines()) + "\n"


def flag_table(of: type) -> list[str]:
    """A line for every flag that a dataclass declares."""
    lines = ["| flag | default | |", "|---|---|---|"]
    for one in declared(of).values():
        if one.flag.startswith("--") and not one.python:
            lines.append(f"| `{one.flag}` | {one.default} | {one.help} |")
    return lines


def own_help(text: str) -> str:
    """A command's help in which the flags that have a table of their own are only named."""
    lines: list[str] = []
    names: list[str] | None = None
    for line in [*text.splitlines(), "End:"]:
        if re.match(r"\S.*:$", line):
            if names is not None:
                lines += [f"  {', '.join(names)}", ""]
            elsewhere = line[:-1] in {part.title for part in SHARED} or "--method" in line
            names = [] if elsewhere else None
            shown = line if names is None else f"{line[:-1]} (see below):"
            lines.append(shown)
        elif names is None:
            lines.append(line)
        elif found := re.match(r"  (--[\w-]+)", line):
            names.append(found[1])
    return "\n".join(lines[:-1]).rstrip()


def experiments() -> str:
    """docs/experiments.md with the table of every results file that it has a place for."""
    return PLACE.sub(lambda found: _place(found[1]), EXPERIMENTS.read_text(encoding="utf-8"))


def _place(name: str) -> str:
    if not (RESULTS / f"{name}.json").is_file():
        return f"<!-- results: {name} -->\nNot measured yet.\n<!-- end -->"
    rows = [row for row in Results.read(RESULTS / f"{name}.json").rows]
    texts = names(rows, ("perplexity",))
    heads = [
        "",
        "parameters",
        *(f"perplexity, {Path(text).name}" for text in texts),
        *(["compression, s"] if name in TIMED else []),
        "peak memory, GB",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    lines += ["| " + " | ".join(_cells(row, texts, name in TIMED)) + " |" for row in rows]
    return "\n".join([f"<!-- results: {name} -->", *lines, "<!-- end -->"])


def _cells(row: Result, texts: list[str], timed: bool) -> list[str]:
    if row.error:
        return [row.label, f"failed: {row.error}", *[""] * (len(texts) + timed)]
    found = [row.score("perplexity", text) for text in texts]
    shown = [
        "" if score is None else f"{score.value:.1f}" if score.value < 1e4 else f"{score.value:.1e}"
        for score in found
    ]
    seconds = [f"{math.fsum(row.seconds.values()):.0f}" if row.seconds else ""] if timed else []
    return [
        row.label,
        f"{row.parameters:,}",
        *shown,
        *seconds,
        f"{row.peak_memory / 1e9:.1f}" if row.peak_memory else "",
    ]


def paper() -> str:
    """docs/paper.md with the table of every results file that it has a place for."""
    return PLACE.sub(lambda found: _paper_table(found[1]), PAPER.read_text(encoding="utf-8"))


def _paper_table(name: str) -> str:
    path = RESULTS / f"{name}.json"
    lines = table(path) if path.is_file() else ["Not measured yet."]
    return "\n".join([f"<!-- results: {name} -->", *lines, "<!-- end -->"])


def recovery() -> str:
    """docs/recovery.md with the table of results/recovery.json."""
    return PLACE.sub(lambda _: _trainings(), RECOVERY.read_text(encoding="utf-8"))


def _trainings() -> str:
    """One line a model: what was trained, the held-out cross-entropy before and after,
    perplexities, tasks, and the seconds of the training.
    """
    path = RESULTS / "recovery.json"
    if not path.is_file():
        return "<!-- results: recovery -->\nNot measured yet.\n<!-- end -->"
    rows = Results.read(path).rows
    texts = names(rows, ("perplexity",))
    dense = [rows[0].score("perplexity", text) for text in texts]
    heads = [
        "",
        "parameters",
        "trained",
        "objective",
        "held-out cross-entropy",
        *(f"perplexity, {text} (× dense)" for text in texts),
        "tasks, mean",
        "training, s",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---|--:|---|---|" + "--:|" * (len(heads) - 4)]
    for row in rows:
        told = row.fields.get("recovery", {})
        trained = f"{told['train']}, {told['trained_parameters'] / 1e6:.1f} M" if told else ""
        losses = " → ".join(f"{value:.3f}" for value in told.get("held_out_lm_loss", ()))
        scores = [row.score("perplexity", text) for text in texts]
        shown = [
            "" if s is None or d is None else f"{s.value:.1f} ({s.value / d.value:.2f})"
            for s, d in zip(scores, dense, strict=True)
        ]
        mean = next((score for score in row.scores if score.name == "mean"), None)
        seconds = f"{row.seconds['recovery']:.0f}" if "recovery" in row.seconds else ""
        cells = [
            row.label,
            f"{row.parameters:,}",
            trained,
            told.get("objective", ""),
            losses,
            *shown,
            "" if mean is None else f"{mean.value:.3f}",
            seconds,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(["<!-- results: recovery -->", *lines, "<!-- end -->"])


def quantization() -> str:
    """docs/quantization.md with the tables of results/dial.json and results/rank_or_bits.json."""
    tables = {"dial": _dial, "rank_or_bits": _bits}
    return PLACE.sub(lambda found: tables[found[1]](), QUANTIZATION.read_text(encoding="utf-8"))


def _results(name: str, head: list[str], lines: Callable[[Any], Iterable[str]]) -> str:
    """The place of results/NAME.json: `lines` of its rows below the `head` of a table."""
    path, shown = RESULTS / f"{name}.json", ["Not measured yet."]
    if path.is_file():
        shown = [*head, *lines(json.loads(path.read_text(encoding="utf-8"))["rows"])]
    return "\n".join([f"<!-- results: {name} -->", *shown, "<!-- end -->"])


def _dial() -> str:
    """One line a model, the most bytes first."""

    def lines(rows: Any) -> Iterator[str]:
        dense = rows["dense"]["wikitext2"]
        by = sorted(rows.items(), key=lambda one: (one[1]["section"], -one[1]["megabytes"]))
        for name, row in by:
            expected = f"{row['expected_rise']:.3f}" if row["expected_rise"] else ""
            yield (
                f"| {name} | {row['megabytes']:.1f} | {row['wikitext2']:.2f} | {row['ptb']:.2f} |"
                f" {expected} | {math.log(row['wikitext2'] / dense):.3f} |"
            )

    head = [
        "| | MB | WikiText-2 test | PTB valid | expected rise, nats | rise |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    return _results("dial", head, lines)


def _bits() -> str:
    """One line a model: equal bytes together, the best first."""

    def lines(rows: Any) -> Iterator[str]:
        for row in sorted(rows.values(), key=lambda row: (-row["target"], row["wikitext2"])):
            scores = [
                f"{score:.1f}" if score < 1000 else f"{score:,.0f}"
                for score in (row["wikitext2"], row["ptb"])
            ]
            yield (
                f"| {row['bytes'] / 1e6:.1f} | {row['method']} | {row['bits']} |"
                f" {row['ratio']:.2f} | {scores[0]} | {scores[1]} |"
            )

    head = [
        "| MB | method | bits | ratio | WikiText-2 test | PTB valid |",
        "|--:|---|---|--:|--:|--:|",
    ]
    return _results("rank_or_bits", head, lines)


def serving() -> str:
    """docs/serving.md with the table of results/serving.json."""
    return PLACE.sub(lambda _: _throughput(), SERVING.read_text(encoding="utf-8"))


def _throughput() -> str:
    def lines(rows: Any) -> Iterator[str]:
        for row in rows:
            yield (
                f"| {row['of']}, {row['model']} | {row['file_bytes'] / 1e6:.1f} | {row['dtype']},"
                f" {row['mode']} | {row['batch_size']} | {row['tokens_per_second']:.1f} |"
                f" {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) |"
            )

    head = [
        "| | MB on disk | run in | batch | tokens/s | × dense, three rounds |",
        "|---|--:|---|--:|--:|---|",
    ]
    return _results("serving", head, lines)


def main() -> int:
    pages = {
        OUTPUT: reference(),
        EXPERIMENTS: experiments(),
        PAPER: paper(),
        RECOVERY: recovery(),
        QUANTIZATION: quantization(),
        SERVING: serving(),
        METHODS: methods_page(),
    }
    if "--check" in sys.argv:
        stale = [
            path.name
            for path, text in pages.items()
            if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        print(f"stale: {', '.join(stale)}; run `make docs`" if stale else "docs are up to date")
        return 1 if stale else 0
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
