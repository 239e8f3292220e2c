"""A linear, a low-rank pair, the embedding or the head gets few bits."""

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
    """Put the linear, low-rank pair, embedding or head at `path` in few bits; a head that is tied
    to the embedding goes with it.

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
        from grasp.core.edits.placing import home, put, vocabulary_paths
        from grasp.core.layer import is_quantized
        from grasp.core.layers.embedding_grasp import EMBEDDING, HEAD, share

        if not self.numbers:
            raise RecipeError(f"'{self.path}': this edit was read from a log, without its tensors")
        owner, name = home(decoder, self.path)
        old: Any = owner.get_submodule(name)
        if is_quantized(old):
            raise RecipeError(f"'{self.path}' is quantized already")
        ends = vocabulary_paths(decoder)
        table, head = ends.get(EMBEDDING), ends.get(HEAD)
        is_tied = table and head and _weight(decoder, table) is _weight(decoder, head)
        if is_tied and self.path == head:
            raise RecipeError(f"'{head}' is tied to '{table}', which has its numbers; give that")
        part = EMBEDDING if self.path == table else HEAD if self.path == head else None
        new = self._unfilled(old, part, old.weight.device)
        self._fill(new, old)
        modules = {self.path: new}
        if is_tied and head and part == EMBEDDING:
            tied: Any = decoder.model.get_submodule(head)
            modules[head] = self._unfilled(tied, HEAD, "meta")
            share(modules[head], new)
            modules[head].register_parameter("bias", tied.bias)
        return put(decoder, modules)

    def _unfilled(self, old: Any, part: str | None, device: Any) -> Any:
        from grasp.core.layers.embedding_grasp import place

        record = {"scheme": self.scheme, "group_size": self.group_size, "part": part}
        return place(self.path, old, record, device)

    def _fill(self, new: Any, old: Any) -> None:
        """Raise `NumericsError` where the numbers are not finite."""
        import torch

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
        index = layer_of(self.path)
        return () if index < 0 else (index,)

    def summary(self) -> Summary:
        return Summary("quantized matrices", f"{self.path}: {self.scheme}")


def _weight(decoder: Decoder, path: str) -> Any:
    return decoder.model.get_submodule(path).weight
