"""The experts of a layer are kept one by one, so that each can have matrices of other ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec import Struct

from grasp.core.edits.base import Edit, Summary, Undo
from grasp.core.edits.drop import Index
from grasp.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from grasp.core.decoder import Decoder


class _Spec(Struct):
    layer: Index


@dataclass(frozen=True)
class SplitExperts(Edit):
    """Put linears, two an expert, in the place of the tensors that hold all experts of decoder
    layer `layer`. The model computes the same; what becomes smaller are the linears, afterwards.
    """

    layer: int

    kind: ClassVar[str] = "split-experts"
    carried: ClassVar[bool] = True
    schema: ClassVar[type[Struct]] = _Spec

    def apply(self, decoder: Decoder) -> Undo:
        import torch

        from grasp.core.edits.placing import put
        from grasp.core.experts import mixture
        from grasp.core.layers.experts_grasp import MATRICES, matrix_of, split_like

        found = mixture(decoder, self.layer)
        if found is None or not found.is_fused:
            raise RecipeError(f"layer {self.layer}: it has no experts in one tensor a matrix")
        new = split_like(found.experts, "meta")
        for number, expert in enumerate(new.split):
            for name in MATRICES:
                linear: Any = getattr(expert, name)
                for part, numbers in zip(
                    ("weight", "bias"), matrix_of(found.experts, name, number), strict=True
                ):
                    if numbers is not None:
                        # numbers of their own: the tensor of all experts can go
                        own = numbers.detach().clone(memory_format=torch.contiguous_format)
                        setattr(linear, part, torch.nn.Parameter(own, requires_grad=False))
        return put(decoder, {found.path: new.train(found.experts.training)})

    def spec(self) -> dict[str, Any]:
        return {"edit": self.kind, "layer": self.layer}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SplitExperts:
        return cls(spec["layer"])

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def served(self) -> bool:
        return False

    def summary(self) -> Summary:
        return Summary("layers whose experts are apart", f"layer {self.layer}: experts apart")
