"""The hidden states at one place get a smaller basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import Meta, Struct

from grasp.core.edits.base import Edit, Summary, Undo
from grasp.core.edits.drop import Index
from grasp.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from grasp.core.decoder import Decoder
    from grasp.core.families import Family

Width = Annotated[int, Meta(ge=1)]


class _Spec(Struct):
    layer: Index
    block: str
    width: Width
    of: Width


@dataclass(frozen=True)
class Slice(Edit):
    """Keep the hidden states that the `block` of decoder layer `layer` reads in the basis `basis`.

    `block`: "attention", "mlp" (not where both read the same states), or "head" with the last
    layer. `basis` Q (hidden, width), orthonormal columns. What writes the states, what reads them,
    and the sum that goes past both follow (`slicing`). The first place unties embedding and head.

    After every such edit the model is complete: places that were not sliced are as they were.
    """

    layer: int
    block: str
    basis: Tensor | None = field(repr=False)
    width: int = -1
    of: int = -1

    kind: ClassVar[str] = "slice"
    carried: ClassVar[bool] = True
    schema: ClassVar[type[Struct]] = _Spec

    def __post_init__(self) -> None:
        if self.basis is not None:
            object.__setattr__(self, "of", self.basis.shape[0])
            object.__setattr__(self, "width", self.basis.shape[-1])

    def apply(self, decoder: Decoder) -> Undo:
        from grasp.core.edits.rebasing import carry_out
        from grasp.core.edits.slicing import Place

        if self.basis is None:
            raise RecipeError(f"layer {self.layer}: this edit was read from a log, without tensors")
        return carry_out(decoder, Place(self.layer, self.block), self.basis)

    def spec(self) -> dict[str, Any]:
        place = {"edit": self.kind, "layer": self.layer, "block": self.block}
        return place | {"width": self.width, "of": self.of}

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.basis is None else {"basis": self.basis}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Slice:
        basis = tensors.get("basis")
        return cls(spec["layer"], spec["block"], basis, spec["width"], spec["of"])

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def served(self) -> bool:
        return False

    def trainable(self, family: Family) -> tuple[str, ...]:
        if self.block == "head":
            return ()
        matrices = tuple(f"{path}.weight" for _, path in family.matrices)
        shortcut = "shortcut_0" if self.block == "attention" else "shortcut_1"
        return tuple(f"{family.layers}.{self.layer}.{name}" for name in (*matrices, shortcut))

    def summary(self) -> Summary:
        where = "head" if self.block == "head" else f"layer {self.layer}, {self.block}"
        text = f"{where}: reads {self.width} of {self.of} hidden dimensions"
        return Summary("sliced states", text)
