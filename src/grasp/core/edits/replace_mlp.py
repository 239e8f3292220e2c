"""A span of decoder layers becomes one small MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from grasp.core.edits.replace import Span

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ReplaceMLP(Span):
    """Put `y = x + down silu(up x / rms(x))` in the place of the decoder layers from the one at
    `path` to `last`.

    `up` (width, hidden), `down` (hidden, width).
    """

    path: str
    last: int
    up: Tensor | None = field(repr=False)
    down: Tensor | None = field(repr=False)

    kind: ClassVar[str] = "replace-mlp"
    what: ClassVar[str] = "one MLP"
    names: ClassVar[tuple[str, ...]] = ("up", "down")

    def empty(self, hidden: int, as_tuple: bool, device: Any, dtype: Any) -> Any:
        from grasp.core.layers.span_grasp import MLPSpan

        width = 0 if self.up is None else len(self.up)
        self.check_shapes(hidden, {"up": (width, hidden), "down": (hidden, width)})
        return MLPSpan(hidden, width, as_tuple, device, dtype)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ReplaceMLP:
        return cls(spec["path"], spec["last"], tensors.get("up"), tensors.get("down"))
