"""Whole experts go, the same number from every layer that has some.

The number of experts is one entry of the config, so what is left is an ordinary model of fewer
experts: transformers and servers load it with nothing of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import Meta, Struct

from grasp.core.edits.base import Edit, Summary, Undo
from grasp.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from grasp.core.decoder import Decoder
    from grasp.core.experts import Mixture

Expert = Annotated[int, Meta(ge=0, le=100_000)]


class _Spec(Struct):
    keep: dict[
        Annotated[str, Meta(pattern="^[0-9]{1,6}$")], Annotated[list[Expert], Meta(min_length=1)]
    ]
    of: Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class DropExperts(Edit):
    """Keep these experts of every layer, {layer: experts, rising}, `of` as many as there were. The
    router loses the rows of the others, and stays as it is otherwise.
    """

    keep: Mapping[int, tuple[int, ...]]
    of: int

    kind: ClassVar[str] = "drop-experts"
    schema: ClassVar[type[Struct]] = _Spec

    @property
    def left(self) -> int:
        """Experts that every layer has left."""
        return len(next(iter(self.keep.values()), ()))

    def apply(self, decoder: Decoder) -> Undo:
        from grasp.core.edits.fewer_experts import check_buildable, count_in_config, fewer
        from grasp.core.edits.placing import put, remember
        from grasp.core.experts import mixtures

        found = mixtures(decoder)
        if {one.layer for one in found} != self.keep.keys() or not found:
            raise RecipeError(
                f"experts are kept of layers {', '.join(map(str, self.keep))}, but it must be all"
                f" layers that have some: {', '.join(str(one.layer) for one in found) or 'none'}"
            )
        for one in found:
            self._check(one)
        check_buildable(decoder, self.left)
        modules = {}
        for one in found:
            modules[one.path] = fewer(one.experts, one.count, self.keep[one.layer])
            modules[one.router_path] = fewer(one.router, one.count, self.keep[one.layer])
        restore = remember(decoder)
        back = count_in_config(decoder, self.left)
        undo = put(decoder, modules)

        def undone() -> None:
            undo()
            back()
            restore()

        return undone

    def _check(self, one: Mixture) -> None:
        """Raise `RecipeError` for experts that are not there, for too few of them, or where those
        of a group are more than those of another.
        """
        if not one.is_fused:
            raise RecipeError(f"layer {one.layer}: its experts are kept one by one, so none can go")
        keep, size = self.keep[one.layer], one.count // one.groups
        rising = all(one < other for one, other in pairwise(keep))
        if len(keep) != self.left or not rising or not 0 <= keep[0] <= keep[-1] < one.count:
            raise RecipeError(
                f"layer {one.layer}: what is kept of its {one.count} experts must be"
                f" {self.left} of them, as in every layer, rising"
            )
        in_group = {sum(expert // size == group for expert in keep) for group in range(one.groups)}
        if len(in_group) > 1:
            raise RecipeError(
                f"layer {one.layer}: its {one.groups} groups of experts must keep equally many"
            )
        if self.left < one.least:
            raise RecipeError(
                f"layer {one.layer}: {self.left} experts are too few, at least {one.least} must"
                f" stay: every token is sent to {one.per_token}"
            )

    def spec(self) -> dict[str, Any]:
        keep = {str(layer): list(experts) for layer, experts in self.keep.items()}
        return {"edit": self.kind, "keep": keep, "of": self.of}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DropExperts:
        keep = {int(layer): tuple(experts) for layer, experts in spec["keep"].items()}
        return cls(keep, spec["of"])

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.keep)

    def summary(self) -> Summary:
        text = f"{self.left} of {self.of} experts left in {len(self.keep)} layers"
        return Summary("experts dropped", text, axis="experts", left=self.left, of=self.of)
