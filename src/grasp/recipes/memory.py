"""How much memory a run may take, and where the rest of the model is meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grasp.core.fields import Place, flag, shortened
from grasp.core.sizes import bytes_of
from grasp.errors import RecipeError
from grasp.recipes.part import Part


@dataclass(frozen=True, kw_only=True)
class MemoryRecipe(Part):
    """What `grasp.verbs.preflight` goes by."""

    title: ClassVar[str] = "Memory"

    max_memory: str | None = flag(
        None,
        "Memory that the run may take beside Python's own, e.g. 8GB; the decoder layers stay on the"
        " disk where the model does not fit. Default: what is free.",
        recipe=False,
    )
    offload: Place | None = flag(
        None,
        "Leave the decoder layers on the disk in any case, and keep what changes in this folder"
        " (where the model does not fit: beside OUT).",
        recipe=False,
    )

    fsdp: bool = flag(
        False,
        "Under torchrun: the processes share the weights of the decoder layers, and put a layer"
        " together when it is its turn.",
        recipe=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_memory is not None and not self.most:
            raise RecipeError(
                f"--max-memory {shortened(self.max_memory)}: not a size; write it like 8GB or 300MB"
            )

    @property
    def most(self) -> int | None:
        """`max_memory` in bytes; None where it is not given, 0 where it is no size."""
        return None if self.max_memory is None else bytes_of(self.max_memory)
