"""A span of decoder layers becomes one small module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec import Struct

from grasp.core.edits.base import Edit, Summary, Undo, layer_of
from grasp.core.edits.drop import Index
from grasp.errors import NumericsError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from grasp.core.decoder import Decoder
    from grasp.core.families import Family


class _Spec(Struct):
    path: str
    last: Index


@dataclass(frozen=True)
class Replace(Edit):
    """Put `y = x + Wx + b` in the place of the decoder layers from the one at `path` to `last`.

    `weight` W (hidden, hidden), `bias` b (hidden).
    """

    path: str
    last: int
    weight: Tensor | None = field(repr=False)
    bias: Tensor | None = field(repr=False)

    kind: ClassVar[str] = "replace"
    carried: ClassVar[bool] = True
    schema: ClassVar[type[Struct]] = _Spec

    @property
    def first(self) -> int:
        """Index of the first layer of the span."""
        return layer_of(self.path)

    def apply(self, decoder: Decoder) -> Undo:
        import torch

        from grasp.core.edits.droppable import check_droppable, take_out
        from grasp.core.edits.placing import remember, renumber, sync
        from grasp.core.layers.span_grasp import span_like

        weight, bias = self.weight, self.bias
        if weight is None or bias is None:
            raise RecipeError(
                f"layers {self.first} to {self.last}: this edit was read from a log, without its"
                " tensors"
            )
        self._check(decoder, weight, bias)
        others = list(range(self.first + 1, self.last + 1))
        if others:
            check_droppable(decoder, others)
        position = decoder.kept.index(self.first)
        old = decoder.stack[position]
        new = span_like(old, len(bias), _gives_tuples(decoder, old), decoder.device, decoder.dtype)
        with torch.no_grad():
            new.weight.copy_(weight)
            new.bias.copy_(bias)
        if not bool(torch.isfinite(new.weight).all() and torch.isfinite(new.bias).all()):
            raise NumericsError(
                f"layers {self.first} to {self.last}: the numbers are not finite in"
                f" {new.weight.dtype}; try --dtype float32"
            )
        undo = remember(decoder)
        decoder.stack[position] = new
        for layer in reversed(others):
            take_out(decoder, layer)
        renumber(decoder)
        sync(decoder)
        return undo

    def _check(self, decoder: Decoder, weight: Tensor, bias: Tensor) -> None:
        span = list(range(self.first, self.last + 1))
        if not span or not set(span) <= set(decoder.kept):
            raise RecipeError(
                f"layers {self.first} to {self.last} are not all in the model; it has layers 0 to"
                f" {decoder.num_layers - 1}"
            )
        hidden = decoder.config.hidden_size
        if tuple(weight.shape) != (hidden, hidden) or tuple(bias.shape) != (hidden,):
            raise RecipeError(
                f"layers {self.first} to {self.last}: numbers {tuple(weight.shape)} and"
                f" {tuple(bias.shape)} do not fit the hidden size {hidden}"
            )

    def spec(self) -> dict[str, Any]:
        return {"edit": self.kind, "path": self.path, "last": self.last}

    def tensors(self) -> dict[str, Tensor]:
        found = {"weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Replace:
        return cls(spec["path"], spec["last"], tensors.get("weight"), tensors.get("bias"))

    @property
    def served(self) -> bool:
        return False

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.last + 1))

    def trainable(self, family: Family) -> tuple[str, ...]:
        return (f"{self.path}.weight", f"{self.path}.bias")

    def summary(self) -> Summary:
        text = f"layers {self.first} to {self.last}: one linear map"
        gone = tuple(range(self.first + 1, self.last + 1))
        return Summary("spans replaced", text, gone=gone)


def _gives_tuples(decoder: Decoder, layer: Any) -> bool:
    """Whether the layers of this model return a tuple, found out by one token."""
    import torch

    found: list[bool] = []
    handle = layer.register_forward_hook(
        lambda _module, _args, output: found.append(isinstance(output, tuple))
    )
    try:
        with torch.no_grad():
            decoder.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=decoder.device))
    finally:
        handle.remove()
    return found[0]
