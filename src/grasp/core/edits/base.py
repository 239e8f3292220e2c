"""What an edit is, and how to try one.

An edit names places by the paths and indices of the model as it was loaded, so edits can be listed,
logged and repeated in any tool. After every edit the model in memory is a complete Hugging Face
model: it runs, generates and saves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from msgspec import Struct

if TYPE_CHECKING:  # reading a log of edits needs no torch
    from torch import Tensor

    from grasp.core.decoder import Decoder
    from grasp.core.families import Family

Undo = Callable[[], None]
"""Makes the model what it was before the edit, the very modules and weights."""


@dataclass(frozen=True)
class Summary:
    """An edit for people. `what`: its kind, one of many that are counted; `text`: in one line.

    `path`, `rank`, `pivoted`: of a matrix that became low-rank. `axis`, `left`, `of`: of a layer
    that became narrower, how many are left of how many; `of` None where that is not known. `gone`:
    decoder layers that are no more.
    """

    what: str
    text: str
    path: str = ""
    rank: int | None = None
    pivoted: bool = False
    axis: str = ""
    left: int = 0
    of: int | None = None
    gone: tuple[int, ...] = ()


class Edit(ABC):
    """One change of a model. Subclasses are frozen dataclasses, one a file; `KINDS` lists them.

    `from_spec(edit.spec(), edit.tensors())` is the same edit again. An edit that was read from a
    log has no tensors: it says what was done, and cannot be applied.
    """

    kind: ClassVar[str]
    carried: ClassVar[bool] = False
    """Whether it leaves a module of ours, so that a checkpoint carries our files."""
    schema: ClassVar[type[Struct]]
    """What `spec` holds beside "edit"; checked wherever a log is read."""

    @abstractmethod
    def apply(self, decoder: Decoder) -> Undo:
        """Carry it out. Returns how to undo it, which may be forgotten.

        Raises `RecipeError` where it names something that is not there or lacks its tensors,
        `NumericsError` for numbers that are not finite, both before anything is changed.
        """

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON that, with `tensors`, repeats the edit: {"edit": kind, ...}."""

    def tensors(self) -> dict[str, Tensor]:
        """The numbers it puts into the model, by name."""
        return {}

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        """The inverse of `spec` and `tensors`."""

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Indices of the decoder layers that it touches."""

    @property
    def served(self) -> bool:
        """Whether vLLM serves what it leaves."""
        return True

    @property
    def mlp_width(self) -> int | None:
        """Channels that its layer's MLP has left, where that is all that it changed; else None."""
        return None

    def trainable(self, family: Family) -> tuple[str, ...]:
        """Paths of the parameters that it put into a model of `family`, which a training afterwards
        may adjust.
        """
        return ()

    @abstractmethod
    def summary(self) -> Summary:
        """What was done, for people."""


@contextmanager
def trial(decoder: Decoder, edit: Edit) -> Iterator[None]:
    """The edited model inside the block; afterwards the model as it was, also after an error."""
    undo = edit.apply(decoder)
    try:
        yield
    finally:
        undo()


def layer_of(path: str) -> int:
    """3 of `model.layers.3.mlp.up_proj`; -1 of a path outside the layers."""
    place = place_of(path)
    return -1 if place is None else place[0]


def place_of(path: str) -> tuple[int, str] | None:
    """(3, "mlp.up_proj") of `model.layers.3.mlp.up_proj`; None of a path outside the layers."""
    parts = path.split(".")
    place = next((number for number, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else (int(parts[place]), ".".join(parts[place + 1 :]))
