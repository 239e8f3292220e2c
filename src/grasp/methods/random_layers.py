"""Random layers: delete decoder layers drawn by the seed, a control for methods that choose them.

1. Put the layers in an order drawn by `--seed`.
2. Delete the first n of it. For one seed, more layers are the same ones and others.

One draw is one layer or another; compare with several seeds. The seed is that of the run, which
also draws the calibration text. That is swept for block influence alone, which the report shows.
No paper is its own; the one that is named is ShortGPT, whose choice of layers it stands beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Step
from grasp.core.edits.droppable import check_droppable
from grasp.core.fields import NumLayers, Share, flag
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.methods.base import Method, Plan, check_one_size, fewest_layers, layer_sizes
from grasp.stages.statistics import Similarity


@dataclass(frozen=True, kw_only=True)
class RandomLayers(Method):
    """Delete layers drawn by --seed (a control)."""

    name: ClassVar[str] = "random-layers"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"

    ratio: Share | None = flag(
        None, "Share of ALL parameters to remove; the number of layers follows."
    )
    num_layers: NumLayers | None = flag(None, "Delete this many layers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_size(self.name, {"--ratio": self.ratio, "--num-layers": self.num_layers})

    def check(self, decoder: Decoder) -> None:
        if self.num_layers is not None and self.num_layers >= decoder.num_layers:
            raise RecipeError(
                f"--num-layers {self.num_layers}: the model has {decoder.num_layers} layers; at"
                f" most {decoder.num_layers - 1} are allowed"
            )
        if self._count(decoder):
            # which layers go is not known yet; one stands for all
            check_droppable(decoder, [decoder.num_layers // 2])

    def plan(self, decoder: Decoder) -> Plan:
        count, sizes = self._count(decoder), layer_sizes(decoder)
        gone = sum(sizes[index] for index in range(count))
        return Plan(count, count, decoder.num_parameters() - gone, 1, 0)

    def needs(self, decoder: Decoder) -> list[Collector]:
        return [Similarity()]

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        layers, generator = list(runner.decoder.kept), torch.Generator()
        order = torch.randperm(len(layers), generator=generator.manual_seed(runner.data.seed))
        drawn = [layers[place] for place in order[: self._count(runner.decoder)].tolist()]
        for index in sorted(drawn, reverse=True):
            yield Step(Drop(index))

    def _count(self, decoder: Decoder) -> int:
        """How many layers go; for a ratio, the fewest that reach it."""
        if self.num_layers is not None:
            return self.num_layers
        assert self.ratio is not None
        return fewest_layers(decoder, self.ratio)
