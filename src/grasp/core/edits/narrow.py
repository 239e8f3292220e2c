"""A layer becomes narrower: fewer MLP channels, KV groups, value or key dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from msgspec import Meta, Struct

from grasp.core.edits.base import Edit, Summary, Undo
from grasp.core.edits.drop import Index
from grasp.errors import NumericsError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from grasp.core.decoder import Decoder
    from grasp.core.edits.cuts import Cut
    from grasp.core.families import Family
    from grasp.core.layer import Linear

ROLES = {
    "channels": ("gate", "up", "down"),
    "kv_groups": ("q", "k", "v", "o"),
    "value_dims": ("v", "o"),
    "key_dims": ("q", "k"),
}
"""Axis -> whose matrices become narrower, in a family that has them."""


class _Spec(Struct):
    layer: Index
    axis: str
    left: Annotated[int, Meta(ge=0)]
    of: Annotated[int, Meta(ge=1)] | None = None


@dataclass(frozen=True)
class Narrow(Edit):
    """Keep a part of an axis of decoder layer `layer`, in every matrix that shares it.

    `axis`: "channels" of the MLP; "kv_groups", a key-value head with the query heads that read it;
    "value_dims", numbers of value heads, counted along all of them (kv_heads x head_dim), which go
    from v and from o; "key_dims", the same of key heads, from k and from q. `keep`: which, rising.
    `numbers`: what the narrower matrices hold, by path inside the layer (out, in), and biases by
    path + ".bias"; those not named keep what they held. `of`: how many there were, for people; a
    log from before it was kept does not say.

    Where the model's code cannot do with a smaller width, what is left out is 0 on the way, and
    not stored (`NarrowLinear`). A matrix of q, k and v that has lost rows so may lose others.
    """

    layer: int
    axis: str
    keep: Tensor | None = field(repr=False)
    numbers: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    left: int = -1
    of: int | None = None

    kind: ClassVar[str] = "narrow"
    carried: ClassVar[bool] = True
    schema: ClassVar[type[Struct]] = _Spec

    def __post_init__(self) -> None:
        if self.keep is not None:
            object.__setattr__(self, "left", len(self.keep))

    def apply(self, decoder: Decoder) -> Undo:
        import torch

        from grasp.core.edits.cuts import cuts
        from grasp.core.edits.placing import put
        from grasp.core.layers.narrow_grasp import narrow_like

        if self.keep is None:
            raise RecipeError(f"layer {self.layer}: this edit was read from a log, without tensors")
        modules = {}
        for whole in cuts(decoder, self.layer, self.axis, self.keep):
            linear, cut, places = self._matrix(decoder, whole)
            rows, columns = cut.size(linear.shape)
            old: Any = linear.module
            new = narrow_like(old, rows, columns, cut.scattered, cut.gathered, old.weight.device)
            weight = self.numbers.get(cut.path, cut.of(linear.weight))
            if tuple(weight.shape) != (rows, columns):
                raise RecipeError(
                    f"layer {self.layer}: numbers {tuple(weight.shape)} do not fit '{cut.path}',"
                    f" which becomes {rows} x {columns}"
                )
            with torch.no_grad():
                new.weight.copy_(weight)
                if old.bias is not None:
                    bias = old.bias if cut.rows is None else old.bias[cut.rows]
                    new.bias.copy_(self.numbers.get(f"{cut.path}.bias", bias))
                for name, kept in (("out_places", places), ("in_places", cut.columns)):
                    if getattr(new, name) is not None:
                        getattr(new, name).copy_(kept)
            if not bool(torch.isfinite(new.weight).all()):
                raise NumericsError(
                    f"'{linear.path}': the weights are not finite in {new.weight.dtype}; try"
                    " --dtype float32"
                )
            modules[linear.path] = new
        return put(decoder, modules)

    def _matrix(self, decoder: Decoder, cut: Cut) -> tuple[Linear, Cut, Tensor | None]:
        """The matrix that is cut, the cut in rows that it has now, and where these go. Raises
        `RecipeError` where it is neither dense nor one that lost rows only, and keeps its width.
        """
        import torch

        from grasp.core.layer import Linear, is_scattered

        layer = decoder.layer(self.layer)
        if cut.path in layer.linears:
            return layer.linears[cut.path], cut, cut.rows
        module: Any = layer.module.get_submodule(cut.path)
        if not (is_scattered(module) and cut.scattered and cut.columns is None):
            raise RecipeError(
                f"layer {self.layer}: '{cut.path}' is no dense matrix, so it cannot be narrowed"
            )
        assert cut.rows is not None
        left = torch.isin(module.out_places.cpu(), cut.rows.cpu().int()).nonzero()[:, 0]
        path = f"{decoder.family.layers}.{self.layer}.{cut.path}"
        linear = Linear(path, self.layer, cut.path, module)
        return linear, replace(cut, rows=left), module.out_places[left.to(module.out_places.device)]

    def spec(self) -> dict[str, Any]:
        place = {"edit": self.kind, "layer": self.layer, "axis": self.axis}
        return place | {"left": self.left} | ({} if self.of is None else {"of": self.of})

    def tensors(self) -> dict[str, Tensor]:
        return {**({} if self.keep is None else {"keep": self.keep}), **self.numbers}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Narrow:
        numbers = {name: tensor for name, tensor in tensors.items() if name != "keep"}
        keep, left, of = tensors.get("keep"), spec["left"], spec.get("of")
        return cls(spec["layer"], spec["axis"], keep, numbers, left, of)

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def served(self) -> bool:
        return self.axis == "channels"

    @property
    def mlp_width(self) -> int | None:
        return self.left if self.axis == "channels" else None

    def trainable(self, family: Family) -> tuple[str, ...]:
        paths = (path for role in ROLES.get(self.axis, ()) for path in family.holding(role))
        return tuple(f"{family.layers}.{self.layer}.{path}.weight" for path in dict.fromkeys(paths))

    def summary(self) -> Summary:
        of = "" if self.of is None else f" of {self.of}"
        text = f"layer {self.layer}: {self.left}{of} {self.axis.replace('_', ' ')} left"
        return Summary("narrowed layers", text, axis=self.axis, left=self.left, of=self.of)
