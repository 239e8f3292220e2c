"""A linear or a low-rank pair gets few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec import Struct

from grasp.core.edits.base import Edit, Summary, Undo, layer_of
from grasp.errors import NumericsError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from grasp.core.decoder import Decoder


class _Spec(Struct):
    path: str
    scheme: str
    group_size: int


@dataclass(frozen=True)
class Quantize(Edit):
    """Put the linear or low-rank pair at `path` in few bits.

    `numbers`: tensors by name, as `grasp.core.layers.packing_grasp` lays them out.
    """

    path: str
    scheme: str
    group_size: int
    numbers: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    kind: ClassVar[str] = "quantize"
    carried: ClassVar[bool] = True
    schema: ClassVar[type[Struct]] = _Spec

    def apply(self, decoder: Decoder) -> Undo:
        import torch

        from grasp.core.edits.placing import put
        from grasp.core.layer import is_quantized
        from grasp.core.layers.quantized_grasp import quantized_like

        if not self.numbers:
            raise RecipeError(f"'{self.path}': this edit was read from a log, without its tensors")
        index, name = decoder.locate(self.path)
        old: Any = decoder.layer(index).module.get_submodule(name)
        if is_quantized(old):
            raise RecipeError(f"'{self.path}' is quantized already")
        new = quantized_like(old, self.scheme, self.group_size, old.weight.device)
        with torch.no_grad():
            for key, value in self.numbers.items():
                getattr(new, key).copy_(value)
            for key in ("bias", "places", "in_places", "out_places"):
                if getattr(old, key, None) is not None:
                    getattr(new, key).copy_(getattr(old, key))
        try:
            new.check(self.path)
        except ValueError as failure:
            raise NumericsError(f"{failure}; try --dtype float32") from failure
        return put(decoder, {self.path: new})

    def spec(self) -> dict[str, Any]:
        place = {"edit": self.kind, "path": self.path}
        return place | {"scheme": self.scheme, "group_size": self.group_size}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.numbers)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Quantize:
        return cls(spec["path"], spec["scheme"], spec["group_size"], tensors)

    @property
    def layers(self) -> tuple[int, ...]:
        return (layer_of(self.path),)

    def summary(self) -> Summary:
        return Summary("quantized matrices", f"{self.path}: {self.scheme}")
