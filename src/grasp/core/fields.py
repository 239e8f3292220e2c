"""Dataclass fields that are flags too: what `--help`, the docs and a saved recipe say about them comes from the field."""

from __future__ import annotations

import dataclasses
from typing import Any


def flag(default: Any, help: str, recipe: bool = True, words: tuple[str, ...] = ()) -> Any:
    """A field with the text that `--help` and the docs show for it.

    `recipe` False: about this machine, not about the result. `words`: the values it may take, where they are few.
    """
    return dataclasses.field(default=default, metadata={"help": help, "recipe": recipe, "words": words})
