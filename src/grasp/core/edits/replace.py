"""A span of decoder layers becomes one small module: a linear map. Others derive from `Span`."""

from __future__ import annotations

from abc import abstractmethod
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


class Span(Edit):
    """Base of the edits that put one small module in the place of the decoder layers from the one
    at `path` to `last`. What it holds are the fields of the subclass.
    """

    path: str
    last: int

    carried: ClassVar[bool] = True
    schema: ClassVar[type[Struct]] = _Spec
    what: ClassVar[str]
    """What the layers become, for people."""
    names: ClassVar[tuple[str, ...]]
    """Of its numbers, which are the module's parameters."""

    @abstractmethod
    def empty(self, hidden: int, as_tuple: bool, device: Any, dtype: Any) -> Any:
        """The module without its numbers. Raises `RecipeError` where these do not fit the hidden
        size.
        """

    @property
    def first(self) -> int:
        """Index of the first layer of the span."""
        return layer_of(self.path)

    @property
    def _shown(self) -> str:
        return f"layers {self.first} to {self.last}"

    def apply(self, decoder: Decoder) -> Undo:
        import torch

        from grasp.core.edits.droppable import check_droppable, take_out
        from grasp.core.edits.placing import remember, renumber, sync
        from grasp.core.layers.span_grasp import in_place_of

        numbers = self.tensors()
        if len(numbers) < len(self.names):
            raise RecipeError(f"{self._shown}: this edit was read from a log, without its tensors")
        span = list(range(self.first, self.last + 1))
        if not span or not set(span) <= set(decoder.kept):
            raise RecipeError(
                f"{self._shown} are not all in the model; it has layers 0 to"
                f" {decoder.num_layers - 1}"
            )
        hidden, position = decoder.config.hidden_size, decoder.kept.index(self.first)
        old = decoder.stack[position]
        self.empty(hidden, False, "meta", decoder.dtype)
        if span[1:]:
            check_droppable(decoder, span[1:])
        as_tuple = gives_tuples(decoder, old)
        new = in_place_of(old, self.empty(hidden, as_tuple, decoder.device, decoder.dtype))
        for name, parameter in new.named_parameters():
            with torch.no_grad():
                parameter.copy_(numbers[name])
            if not bool(torch.isfinite(parameter).all()):
                raise NumericsError(
                    f"{self._shown}: the numbers are not finite in {parameter.dtype}; try --dtype"
                    " float32"
                )
        undo = remember(decoder)
        decoder.stack[position] = new
        for layer in reversed(span[1:]):
            take_out(decoder, layer)
        renumber(decoder)
        sync(decoder)
        return undo

    def check_shapes(self, hidden: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `RecipeError` where the numbers are of other shapes than these, by name."""
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        if found != dict(shapes):
            raise RecipeError(
                f"{self._shown}: numbers {' and '.join(map(str, found.values()))} do not fit the"
                f" hidden size {hidden}"
            )

    def spec(self) -> dict[str, Any]:
        return {"edit": self.kind, "path": self.path, "last": self.last}

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in self.names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def served(self) -> bool:
        return False

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.last + 1))

    def trainable(self, family: Family) -> tuple[str, ...]:
        return tuple(f"{self.path}.{name}" for name in self.names)

    def summary(self) -> Summary:
        gone = tuple(range(self.first + 1, self.last + 1))
        return Summary("spans replaced", f"{self._shown}: {self.what}", gone=gone)


@dataclass(frozen=True)
class Replace(Span):
    """Put `y = x + Wx + b` in the place of the decoder layers from the one at `path` to `last`.

    `weight` W (hidden, hidden), `bias` b (hidden).
    """

    path: str
    last: int
    weight: Tensor | None = field(repr=False)
    bias: Tensor | None = field(repr=False)

    kind: ClassVar[str] = "replace"
    what: ClassVar[str] = "one linear map"
    names: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def empty(self, hidden: int, as_tuple: bool, device: Any, dtype: Any) -> Any:
        from grasp.core.layers.span_grasp import LinearSpan

        self.check_shapes(hidden, {"weight": (hidden, hidden), "bias": (hidden,)})
        return LinearSpan(hidden, as_tuple, device, dtype)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Replace:
        return cls(spec["path"], spec["last"], tensors.get("weight"), tensors.get("bias"))


def gives_tuples(decoder: Decoder, layer: Any) -> bool:
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
