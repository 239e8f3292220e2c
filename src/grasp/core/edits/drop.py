"""A decoder layer goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import Meta, Struct

from grasp.core.edits.base import Edit, Summary, Undo

if TYPE_CHECKING:
    from torch import Tensor

    from grasp.core.decoder import Decoder

Index = Annotated[int, Meta(ge=0, le=100_000)]


class _Spec(Struct):
    layer: Index


@dataclass(frozen=True)
class Drop(Edit):
    """Remove decoder layer `layer`."""

    layer: int

    kind: ClassVar[str] = "drop"
    schema: ClassVar[type[Struct]] = _Spec

    def apply(self, decoder: Decoder) -> Undo:
        from grasp.core.edits.droppable import check_droppable, take_out
        from grasp.core.edits.placing import remember

        check_droppable(decoder, [self.layer])
        undo = remember(decoder)
        take_out(decoder, self.layer)
        return undo

    def spec(self) -> dict[str, Any]:
        return {"edit": self.kind, "layer": self.layer}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Drop:
        return cls(spec["layer"])

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def summary(self) -> Summary:
        return Summary("layers dropped", f"layer {self.layer} dropped", gone=(self.layer,))
