"""Which matrices a method may edit: in all layers, the most redundant ones or those named, the
matrices that are selected and not left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

from grasp.core.decoder import Decoder
from grasp.core.families import select
from grasp.core.fields import NumLayers, flag, shortened
from grasp.core.layer import Linear
from grasp.core.records import Statistics
from grasp.errors import RecipeError
from grasp.methods.base import Method
from grasp.stages.redundancy import block_influence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scope(Method):
    """Base of the methods that edit matrices anywhere in the model. The layers of `layers="bi"` are
    known after the first sweep, which must hold `Similarity`.
    """

    layers: tuple[str, ...] = flag(
        ("all",),
        "Layers to edit: all, bi (the --num-layers most redundant ones), or indices such as"
        " 21,22,25.",
    )
    num_layers: NumLayers | None = flag(None, "Edit this many layers, the most redundant ones.")
    projections: tuple[str, ...] = flag(
        ("all",), "Matrices to edit: all, attention, mlp, or roles such as q,k,v,o,gate,up,down."
    )
    exclude: tuple[str, ...] = flag((), "Matrices to leave alone, by role or name, e.g. k,v.")

    def __post_init__(self) -> None:
        super().__post_init__()
        indices = all(
            layer.isascii() and layer.isdecimal() and len(layer) < 10 for layer in self.layers
        )
        if indices:
            object.__setattr__(self, "layers", tuple(str(int(layer)) for layer in self.layers))
        elif self.layers not in (("all",), ("bi",)):
            raise RecipeError(
                f"--layers {shortened(','.join(self.layers))}: allowed: all, bi, or indices such as"
                " 21,22,25"
            )
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise RecipeError(
                f"--layers {','.join(self.layers)}: name at least one layer, and none twice"
            )
        if (self.num_layers is not None) != (self.layers == ("bi",)):
            raise RecipeError(
                "--num-layers and --layers bi go together (for the paper's method: --method grasp"
                " --num-layers ...)"
            )

    def check(self, decoder: Decoder) -> None:
        super().check(decoder)
        for layer in self.layers:
            if layer.isdigit() and int(layer) not in decoder.kept:
                raise RecipeError(
                    f"--layers {layer}: the model has layers 0 to {decoder.num_layers - 1}"
                )
        if self.num_layers is not None and self.num_layers > len(decoder.kept):
            raise RecipeError(
                f"--num-layers {self.num_layers}: the model has {len(decoder.kept)} layers"
            )
        self.linears(decoder, decoder.kept[:1])  # a wrong name of a matrix is an error there

    def chosen_layers(self, decoder: Decoder, stats: Statistics) -> list[int]:
        """The layers to edit. Warns of those whose matrices are not all dense any more."""
        layers = self.possible_layers(decoder)
        if self.num_layers is not None:
            layers = list(block_influence(stats).lowest(self.num_layers))
        for index in layers:
            if low_rank := len(decoder.replaced(index, self.projections)):
                logger.warning(
                    "layer %d: %d of its matrices are low-rank pairs already and stay as they are",
                    index,
                    low_rank,
                )
        return layers

    def possible_layers(self, decoder: Decoder) -> list[int]:
        """The layers that may be edited, as far as is known before the sweep."""
        return (
            [int(layer) for layer in self.layers]
            if self.layers[0].isdigit()
            else list(decoder.kept)
        )

    def planned_layers(self, decoder: Decoder) -> list[int]:
        """As many layers as will be edited; before the sweep has said which, those with the most
        left to edit.
        """
        layers = self.possible_layers(decoder)
        if self.num_layers is None:
            return layers
        left = {
            layer: sum(math.prod(linear.shape) for linear in self.linears(decoder, [layer]))
            for layer in layers
        }
        return sorted(layers, key=lambda layer: -left[layer])[: self.num_layers]

    def linears(self, decoder: Decoder, layers: Iterable[int]) -> list[Linear]:
        """The matrices to edit in these layers."""
        left_out = select(decoder.family, self.exclude, "--exclude") if self.exclude else ()
        return [
            linear
            for index in layers
            for linear in decoder.linears(index, self.projections)
            if linear.name not in left_out
        ]
