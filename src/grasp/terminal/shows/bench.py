"""`grasp bench`: speeds and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grasp.terminal.bars import progress_bars
from grasp.terminal.results import check_output, finish, show_results
from grasp.verbs import bench as benchmark


def show(
    model: str, output: Path | None, options: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Speeds of one model, or of two in turn."""
    check_output(output)
    with progress_bars(quiet) as bars:
        results = benchmark.bench(model, progress=bars, **options)
    show_results(results)
    finish(results, output, as_json)
