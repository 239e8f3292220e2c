"""How much memory a run may take, and where the rest of the model is meanwhile."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from grasp.core.fields import Place, flag, shortened
from grasp.errors import RecipeError
from grasp.recipes.part import Part

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30}
"""Bytes of what stands before the B."""
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]|[kmg]i)?b?", re.IGNORECASE)


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_memory is not None and not self.most:
            raise RecipeError(
                f"--max-memory {shortened(self.max_memory)}: not a size; write it like 8GB or 300MB"
            )

    @property
    def most(self) -> int | None:
        """`max_memory` in bytes; None where it is not given, 0 where it is no size."""
        if self.max_memory is None:
            return None
        found = SIZE.fullmatch(self.max_memory.strip())
        return int(float(found[1]) * UNITS[(found[2] or "").lower()]) if found else 0
