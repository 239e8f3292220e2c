"""`grasp compress --dry-run`: what would be done, what it would cost, and, where the method can
tell, what perplexity to expect.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from grasp.core.destination import check_destination
from grasp.core.processes import is_first
from grasp.stages.enough import only_pydoc
from grasp.terminal.bars import emit, megabytes, plain, progress_bars, say, table
from grasp.verbs import compress as pipeline
from grasp.verbs.dry_run import DryRun
from grasp.verbs.dry_run import dry_run as plan_of

LADDER = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Ratios that a dry run shows beside the one asked for."""


def show(model: str, out: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Plan and estimate; where the method predicts, read the model and sweep once."""
    check_destination(out, 0, model)
    run = plan_of(model, out, **options)
    check_destination(out, run.num_bytes, model)
    asked = getattr(run.method, "share", None) or options.get("ratio")
    asked = asked or (None if run.ratio is None else round(run.ratio, 4))
    size = run.method.asked_bytes
    if size is not None:
        asked = max(round(1 - size / (2 * run.decoder.num_parameters()), 4), 0.0)
    expected = _expect(model, options, asked, quiet) if run.method.predicts else None
    if not is_first():  # of several processes the first speaks
        return
    table("dry run", ("", ""), _rows(model, out, run), left=2)
    if expected is not None:
        unit = {"latency": "ratio (of time)", "bytes": "ratio (of bytes)"}
        _ladder(expected, asked, unit.get(getattr(run.method, "unit", ""), "ratio"))
    notes = (
        tuple(
            filter(None, [only_pydoc(run.needs.calibration.data), *run.method.notes(), *run.stays])
        )
        if expected is None
        else expected.notes
    )
    for note in notes:
        say(f"[yellow]note[/yellow] {plain(note)}")
    if as_json:
        emit(_json(run, expected, notes))


def _expect(
    model: str, options: dict[str, Any], asked: float | None, quiet: bool
) -> pipeline.Prediction:
    """Read the model and sweep the calibration set once: the loss to expect at the ratio asked for
    and at a few others.
    """
    with progress_bars(quiet or not is_first()) as bars:
        return pipeline.predict(
            model, sorted({*LADDER, *([] if asked is None else [asked])}), progress=bars, **options
        )


def _rows(model: str, out: Path, run: DryRun) -> list[tuple[str, str]]:
    """The table: what, how large, how long."""
    decoder, plan, blocks, cost = run.decoder, run.plan, run.needs.calibration, run.cost
    before, unknown = decoder.num_parameters(), "follows from the scores"
    return [
        (
            "model",
            f"{model}: {decoder.family.name}, {decoder.num_layers} layers, {before:,} parameters",
        ),
        ("method", f"{run.method.name} {run.method.recipe()}"),
        ("would edit", f"{plan.num_edits} places in {plan.num_layers} layers"),
        (
            "parameters",
            (
                unknown
                if run.ratio is None
                else f"{plan.parameters:,} ({100 * run.ratio:.2f} % removed)"
            ),
        ),
        ("on disk", unknown if run.ratio is None else f"about {megabytes(run.num_bytes)}"),
        (
            "passes",
            (
                f"{plan.forward_sweeps} forward, {plan.backward_sweeps} forward and backward over"
                f" {blocks.num_samples} × {blocks.seq_len} tokens"
                + (f", and {plan.forward_blocks:,} blocks forward" if plan.forward_blocks else "")
            ),
        ),
        ("statistics", f"about {megabytes(plan.statistics_bytes)}"),
        ("layers", "on the disk, one in memory at a time" if run.needs.offloaded else "in memory"),
        ("memory", f"about {megabytes(cost.memory)} beside Python's own{_other(run)}"),
        ("disk", f"about {megabytes(cost.disk)}, the result among them"),
        ("time", f"about {run.seconds:.0f} s on this machine as busy as it is now"),
        ("writes", f"{out}: nothing in a dry run"),
    ]


def _other(run: DryRun) -> str:
    """What the other way to keep the layers would need."""
    there = run.needs.estimate(not run.needs.offloaded)
    how = "in memory" if run.needs.offloaded else "with the layers on the disk (--offload FOLDER)"
    return f"; {megabytes(there.memory)} {how}"


def _ladder(expected: pipeline.Prediction, asked: float | None, share: str) -> None:
    """The table of what to expect at each ratio."""
    lines = [("dense", "", f"{math.exp(expected.loss):.2f}", "", "")]
    for ratio, rise in expected.rises.items():
        low, high = expected.interval(ratio)
        lines.append(
            (
                f"{ratio:.4g}",
                f"{rise:.3f}",
                f"{expected.perplexity(ratio):.2f}",
                f"{low:.2f} to {high:.2f}",
                "← asked for" if ratio == asked else "",
            )
        )
    table(
        "expected on text of the same kind that was not seen",
        (share, "loss rise (nats/token)", "perplexity", "likely", ""),
        lines,
        left=0,
    )


def _json(
    run: DryRun, expected: pipeline.Prediction | None, notes: tuple[str, ...]
) -> dict[str, Any]:
    """The same for programs."""
    told = {
        "parameters_before": run.decoder.num_parameters(),
        "parameters_after": run.plan.parameters,
        "seconds": run.seconds,
        "memory_bytes": run.cost.memory,
        "disk_bytes": run.cost.disk,
        "offloaded": run.needs.offloaded,
        **dataclasses.asdict(run.plan),
        "notes": notes,
    }
    if expected is not None:
        told["loss"] = expected.loss
        told["expected_perplexity"] = {
            ratio: expected.perplexity(ratio) for ratio in expected.rises
        }
        told["expected_interval"] = {ratio: expected.interval(ratio) for ratio in expected.rises}
        told["rise_on_calibration"] = expected.seen
    return told
