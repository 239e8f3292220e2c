"""`grasp inspect`: how redundant every layer is, as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grasp.report.plots import check_picture, spectra
from grasp.terminal.bars import emit, plain, progress_bars, say, table
from grasp.verbs import inspect as inspection


def show(model: str, output: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Table and picture of layer redundancy and singular spectra."""
    check_picture(output)
    with progress_bars(quiet) as bars:
        seen = inspection.inspect(model, progress=bars, **options)
    scores = seen.redundancy.scores
    order = sorted(scores, key=lambda layer: scores[layer])
    place = {layer: number for number, layer in enumerate(order, start=1)}
    highest = max(scores.values()) or 1.0
    rows = [
        (layer, f"{score:.5f}", place[layer], "█" * max(1, round(30 * score / highest)))
        for layer, score in scores.items()
    ]
    title = (
        "block influence (low = redundant)"
        if seen.redundancy.kind == "bi"
        else "angular distance / π (low = redundant)"
    )
    table(title, ("layer", "score", "most redundant", ""), rows, left=0)
    spectra(
        dict(scores),
        seen.redundancy.kind,
        {path: values.tolist() for path, values in seen.singular_values.items()},
        output,
    )
    say(f"most redundant first: {','.join(map(str, order))}")
    say(f"picture: {plain(output)}")
    if as_json:
        emit(
            {
                "kind": seen.redundancy.kind,
                "scores": scores,
                "most_redundant_first": order,
                "picture": str(output),
                "calibration": seen.calibration.to_json(),
            }
        )
