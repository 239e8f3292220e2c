"""A matrix gets other numbers, and keeps its shape: merged, masked or rounded weights."""

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
    how: str = ""


@dataclass(frozen=True)
class Rewrite(Edit):
    """Put `weight` (out, in) in the place of the dense matrix at `path`, and `bias` (out) too where
    one is given (there must be one). `how`: what was done, in a word or two, for people.
    """

    path: str
    weight: Tensor | None = field(repr=False)
    bias: Tensor | None = field(default=None, repr=False)
    how: str = ""

    kind: ClassVar[str] = "rewrite"
    schema: ClassVar[type[Struct]] = _Spec

    def apply(self, decoder: Decoder) -> Undo:
        import copy

        import torch
        from torch import nn

        from grasp.core.edits.placing import put, stored
        from grasp.core.layer import is_dense

        if self.weight is None:
            raise RecipeError(f"'{self.path}': this edit was read from a log, without its tensors")
        index, name = decoder.locate(self.path)
        old: Any = decoder.layer(index).module.get_submodule(name)
        if not is_dense(old):
            raise RecipeError(f"'{self.path}' is no dense matrix, so it cannot be rewritten")
        weight = stored(old, self.weight).to(old.weight)
        if weight.shape != old.weight.shape or (self.bias is not None and old.bias is None):
            raise RecipeError(
                f"'{self.path}': numbers {tuple(self.weight.shape)}"
                f"{'' if self.bias is None else ' and a bias'} do not fit the matrix"
            )
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError(
                f"'{self.path}': the weights are not finite in {weight.dtype}; try --dtype float32"
            )
        new = copy.copy(old)  # the same module with other numbers; undoing brings the old one back
        new._parameters = dict(old._parameters)
        kept = old.weight.requires_grad
        new.weight = nn.Parameter(weight, requires_grad=kept)
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.to(old.bias), requires_grad=kept)
        return put(decoder, {self.path: new})

    def spec(self) -> dict[str, Any]:
        return {"edit": self.kind, "path": self.path} | ({"how": self.how} if self.how else {})

    def tensors(self) -> dict[str, Tensor]:
        found = {"weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rewrite:
        return cls(spec["path"], tensors.get("weight"), tensors.get("bias"), spec.get("how", ""))

    @property
    def layers(self) -> tuple[int, ...]:
        return (layer_of(self.path),)

    def summary(self) -> Summary:
        return Summary("rewritten matrices", f"{self.path}: {self.how or 'other numbers'}")
