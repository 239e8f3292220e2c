"""What the methods share that take units out of layers, and nothing else: which layers, how many
units, and the plan. A method says which axes, what each layer gives, and which units stay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from grasp.core.decoder import Decoder
from grasp.core.fields import Share, flag, shortened
from grasp.errors import RecipeError
from grasp.methods.base import Method, ratio_unreachable
from grasp.stages.shares import Part

ALL, INNER = "all", "inner"
LAYERS = (
    "Layers to edit: all, inner (not the first n/8, at most 4, nor the last n/16, at most 2), or"
    " indices such as 21,22,25."
)


@dataclass(frozen=True, kw_only=True)
class Widths(Method):
    """Base of the methods that make layers narrower: subclasses give `parts`."""

    ratio: Share | None = flag(None, "Share of ALL parameters to remove.")
    layers: tuple[str, ...] = flag((ALL,), LAYERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None:
            raise RecipeError(
                f"--method {self.name}: say how much to compress with --ratio; none was given"
            )
        said = shortened(",".join(self.layers))
        named = [layer for layer in self.layers if layer.isascii() and layer.isdecimal()]
        if len(named) == len(self.layers) and all(len(layer) < 10 for layer in named):
            object.__setattr__(self, "layers", tuple(str(int(layer)) for layer in named))
        elif self.layers not in ((ALL,), (INNER,)):
            raise RecipeError(
                f"--layers {said}: allowed: {ALL}, {INNER}, or indices such as 21,22,25"
            )
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise RecipeError(f"--layers {said}: name at least one layer, and none twice")

    @abstractmethod
    def parts(self, decoder: Decoder) -> list[Part]:
        """What may become narrower, layer by layer."""

    def check(self, decoder: Decoder) -> None:
        for layer in self.layers:
            if layer.isdigit() and int(layer) not in decoder.kept:
                raise RecipeError(
                    f"--layers {layer}: the model has layers 0 to {decoder.num_layers - 1}"
                )
        parts, target = self.parts(decoder), self.target(decoder)
        largest = sum(one.most for one in parts)
        if target > largest:
            hint = "one unit of everything left in the chosen layers; take more --layers"
            if not parts:
                hint = f"no matrices of {decoder.family.name} are known to be dense and to share"
                hint += " channels or heads"
            assert self.ratio is not None
            raise ratio_unreachable(self.ratio, largest / decoder.num_parameters(), hint)

    def target(self, decoder: Decoder) -> float:
        """How many numbers go."""
        assert self.ratio is not None
        return self.ratio * decoder.num_parameters()

    def chosen_layers(self, decoder: Decoder) -> list[int]:
        """The layers to edit."""
        kept, count = list(decoder.kept), len(decoder.kept)
        if self.layers == (INNER,):
            return kept[min(count // 8, 4) : count - min(count // 16, 2)]
        return kept if self.layers == (ALL,) else sorted(int(layer) for layer in self.layers)


def gone(parts: Sequence[Part], left: dict[Part, int]) -> int:
    """How many numbers go."""
    return sum((one.count - left[one]) * one.each for one in parts)
