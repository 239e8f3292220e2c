"""`grasp export`: what was written, and for whom."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from grasp.terminal.bars import emit, megabytes, plain, progress_bars, say, table
from grasp.verbs import export as exporting


def show(checkpoint: str, out: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Run `grasp.export` and say what came of it."""
    with progress_bars(quiet) as bars:
        done = exporting.export(checkpoint, out, progress=bars, **options)
    for note in done.notes:
        say(f"note: {plain(note)}")
    rows = [
        (
            "format",
            f"{done.format}, {done.dtype}{f', matrices {done.weights}' if done.weights else ''}",
        ),
        (
            "low-rank matrices",
            f"{done.pairs}{', multiplied out' if done.pairs and done.format == 'dense' else ''}",
        ),
        (
            "parameters",
            (
                f"{done.parameters_before:,} → {done.parameters_after:,}"
                if done.parameters_before != done.parameters_after
                else f"{done.parameters_before:,}"
            ),
        ),
        ("bytes of the model", megabytes(done.bytes)),
        ("export", str(out)),
    ]
    table("", ("", ""), rows, left=2)
    if as_json:
        emit({**dataclasses.asdict(done), "path": str(done.path)})
