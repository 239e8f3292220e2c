"""ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (Men et al., arXiv 2403.03853).

1. Sweep the calibration set once, on the dense model.
2. Block influence of a layer is `1 - mean over tokens of cos(layer input, layer output)`, padding masked.
3. Delete the n layers with the lowest block influence; they need not be contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Edit
from grasp.core.records import Calibration, Statistics
from grasp.core.sweep import Collector
from grasp.errors import RecipeError
from grasp.methods.base import Method, Plan, check_layers, check_size_flags, flag, ratio_unreachable
from grasp.stages.redundancy import angular_distance, block_influence
from grasp.stages.statistics import AngularDistance, Similarity


@dataclass(frozen=True, kw_only=True)
class ShortGPT(Method):
    """Delete the layers that change their input least."""

    name: ClassVar[str] = "shortgpt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"

    ratio: float | None = flag(None, "Share of ALL parameters to remove: the fewest whole layers that reach it.")
    num_layers: int | None = flag(None, "Delete this many layers, the most redundant ones.")
    layers: tuple[int, ...] | None = flag(None, "Delete these layers, e.g. 21,22,25.")
    angular: bool = flag(False, "Choose one contiguous span by angular distance at the last token instead of block influence.")

    def __post_init__(self) -> None:
        check_size_flags(self, "ratio", "num_layers", "layers")
        if self.angular and self.layers is not None:
            raise RecipeError("--angular chooses the layers, --layers names them; give one")

    def check(self, model: Decoder) -> None:
        check_layers(model, self.layers, self.num_layers, model.num_layers - 1)
        self._count(model)

    def plan(self, model: Decoder) -> Plan:
        count = self._count(model)
        sizes = _layer_sizes(model)
        layers = self.layers if self.layers is not None else range(count)
        return Plan(count, count, model.num_parameters() - sum(sizes[index] for index in layers), 1, 0)

    def needs(self, model: Decoder) -> list[Collector]:
        return [Similarity(), AngularDistance()] if self.angular else [Similarity()]

    def edits(self, model: Decoder, data: Calibration, stats: Statistics) -> Iterator[Edit]:
        redundancy = angular_distance(stats) if self.angular else block_influence(stats)
        layers = self.layers if self.layers is not None else redundancy.lowest(self._count(model))
        for index in sorted(layers, reverse=True):
            yield Drop(index)

    def _count(self, model: Decoder) -> int:
        """How many layers go. Raises `RecipeError` where the ratio asks for more than all but one."""
        if self.layers is not None:
            if len(self.layers) >= model.num_layers:
                raise RecipeError(f"--layers names all {model.num_layers} layers; at least one must stay")
            return len(self.layers)
        if self.num_layers is not None:
            return self.num_layers
        assert self.ratio is not None
        total, sizes = model.num_parameters(), _layer_sizes(model)
        smallest = min(sizes.values())
        count = math.ceil((self.ratio * total - 1e-6) / smallest)
        if count >= model.num_layers:
            raise ratio_unreachable(self.ratio, smallest * (model.num_layers - 1) / total, "all layers but one")
        return count


def _layer_sizes(model: Decoder) -> dict[int, int]:
    return {layer.index: sum(p.numel() for p in layer.module.parameters()) for layer in model.layers()}
