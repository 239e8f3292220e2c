"""Run the cells of an experiment: one calibration, one accounting, one evaluation for all methods.

Every cell runs in a process of its own, so that its peak memory is its own and its crash is a row.
The results file is written after each; what is in it with the same key is not run again, so an
interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from grasp.core.children import run_child
from grasp.core.decoder import Decoder
from grasp.core.models import load_model
from grasp.core.progress import Progress, silent
from grasp.core.provenance import Clock, machine, versions
from grasp.core.results import Result, Results
from grasp.errors import CheckpointError, GraspError, RecipeError, in_words
from grasp.evaluation.bench import bench
from grasp.recipes.cell import Cell
from grasp.recipes.experiment import Experiment
from grasp.verbs import compress as pipeline
from grasp.verbs import evaluate as measurement
from grasp.verbs.recover import recover

logger = logging.getLogger(__name__)

Announce = Callable[[int, int, str, str], None]
"""Called as `announce(number, of, label, what)`: a cell begins, was there already, or failed."""


def compare(
    experiment: Experiment, output: Path, announce: Announce = lambda *_: None, quiet: bool = True
) -> Results:
    """Run what is not finished, write `output` after every cell, and return all rows in the order
    of the experiment.

    Rows of the same key in other results files of that folder are taken over. A failed row is tried
    again.
    """
    known = finished(output)
    rows: list[Result] = []

    def results() -> Results:
        about = {**experiment.about, "experiment": experiment.path.name}
        return Results(
            tuple(rows),
            experiment.title,
            f"grasp compare {experiment.path.name}",
            versions(),
            machine(),
            about,
        )

    for number, cell in enumerate(experiment.cells, start=1):
        key = cell.key
        if key in known:
            announce(number, len(experiment.cells), cell.label, "finished before")
            rows.append(replace(known[key], label=cell.label, fields=_shown(cell)))
            continue
        announce(number, len(experiment.cells), cell.label, "runs")
        row = _run_apart(experiment.path, cell, quiet)
        rows.append(row)
        results().write(output)
        if row.error:
            announce(number, len(experiment.cells), cell.label, f"failed: {row.error}")
    results().write(output)
    return results()


def run_cell(cell: Cell, progress: Progress = silent) -> Result:
    """Compress and measure one cell, in this process. Whatever goes wrong is the row's error."""
    try:
        return _run(cell, progress)
    except GraspError as problem:
        return _failed(cell, str(problem))
    except Exception as failure:
        logger.debug("cell %s", cell.key, exc_info=True)
        return _failed(cell, in_words(failure)[0])


def _run(cell: Cell, progress: Progress) -> Result:
    clock, peak = Clock(), None
    decoder = load_model(cell.model, **cell.loading)
    clock.lap("load")
    dense = (
        load_model(cell.model, **cell.loading)
        if cell.evaluation.get("against") or cell.speed is not None
        else None
    )
    total, seconds, calibration = decoder.num_parameters(), {}, None
    if cell.method:
        before = _peak_memory()
        with TemporaryDirectory() as folder:
            out = Path(folder, "compressed") if cell.recovery else None
            made = pipeline.compress(
                decoder,
                out,
                method=cell.method,
                progress=progress,
                **cell.calibration,
                **cell.fields,
            )
            calibration = made.manifest["calibration"]
            peak, seconds = max(_peak_memory(), before), {**clock.laps, **made.manifest["seconds"]}
            if out is not None:
                del made
                decoder, taken = _recovered(cell, out, progress)
                seconds["recovery"] = taken
    arguments = {**cell.evaluation, "against": dense if cell.evaluation.get("against") else None}
    found = measurement.evaluate(
        decoder, calibration=calibration, progress=progress, **arguments
    ).result
    scores = found.scores
    if cell.speed is not None and dense is not None:
        timed = bench(
            {"dense": dense, "model": decoder} if cell.method else {"model": decoder},
            progress=progress,
            **cell.speed,
        )
        scores += timed["model"]
    return replace(
        found,
        label=cell.label,
        model=cell.model,
        method=cell.method or "dense",
        fields=_shown(cell),
        ratio=1 - decoder.num_parameters() / total,
        scores=scores,
        seconds=seconds,
        peak_memory=peak,
        key=cell.key,
    )


def _recovered(cell: Cell, place: Path, progress: Progress) -> tuple[Decoder, float]:
    """The compressed model at `place` after its training, and the seconds that took."""
    began, trained = time.monotonic(), place.with_name("recovered")
    recover(
        place,
        trained,
        device=cell.loading.get("device"),
        trust_remote_code=cell.loading.get("trust_remote_code", False),
        progress=progress,
        **(cell.recovery or {}),
    )
    return load_model(str(trained), **cell.loading), time.monotonic() - began


def cell_of(experiment: Experiment, key: str) -> Cell:
    """The cell with this key. Raises `RecipeError` where the file changed meanwhile."""
    found = next((cell for cell in experiment.cells if cell.key == key), None)
    if found is None:
        raise RecipeError(
            f"{experiment.path}: has no cell {key}; was it changed while it ran? run `grasp"
            " compare` again"
        )
    return found


def _shown(cell: Cell) -> dict[str, object]:
    """The fields of a row: the method's, and what of the calibration is varied."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in cell.fields.items()
    }
    return {**fields, **{name: value for name, value in cell.calibration.items() if cell.method}}


def _run_apart(path: Path, cell: Cell, quiet: bool) -> Result:
    """A cell in a new process; whatever ends that process is the row's error."""
    granted = [*cell.granted, *(["--quiet"] if quiet else [])]
    command = [sys.executable, "-m", "grasp", "compare", str(path), "--cell", cell.key, *granted]
    child = run_child(command)
    if child.returncode == 130:
        raise KeyboardInterrupt
    if child.returncode == 0:
        return Result.from_json(json.loads(child.stdout.splitlines()[-1]))
    error = f"the process ended with status {child.returncode}" + (
        " (out of memory?)" if child.returncode == -9 else ""
    )
    return _failed(cell, error)


def _failed(cell: Cell, error: str) -> Result:
    return Result(cell.label, cell.model, cell.method, _shown(cell), error=error, key=cell.key)


def finished(output: Path) -> dict[str, Result]:
    """Rows by key of the results files in the folder, without the failed; those of `output` win. A
    damaged `output` is an error.
    """
    found: dict[str, Result] = {}
    for path in [
        *sorted(output.absolute().parent.glob("*.json")),
        *([output] if output.exists() else []),
    ]:
        try:
            rows = Results.read(path).rows
        except CheckpointError:
            if path == output:
                raise
            continue
        found.update({row.key: row for row in rows if row.key and not row.error})
    return found


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
