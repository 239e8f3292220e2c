"""A matrix becomes a pair of thin ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import Meta, Struct

from grasp.core.edits.base import Edit, Summary, Undo, layer_of
from grasp.errors import NumericsError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from grasp.core.decoder import Decoder
    from grasp.core.families import Family


class _Spec(Struct):
    path: str
    rank: Annotated[int, Meta(ge=0)]
    pivoted: bool = False


@dataclass(frozen=True)
class Factorize(Edit):
    """Replace the matrix at `path` by the pair `weight_in` A (rank, in) and `weight` B (out, rank).

    `places` (out): the pair is pivoted (see `LowRankLinear`), and `weight` is (out - rank, rank).
    """

    path: str
    weight_in: Tensor | None = field(repr=False)
    weight: Tensor | None = field(repr=False)
    places: Tensor | None = field(default=None, repr=False)
    rank: int = -1
    pivoted: bool = False

    kind: ClassVar[str] = "factorize"
    carried: ClassVar[bool] = True
    schema: ClassVar[type[Struct]] = _Spec

    def __post_init__(self) -> None:
        if self.weight_in is not None:
            object.__setattr__(self, "rank", self.weight_in.shape[0])
            object.__setattr__(self, "pivoted", self.places is not None)

    def apply(self, decoder: Decoder) -> Undo:
        import torch

        from grasp.core.edits.placing import put
        from grasp.core.layer import is_dense
        from grasp.core.layers.low_rank_grasp import low_rank_like

        weight_in, weight = self.weight_in, self.weight
        if weight_in is None or weight is None:
            raise RecipeError(f"'{self.path}': this edit was read from a log, without its tensors")
        index, name = decoder.locate(self.path)
        old: Any = decoder.layer(index).module.get_submodule(name)
        if not is_dense(old):
            raise RecipeError(f"'{self.path}' is a low-rank pair already, or not dense")
        new = low_rank_like(old, self.rank, old.weight.device, self.pivoted)
        if new.weight.shape != weight.shape or new.weight_in.shape != weight_in.shape:
            raise RecipeError(
                f"'{self.path}': factors {tuple(weight.shape)} x {tuple(weight_in.shape)} do not"
                " fit the matrix"
            )
        with torch.no_grad():
            new.weight.copy_(weight)
            new.weight_in.copy_(weight_in)
            if self.places is not None:
                new.places.copy_(self.places)
            if old.bias is not None:
                new.bias.copy_(old.bias)
        if not bool(torch.isfinite(new.weight).all() and torch.isfinite(new.weight_in).all()):
            raise NumericsError(
                f"'{self.path}': the factors are not finite in {new.weight.dtype}; try --dtype"
                " float32"
            )
        return put(decoder, {self.path: new})

    def spec(self) -> dict[str, Any]:
        found = {"edit": self.kind, "path": self.path, "rank": self.rank}
        return found | ({"pivoted": True} if self.pivoted else {})

    def tensors(self) -> dict[str, Tensor]:
        found = {"weight_in": self.weight_in, "weight": self.weight, "places": self.places}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Factorize:
        return cls(
            spec["path"],
            tensors.get("weight_in"),
            tensors.get("weight"),
            tensors.get("places"),
            spec["rank"],
            spec.get("pivoted", False),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return (layer_of(self.path),)

    def trainable(self, family: Family) -> tuple[str, ...]:
        return (f"{self.path}.weight", f"{self.path}.weight_in") if self.rank else ()

    def summary(self) -> Summary:
        how = "pivoted pair" if self.pivoted else "pair"
        text = f"{self.path}: a {how} of rank {self.rank}"
        return Summary("low-rank matrices", text, self.path, self.rank, self.pivoted)
