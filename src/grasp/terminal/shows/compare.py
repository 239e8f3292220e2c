"""`grasp compare`: the cells of an experiment as they run, then one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grasp.errors import Interrupted
from grasp.recipes import experiment
from grasp.terminal.bars import emit, plain, progress_bars, say, table
from grasp.terminal.results import check_output, finish, show_results
from grasp.verbs import compare as comparison


def show(
    path: Path,
    output: Path | None,
    dry: bool,
    cell: str | None,
    options: dict[str, Any],
    as_json: bool,
    quiet: bool,
) -> None:
    """Run an experiment, list its cells, or (in a child process) run one. `options`: device and
    trust.
    """
    asked = experiment.read_experiment(path, **options)
    if cell is not None:
        with progress_bars(quiet) as bars:
            emit(comparison.run_cell(comparison.cell_of(asked, cell), bars).to_json())
        return
    place = output or Path("results") / f"{path.stem}.json"
    check_output(place, new_folder=output is None)
    done = comparison.finished(place)
    if dry:
        rows = [
            (one.label, one.method or "dense", "finished" if one.key in done else "to run")
            for one in asked.cells
        ]
        table(asked.title, ("cell", "method", ""), rows, left=3)
        return

    def announce(number: int, of: int, label: str, what: str) -> None:
        say(f"[bold]{number}/{of}[/bold] {plain(label)}: {plain(what)}")

    try:
        results = comparison.compare(asked, place, announce, quiet)
    except KeyboardInterrupt as stop:
        finished = len({one.key for one in asked.cells} & set(comparison.finished(place)))
        kept = (
            f"{finished} of {len(asked.cells)} cells are finished in {place}; the same command goes"
            " on from there"
        )
        raise Interrupted(kept if finished else "no cell is finished") from stop
    show_results(results)
    finish(results, None, as_json)
    say(f"results: {plain(place)}; a page of them: grasp report {plain(place)}")
