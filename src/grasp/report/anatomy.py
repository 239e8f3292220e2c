"""A checkpoint's manifest -> the records that its charts draw, one dict a mark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grasp.report.reading import Checkpoint, Matrix

MOST_POINTS = 600
"""Groups drawn of one matrix: of more, every k-th, but all numbers stay in grasp.json."""


def block_influence(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """One record a layer. `floor`: where its bar begins on a logarithmic axis; a score of 0 or
    below is drawn there.
    """
    scores = checkpoint.redundancy
    positive = [score for score in scores.values() if score > 0]
    floor = 10 ** _floor_power(min(positive)) if positive else 1e-6
    edited, dropped = checkpoint.edited, set(checkpoint.dropped)
    states = {
        layer: "removed" if layer in dropped else "edited" if layer in edited else "untouched"
        for layer in scores
    }
    return [
        {
            "layer": layer,
            "score": score,
            "shown": max(score, floor),
            "floor": floor,
            "state": states[layer],
        }
        for layer, score in sorted(scores.items())
    ]


def _floor_power(value: float | int) -> int:
    power = 0
    while 10.0**power > value and power > -12:
        power -= 1
    return power


def layer_losses(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Predicted rise of the loss by layer and part of the layer, in nats a token; empty where any
    edit says none.
    """
    sums: dict[tuple[int, str], float] = {}
    for layer, part, loss in checkpoint.losses:
        shown = {"mlp": "MLP"}.get(part, part)
        sums[layer, shown] = sums.get((layer, shown), 0.0) + loss
    return [
        {"layer": layer, "part": part, "loss": float(f"{loss:.4g}")}
        for (layer, part), loss in sorted(sums.items())
    ]


def shown_matrices(checkpoint: Checkpoint, most: int) -> list[Matrix]:
    """A few matrices with scores: over the depth of the model, and of different kinds."""
    scored = [
        matrix
        for matrix in checkpoint.matrices
        if matrix.scores and matrix.kept and len(matrix.kept) < matrix.groups
    ]
    scored.sort(key=lambda matrix: matrix.layer)
    kinds = list(dict.fromkeys(matrix.name for matrix in scored))
    chosen: list[Matrix] = []
    for number in range(min(most, len(scored))):
        layer = scored[round(number * (len(scored) - 1) / max(1, min(most, len(scored)) - 1))].layer
        kind = kinds[number * max(1, len(kinds) // most) % len(kinds)]
        left = [matrix for matrix in scored if matrix not in chosen]
        chosen.append(
            min(left, key=lambda matrix: (abs(matrix.layer - layer), matrix.name != kind))
        )
    return sorted(chosen, key=lambda matrix: matrix.layer)


def groups(matrix: Matrix) -> list[dict[str, Any]]:
    """One record a singular group; scores of 0 are drawn at the smallest other one."""
    kept = set(matrix.kept)
    positive = [score for score in matrix.scores if score > 0]
    floor = min(positive, default=1e-12)
    step = -(-len(matrix.scores) // MOST_POINTS)
    return [
        {
            "group": group,
            "sigma": max(matrix.singular_values[group], 1e-12),
            "score": max(score, floor),
            "state": "kept" if group in kept else "left out",
        }
        for group, score in enumerate(matrix.scores)
        if group % step == 0
    ]


def recovery(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The loss curve of a recovery, one record a step and kind of loss."""
    told = {"loss": "training", "held_out_loss": "held out"}
    return [
        {"step": step["step"], "loss": step[key], "kind": kind}
        for step in checkpoint.recovery
        for key, kind in told.items()
        if all(math.isfinite(step.get(name, math.nan)) for name in ("step", key))
    ]


def shortened(value: Any, most: int = 8) -> Any:
    """A manifest to look at: of long lists the first entries and how many follow."""
    if isinstance(value, dict):
        return {key: shortened(item, most) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        rest: Sequence[str] = [f"… {len(value) - most} more"] if len(value) > most + 1 else []
        return [shortened(item, most) for item in (value[:most] if rest else value)] + list(rest)
    return value
