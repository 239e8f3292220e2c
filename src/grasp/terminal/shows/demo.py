"""`grasp demo`: the whole job on the embedded model, as it happens, and what came of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

from grasp.core.results import Results
from grasp.errors import Interrupted
from grasp.terminal.bars import emit, megabytes, plain, progress_bars, say, table
from grasp.verbs import demo


def show(output: Path, measure: Path | None, as_json: bool, quiet: bool) -> None:
    """Compress, measure in a child process (`measure`: this is that process), print the table."""
    if measure is not None:
        with progress_bars(quiet) as bars:
            emit({"rows": [row.to_json() for row in demo.measure(measure, bars)]})
        return
    try:
        _run(output, as_json, quiet)
    except KeyboardInterrupt as stop:
        done = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
        if not done:
            raise
        raise Interrupted(
            f"{output} holds what was finished ({', '.join(done)}); remove it to begin anew"
        ) from stop


def _run(output: Path, as_json: bool, quiet: bool) -> None:
    begin, dtype = time.perf_counter(), demo.fast_dtype()
    say(
        f"{demo.NUM_LAYERS} of its 30 layers replaced by {demo.RETAIN_RATIO:.0%} of their"
        f" parameters, and the default method at that size; calibrated in {dtype}, the faster one"
        " here"
    )
    with progress_bars(quiet) as bars:
        made = demo.make(output, dtype, bars)
    say("loading them again in a new process, to measure what a user of the checkpoints gets")
    results = demo.measure_in_new_process(output, quiet)
    results.write(output / "results.json")
    _table(results, made.layers)
    places = ", ".join(plain(output / name) for name in ("grasp", "grasp-fisher"))
    say(f"\ncheckpoints: {places}\npictures:    {', '.join(plain(path) for path in made.pictures)}")
    seconds = time.perf_counter() - begin
    say(f"a page of all this: grasp report {plain(output)}\ntook {seconds:.0f} s")
    if as_json:
        emit(
            {
                **results.to_json(),
                "layers": made.layers,
                "pictures": [str(path) for path in made.pictures],
                "seconds": seconds,
            }
        )


def _table(results: Results, layers: tuple[int, ...]) -> None:
    rows = []
    for row in results.rows:
        text, speed = row.score("perplexity"), row.score("tokens/s")
        assert text is not None and speed is not None
        rows.append(
            (
                row.label,
                f"{row.parameters:,}",
                megabytes(row.num_bytes or 0),
                f"{text.value:.1f}",
                f"{speed.value:.1f}",
            )
        )
    table(
        f"Held-out pydoc text, {demo.HELD_OUT['num_blocks']} × {demo.HELD_OUT['seq_len']} tokens;"
        f" greedy decoding, batch 1; float32; layers {','.join(map(str, layers))}",
        ("model", "parameters", "in memory", "perplexity", "tokens/s"),
        rows,
    )
    say("")
    for row in results.rows:
        one = row.generations[0]
        say(
            f"[bold]{row.label}[/bold]:"
            f" {one.prompt}[dim]{plain(json.dumps(one.text, ensure_ascii=False)[1:-1])}[/dim]"
        )
