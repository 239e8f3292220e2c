"""Stage 1, redundancy: which decoder layers barely change their input (paper, section 3.1).

Block influence of a layer is `1 - mean over tokens of cos(layer input, layer output)`, in [0, 2];
low = redundant. The angular alternative scores contiguous spans by `arccos(cos) / pi` between the
input of the first layer and the output of the last, at the last token.
"""

from __future__ import annotations

import math

from grasp.core.records import Redundancy, Statistics
from grasp.errors import NumericsError
from grasp.stages.statistics import AngularDistance, Similarity


def block_influence(statistics: Statistics) -> Redundancy:
    """Layer -> block influence, from a sweep with `Similarity`."""
    similarity = statistics[Similarity.name]
    return Redundancy("bi", {index: 1.0 - float(similarity[index]) for index in sorted(similarity)})


def angular_distance(statistics: Statistics) -> Redundancy:
    """Layer -> angular distance, and the distances of all spans, from a sweep with
    `AngularDistance`.
    """
    table = statistics[AngularDistance.name]
    distance = table["distance"]
    layers = table["layers"].tolist()
    return Redundancy(
        "angular", {layer: float(distance[i, i + 1]) for i, layer in enumerate(layers)}, distance
    )


def describe_redundancy(statistics: Statistics) -> dict[str, dict[str, float]]:
    """The manifest's "redundancy": kind -> layer -> score, for every kind that was collected.

    Raises `NumericsError` naming the layer whose score is not a number.
    """
    found = [block_influence(statistics)] if Similarity.name in statistics.tables else []
    found += [angular_distance(statistics)] if AngularDistance.name in statistics.tables else []
    for redundancy in found:
        for layer, score in redundancy.scores.items():
            if not math.isfinite(score):
                raise NumericsError(
                    f"layer {layer}: its {redundancy.kind} is {score}, so its hidden states are not"
                    " finite; try --dtype float32"
                )
    return {
        redundancy.kind: {str(layer): score for layer, score in redundancy.scores.items()}
        for redundancy in found
    }
