"""A part of what a run is asked to do: a frozen dataclass, declared once.

    the command line    `grasp.terminal.flags.flags(Part)` makes its flags
    Python              `grasp.recipes.keywords.keywords` makes its keyword arguments
    TOML                `keys(Part)` are what a table may hold, or a recipe set

All three read `grasp.core.fields.declared`, and whatever comes in is checked when the record is
made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from grasp.core.fields import REQUIRED, check, check_fields, declared


@dataclass(frozen=True, kw_only=True)
class Part:
    """Base of all parts. `title`: of the group its flags stand in, in `--help`.

    Raises `RecipeError`: the flag, the value, what is allowed.
    """

    title: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)


P = TypeVar("P", bound=Part)


def made(part: type[P], values: dict[str, Any]) -> P:
    """A part from values as they come: texts with commas, lists, numbers of numpy."""
    known = declared(part)
    return part(**{name: check(name, value, known[name].kind) for name, value in values.items()})


def keys(part: type[Part]) -> dict[str, Any]:
    """Key -> type of all that a file may say of a part."""
    return {name: one.kind for name, one in declared(part).items() if one.recipe}


def only_command_line(part: type[Part]) -> dict[str, str]:
    """Field -> flag of what a file, which may be somebody else's, may not say."""
    return {
        name: one.flag for name, one in declared(part).items() if not one.recipe and not one.python
    }


def defaults(part: type[Part]) -> dict[str, Any]:
    """Field -> default, of those that have one other than None."""
    return {
        name: one.default
        for name, one in declared(part).items()
        if one.default is not None and one.default is not REQUIRED
    }
