"""`grasp eval`: every number with its protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grasp.core.processes import is_first
from grasp.terminal.bars import progress_bars
from grasp.terminal.results import check_output, finish, show_results
from grasp.verbs import evaluate as measurement


def show(
    model: str, output: Path | None, options: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Every number with its protocol; beside the dense model where there is one. Of several
    processes the first speaks.
    """
    check_output(output)
    with progress_bars(quiet or not is_first()) as bars:
        found = measurement.evaluate(model, progress=bars, **options)
    if not is_first():
        return
    results = found.results()
    show_results(results)
    finish(results, output, as_json)
