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
        from grasp.core.edits.placing import home, put
        from grasp.core.layer import is_quantized
        from grasp.core.layers.packing_grasp import BITS

        if not self.numbers:
            raise RecipeError(f"'{self.path}': this edit was read from a log, without its tensors")
        if self.scheme not in BITS:
            known = ", ".join(BITS)
            raise RecipeError(f"'{self.path}': no scheme '{self.scheme}'; known are {known}")
        owner, name = home(decoder, self.path)
        old: Any = owner.get_submodule(name)
        if is_quantized(old):
            raise RecipeError(f"'{self.path}' is quantized already")
        if owner is decoder.model:
            return put(decoder, self._ends(decoder, old))
        return put(decoder, {self.path: self._filled(old, None)})

    def _ends(self, decoder: Decoder, old: Any) -> dict[str, Any]:
        """What takes the place of the embedding, and of a head that is tied to it; or of a head."""
        from grasp.core.edits.placing import vocabulary_paths
        from grasp.core.layers.embedding_grasp import EMBEDDING, HEAD, share

        ends = vocabulary_paths(decoder)
        table, head = ends.get(EMBEDDING), ends.get(HEAD)
        modules = {path: decoder.model.get_submodule(path) for path in ends.values()}
        is_tied = table and head and modules[table].weight is modules[head].weight
        if is_tied and self.path == head:
            raise RecipeError(f"'{head}' is tied to '{table}', which has its numbers; give that")
        new = self._filled(old, EMBEDDING if self.path == table else HEAD)
        if not is_tied or not head:
            return {self.path: new}
        tied: Any = self._unfilled(modules[head], HEAD, "meta")
        share(tied, new)
        tied.register_parameter("bias", modules[head].bias)
        return {self.path: new, head: tied}

    def _unfilled(self, old: Any, part: str | None, device: Any) -> Any:
        from grasp.core.layers.embedding_grasp import place

        record = {"scheme": self.scheme, "group_size": self.group_size, "part": part}
        return place(self.path, old, record, device)

    def _filled(self, old: Any, part: str | None) -> Any:
        """What takes the place of `old`. Raises `NumericsError` for numbers that are not finite."""
        import torch

        new = self._unfilled(old, part, old.weight.device)
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
        return new

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
