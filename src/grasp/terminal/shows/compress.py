"""`grasp compress`: what was made of the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from grasp.core.checkpoint import bytes_on_disk
from grasp.core.manifest import MANIFEST
from grasp.core.processes import is_first
from grasp.terminal.bars import emit, megabytes, progress_bars, table
from grasp.verbs import compress as pipeline


def show(model: str, out: Path, options: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Run `grasp.compress` and sum up what it did. Of several processes the first speaks."""
    with progress_bars(quiet or not is_first()) as bars:
        result = pipeline.compress(model, out, progress=bars, **options)
    if not is_first():
        return
    sizes, counts = result.manifest["parameters"], result.log.counts()
    rows = [
        ("parameters", f"{sizes['before']:,} → {sizes['after']:,}"),
        ("removed", f"{100 * sizes['ratio']:.2f} %"),
        ("edits", ", ".join(f"{number} {what}" for what, number in counts.items()) or "none"),
        *_expected(result.manifest.get("prediction")),
        ("bytes on disk", megabytes(bytes_on_disk(out))),
        (
            "seconds",
            ", ".join(
                f"{name} {seconds:.1f}" for name, seconds in result.manifest["seconds"].items()
            ),
        ),
        ("checkpoint", str(out)),
    ]
    table("", ("", ""), rows, left=2)
    holdings = result.manifest.get("bytes", [])
    if holdings:
        lines = [
            (one["part"], one["stored"], str(one["matrices"]), megabytes(one["bytes"]))
            for one in holdings
        ]
        table("where the bytes are", ("part", "stored in", "matrices", "bytes"), lines, left=2)
    if as_json:
        emit(
            {
                "path": str(out),
                "manifest": str(out / MANIFEST),
                "bytes": bytes_on_disk(out),
                **{k: result.manifest[k] for k in ("parameters", "recipe", "seconds", "notes")},
                **{k: result.manifest[k] for k in ("prediction",) if k in result.manifest},
            }
        )


def _expected(told: dict[str, float] | None) -> list[tuple[str, str]]:
    """What to expect of text that was not seen, where the method says it."""
    if told is None:
        return []
    low, high = (math.exp(told[name]) for name in ("low", "high"))
    return [
        (
            "expected",
            f"perplexity × {told['perplexity_ratio']:.3f} on unseen text like the calibration text"
            f" ({low:.3f} to {high:.3f})",
        )
    ]
