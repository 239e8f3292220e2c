"""A matrix in few bits out of tensors that come one by one, in any order. Plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from grasp.core.layers.packing_grasp import INTEGERS, ZEROS, check_stored, layout
from grasp.serving.stored import Stored


@dataclass
class Gathering:
    """The stored tensors of one matrix (rows, columns), called `name` in the module at `path`
    (`packing_grasp`).
    """

    path: str
    name: str
    shape: tuple[int, int]
    scheme: str
    group_size: int
    _parts: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def take(self, name: str, tensor: Tensor) -> Stored | None:
        """The matrix once all its tensors are here. Raises `ValueError` for one that
        it does not have, or of another shape or type.
        """
        shapes = layout(self.name, *self.shape, self.scheme, self.group_size)
        if name not in shapes:
            raise ValueError(
                f"{self.path}: the checkpoint has a '{name}', but config.json says {self.scheme}"
            )
        check_stored(f"{self.path}.{name}", tensor, shapes[name], self.scheme)
        self._parts[name] = tensor
        if len(self._parts) < len(shapes):
            return None
        parts, self._parts = self._parts, {}
        numbers = (parts[self.name + INTEGERS], parts[self.name], parts.get(self.name + ZEROS))
        return Stored(*numbers, self.scheme, self.shape[1], self.group_size)
