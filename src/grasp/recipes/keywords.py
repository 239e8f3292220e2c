"""Keyword arguments of the Python functions, read off the recipes' declarations.

    @keywords
    def compress(source: ModelSource, out=None, *, calibration: CalibrationRecipe, **fields): ...

    compress("smollm2", "small", num_samples=8, seed=1, ratio=0.2)

A function says which parts it takes; whoever calls it gives their fields one by one, as flags would
be given. `help()` and `inspect.signature` show the fields, with types and defaults.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, TypeVar

from grasp.core.fields import REQUIRED, checked, declared, hints, named
from grasp.errors import RecipeError, did_you_mean
from grasp.recipes.part import Part, made

R = TypeVar("R")


def keywords(function: Callable[..., R]) -> Callable[..., R]:
    """`function`, called with the fields of its parts in place of the parts; its other arguments
    are checked too (`grasp.core.fields.checked`).

    Raises `RecipeError` for a value that its field refuses, and for a keyword that there is not.
    """
    parts: dict[str, type[Part]] = {
        name: kind
        for name, kind in hints(function).items()
        if name != "return" and isinstance(kind, type) and issubclass(kind, Part)
    }
    signature = _unfolded(inspect.signature(function), parts)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    call = checked(function)

    @functools.wraps(function)
    def begin(*args: Any, **options: Any) -> R:
        unknown = [] if rest else [name for name in options if name not in signature.parameters]
        if unknown:
            raise RecipeError(
                f"{named(unknown[0])}: grasp.{function.__name__} has no such argument"
                f"{did_you_mean(unknown[0], signature.parameters)}"
            )
        given = signature.bind(*args, **options).arguments
        more = given.pop(rest, {})
        records = {
            name: made(part, {one: given.pop(one) for one in declared(part) if one in given})
            for name, part in parts.items()
        }
        return call(**records, **given, **more)

    begin.__signature__ = signature  # type: ignore[attr-defined]
    begin.__doc__ = _told(function.__doc__, parts.values())
    return begin


def _unfolded(own: inspect.Signature, parts: dict[str, type[Part]]) -> inspect.Signature:
    """The signature with every part's fields in its place: required ones where the part
    stands, the others by keyword.
    """
    placed: list[Parameter] = []
    for parameter in own.parameters.values():
        if parameter.name not in parts:
            placed.append(parameter)
            continue
        for one in declared(parts[parameter.name]).values():
            required = one.default is REQUIRED
            placed.append(
                Parameter(
                    one.name,
                    parameter.kind if required else Parameter.KEYWORD_ONLY,
                    default=Parameter.empty if required else one.default,
                    annotation=one.kind,
                )
            )
    return own.replace(parameters=sorted(placed, key=lambda parameter: parameter.kind))


def _told(doc: str | None, parts: Any) -> str:
    """The docstring with a line for every field of the parts."""
    lines = [inspect.cleandoc(doc or "")]
    for part in parts:
        lines += ["", f"{part.title}: {' '.join(inspect.cleandoc(part.__doc__ or '').split())}"]
        lines += [f"    {name}: {one.help}" for name, one in declared(part).items()]
    return "\n".join(lines)
