"""ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (Men et al., arXiv
2403.03853).

1. Sweep the calibration set once, on the dense model.
2. Block influence of a layer is `1 - mean over tokens of cos(layer input, layer output)`, padding
   masked.
3. Delete the n layers with the lowest block influence; they need not be contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Step
from grasp.core.edits.droppable import check_droppable
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.methods.base import LayerMethod, Plan, fewest_layers, layer_sizes


@dataclass(frozen=True, kw_only=True)
class ShortGPT(LayerMethod):
    """Delete the layers that change their input least."""

    name: ClassVar[str] = "shortgpt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"

    def check(self, decoder: Decoder) -> None:
        self.check_layers(decoder, most=decoder.num_layers - 1)
        if self._count(decoder):
            # which layers go is not known yet; one stands for all
            check_droppable(decoder, self.layers or [decoder.num_layers // 2])

    def plan(self, decoder: Decoder) -> Plan:
        count = self._count(decoder)
        sizes = layer_sizes(decoder)
        layers = self.layers if self.layers is not None else range(count)
        return Plan(
            count, count, decoder.num_parameters() - sum(sizes[index] for index in layers), 1, 0
        )

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        layers = (
            self.layers
            if self.layers is not None
            else self.redundancy(stats).lowest(self._count(runner.decoder))
        )
        for index in sorted(layers, reverse=True):
            yield Step(Drop(index))

    def _count(self, decoder: Decoder) -> int:
        """How many layers go; for a ratio, the fewest that reach it. Raises `RecipeError` where
        that is more than all but one.
        """
        if self.layers is not None:
            return len(self.layers)
        if self.num_layers is not None:
            return self.num_layers
        assert self.ratio is not None
        return fewest_layers(decoder, self.ratio)
