"""Which method. Its own fields are its flags and are declared in its file (`grasp.methods`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grasp.core.fields import Name, PathLike, flag
from grasp.recipes.part import Part


@dataclass(frozen=True, kw_only=True)
class MethodChoice(Part):
    """The method by name; in Python also a `Method` with its fields. A plugin is code, so only the
    command line and Python name one.
    """

    title: ClassVar[str] = "Method"

    method: Name = flag("grasp-fisher", "Compression method (see `grasp methods`).", metavar="NAME")
    plugin: PathLike | None = flag(
        None, "Run a Python file of yours and offer its methods too.", recipe=False, metavar="FILE"
    )
