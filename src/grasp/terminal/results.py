"""How results look in a terminal, and where they go after that: a file, stdout."""

from __future__ import annotations

from pathlib import Path

from grasp.core.destination import check_file
from grasp.core.results import Result, Results, is_results
from grasp.core.score import Score
from grasp.errors import RecipeError
from grasp.terminal.bars import emit, megabytes, plain, say, table

MEASURES = (
    "perplexity",
    "perplexity ratio",
    "nats/token",
    "top-1 agreement",
    "repetition",
    "tokens",
    "same beginning",
)
"""Units that have a table of their own; all others are metrics of tasks, or speeds."""
TIMED = ("prefill", "decode", "time to first token", "token latency", "roofline share")
"""What the table of speeds shows of a model at each batch size."""
SPEEDS = ("tokens/s", "s", "ratio", "bytes", "share")


def check_output(path: Path | None, new_folder: bool = False) -> None:
    """Raise `RecipeError` if results cannot be written to a file: asked before any work is done."""
    if path is None:
        return
    if path.suffix != ".json":
        raise RecipeError(
            f"--output {path}: results are written as .json; give a name that ends in it"
        )
    check_file(path, "--output", new_folder)
    if path.exists() and not is_results(path):
        raise RecipeError(
            f"--output {path}: is there and no results file of grasp; choose another name"
        )


def finish(results: Results, output: Path | None, as_json: bool) -> None:
    """Write the file that was asked for, and the JSON line."""
    if output is not None:
        results.write(output)
        say(f"results: {plain(output)}")
    if as_json:
        emit(results.to_json())


def show_results(results: Results) -> None:
    """All rows: sizes, then what was measured, then notes."""
    rows = results.rows
    sizes = [
        (
            row.label,
            f"{row.parameters:,}" if row.parameters else "",
            megabytes(row.num_bytes) if row.num_bytes else "",
            _percent(row.ratio),
        )
        for row in rows
    ]
    table("", ("model", "parameters", "in memory", "removed"), sizes)
    _perplexities(rows)
    _fidelities(rows)
    _tasks(rows)
    _speeds(rows)
    _texts(rows)
    for row in rows:
        if row.error:
            say(f"[red]{plain(row.label)} failed:[/red] {plain(row.error)}")
        for note in row.notes:
            say(f"[yellow]note[/yellow] {plain(row.label)}: {plain(note)}")


def short(name: str) -> str:
    """A text as a table names it: the set of NAME=PATH, or the last part of a path."""
    return name.partition("=")[0] if "=" in name else Path(name).name


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _perplexities(rows: tuple[Result, ...]) -> None:
    lines = [
        (row.label, score) for row in rows for score in row.scores if score.unit == "perplexity"
    ]
    if not lines:
        return
    cells = [
        (
            label,
            short(s.name),
            f"{s.value:.3f}",
            f"{s.protocol.get('word_perplexity') or float('nan'):.2f}",
            f"{s.protocol.get('bits_per_byte') or float('nan'):.4f}",
        )
        for label, s in lines
    ]
    say("")
    table("", ("model", "text", "perplexity", "a word", "bits/byte"), cells, left=2)
    for text in dict.fromkeys(score.name for _, score in lines):
        found = next(score for _, score in lines if score.name == text)
        say(f"[dim]{plain(text)}: {plain(protocol_line(found))}[/dim]")


def protocol_line(score: Score) -> str:
    """The protocol of a perplexity, in words."""
    p = score.protocol
    return (
        f"blocks of {p.get('seq_len')}, stride {p.get('stride')}, BOS {p.get('bos')}, text"
        f" {p.get('join')}; {p.get('num_blocks') or 0:,} blocks, {p.get('num_tokens') or 0:,}"
        f" tokens counted, {p.get('dtype')}"
    )


def _fidelities(rows: tuple[Result, ...]) -> None:
    lines = []
    for row in rows:
        for divergence in (score for score in row.scores if score.unit == "nats/token"):
            others = [
                row.score(unit, divergence.name) for unit in ("top-1 agreement", "perplexity ratio")
            ]
            lines.append(
                (
                    row.label,
                    short(divergence.name),
                    *(_with_interval(score) for score in (divergence, *others)),
                )
            )
    if lines:
        say("")
        table(
            "against the dense model; in brackets 95 % by bootstrap over blocks",
            ("model", "text", "KL (nats/token)", "top-1 agreement", "perplexity ratio"),
            lines,
            left=2,
        )


def _with_interval(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.3f}" + (
        "" if score.interval is None else f" [{score.interval[0]:.3f}, {score.interval[1]:.3f}]"
    )


def _tasks(rows: tuple[Result, ...]) -> None:
    lines = []
    for row in rows:
        for score in row.scores:
            if score.unit in MEASURES or score.unit in SPEEDS:
                continue
            error = "" if score.stderr is None else f"± {score.stderr:.4f}"
            shots = score.protocol.get("num_fewshot", "")
            count = score.protocol.get("num_examples", "")
            lines.append(
                (row.label, score.name, score.unit, f"{score.value:.4f}", error, shots, count)
            )
    if lines:
        harness = next(
            (s.protocol["harness"] for row in rows for s in row.scores if "harness" in s.protocol),
            "",
        )
        say("")
        table(
            f"tasks, {harness}",
            ("model", "task", "metric", "score", "standard error", "shots", "examples"),
            lines,
            left=3,
        )


def _speeds(rows: tuple[Result, ...]) -> None:
    """A table a batch size: one line a measure, one column a model; then what it was measured
    under, and memory.
    """
    timed = [row for row in rows if _is_timed(row)]
    for batch in sorted(
        {s.protocol["batch_size"] for row in timed for s in row.scores if s.name == "decode"}
    ):
        here = {
            row.label: {s.name: s for s in row.scores if s.protocol.get("batch_size") == batch}
            for row in timed
        }
        here = {label: one for label, one in here.items() if set(TIMED) <= one.keys()}
        if here:
            _speeds_at(batch, here)
    if timed:
        _setting(timed)


def _speeds_at(batch: int, here: dict[str, dict[str, Score]]) -> None:
    """The table of one batch size; `here`: label of a model -> its scores by name."""
    found = list(here.values())
    ratios = {
        name.partition(" ")[0]: _spread(score, 2)
        for name, score in found[-1].items()
        if score.unit == "ratio"
    }
    lines = [
        (
            "prefill, tokens/s",
            *(_spread(one["prefill"], 0) for one in found),
            ratios.get("prefill", ""),
        ),
        (
            "decode, tokens/s",
            *(_spread(one["decode"], 1) for one in found),
            ratios.get("decode", ""),
        ),
        (
            "first token, ms",
            *(f"{1e3 * one['time to first token'].value:,.0f}" for one in found),
            "",
        ),
        ("a token, ms: median, p95", *(_latency(one["token latency"]) for one in found), ""),
        (
            "share of memory bandwidth",
            *(f"{one['roofline share'].value:.0%}" for one in found),
            "",
        ),
    ]
    say("")
    table(
        f"batch size {batch}: medians, in brackets lowest and highest",
        ("", *here, "ratio" if ratios else ""),
        lines,
    )


def _setting(timed: list[Result]) -> None:
    """What the speeds were measured under, and the memory of each model."""
    p = next(score.protocol for score in timed[-1].scores if score.name == "decode")
    say(
        f"[dim]{p['device']}, {p['dtype']}, {p['threads']} thread{'s' * (p['threads'] != 1)},"
        f" attention {p['attention']}, low-rank factors:"
        f" {p['low_rank']}{', torch.compile' if p['compile'] else ''}; {p['prompt_len']} tokens"
        f" read, {p['new_tokens']} written, {p['rounds']} round{'s' * (p['rounds'] != 1)} in"
        " turn[/dim]"
    )
    kinds = ("parameter bytes", "bytes on disk", "peak memory")
    say("")
    table(
        "",
        ("", *(row.label for row in timed)),
        [(kind, *(_bytes(row, kind) for row in timed)) for kind in kinds],
    )


def _is_timed(row: Result) -> bool:
    """Whether a row holds all that the table of speeds shows; one from a file may not."""
    found = {score.name: score.protocol for score in row.scores if score.name in TIMED}
    spreads = all(
        {"batch_size", "low", "high"}
        <= {key for key, value in found.get(name, {}).items() if value is not None}
        for name in ("prefill", "decode")
    )
    setting = (
        "device",
        "dtype",
        "threads",
        "attention",
        "low_rank",
        "compile",
        "prompt_len",
        "new_tokens",
        "rounds",
    )
    known = all(found.get("decode", {}).get(key) is not None for key in setting)
    return spreads and known and found.get("token latency", {}).get("p95") is not None


def _latency(score: Score) -> str:
    return f"{1e3 * score.value:,.1f}, {1e3 * score.protocol['p95']:,.1f}"


def _spread(score: Score, digits: int) -> str:
    return (
        f"{score.value:,.{digits}f} [{score.protocol['low']:,.{digits}f},"
        f" {score.protocol['high']:,.{digits}f}]"
    )


def _bytes(row: Result, kind: str) -> str:
    score = row.score("bytes", kind)
    return "" if score is None else megabytes(score.value)


def _texts(rows: tuple[Result, ...]) -> None:
    written = [row for row in rows if row.generations]
    if not written:
        return
    say("")
    table(
        "greedy continuations",
        ("model", "repetition (4-grams)", "mean length (tokens)", "same beginning as dense"),
        [
            (
                row.label,
                *(_plain_value(row, unit) for unit in ("repetition", "tokens", "same beginning")),
            )
            for row in written
        ],
    )
    for number, one in enumerate(written[0].generations):
        say(f"\n[bold]{plain(one.prompt.strip())}[/bold]")
        for row in written:
            said = " ".join(row.generations[number].text.split()) or repr(
                row.generations[number].text
            )
            say(
                f"  {plain(row.label)} [dim]({row.generations[number].repetition:.0%}"
                f" repeated)[/dim]: {plain(said)}"
            )


def _plain_value(row: Result, unit: str) -> str:
    score = row.score(unit, "generation")
    return "" if score is None else f"{score.value:.3g}"
