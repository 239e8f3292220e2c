"""`grasp recover`: what was trained, and what it brought."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grasp.compensation.training import way_on
from grasp.core.checkpoint import bytes_on_disk
from grasp.core.manifest import MANIFEST
from grasp.core.processes import is_first
from grasp.terminal.bars import emit, progress_bars, table
from grasp.verbs import recover as recovery


def show(checkpoint: Path, out: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Run `grasp.recover` and sum up what it did. Of several processes the first speaks."""
    with progress_bars(quiet or not is_first()) as bars, way_on(out):
        done = recovery.recover(checkpoint, out, progress=bars, **options)
    if not is_first():
        return
    told, best = done.manifest["recovery"], done.best
    before = done.curve[0]
    rows = [
        (
            "trained",
            (
                f"{told['trained_parameters']:,} numbers ({told['recipe']['train']}), objective"
                f" {told['recipe']['objective']}"
            ),
        ),
        (
            "text",
            (
                f"{told['data']['rows']:,} rows, {told['data']['tokens']:,} tokens;"
                f" {told['data']['held_out_rows']} rows held out"
            ),
        ),
        ("steps", f"{told['steps']:,}, {told['tokens_seen']:,} tokens seen"),
        (
            "held-out loss",
            f"{before['held_out_loss']:.4f} → {best['held_out_loss']:.4f} at step {best['step']}",
        ),
        (
            "held-out cross-entropy",
            f"{before['held_out_lm_loss']:.4f} → {best['held_out_lm_loss']:.4f}",
        ),
        (
            "seconds",
            ", ".join(f"{name} {seconds:.1f}" for name, seconds in told["seconds"].items()),
        ),
        ("checkpoint", str(out)),
    ]
    table("", ("", ""), rows, left=2)
    if as_json:
        emit(
            {
                "path": str(out),
                "manifest": str(out / MANIFEST),
                "bytes": bytes_on_disk(out),
                "recovery": told,
            }
        )
