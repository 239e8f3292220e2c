"""The compression methods. One file is one method is one paper; this folder is the registry."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from typing import Any

from grasp.core.fields import check, hints, shortened
from grasp.errors import RecipeError, did_you_mean
from grasp.methods.base import Method


@functools.cache
def available() -> dict[str, type[Method]]:
    """Name -> method class, of every file in this folder."""
    found: dict[str, type[Method]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Method)
                and value.__module__ == module.__name__
                and hasattr(value, "name")
            ):
                found[value.name] = value
    return dict(sorted(found.items()))


def make(method: str | Method, fields: dict[str, Any]) -> Method:
    """A method by name with its fields, or the method given. Raises `RecipeError` for an unknown
    name or field.
    """
    if isinstance(method, Method):
        if fields:
            raise RecipeError(
                f"fields {', '.join(fields)} go into {type(method).__name__}(...), not beside it"
            )
        return method
    methods = available()
    if method not in methods:
        raise RecipeError(
            f"--method {method}: unknown; allowed:"
            f" {', '.join(methods)}{did_you_mean(method, methods)}"
        )
    known = {field.name: field for field in dataclasses.fields(methods[method])}
    for name in fields:
        if name not in known:
            owners = [
                other
                for other, cls in methods.items()
                if name in {field.name for field in dataclasses.fields(cls)}
            ]
            belongs = f"it belongs to {', '.join(owners)}" if owners else "no method has it"
            raise RecipeError(
                f"--{name.replace('_', '-')}: not a flag of --method {method};"
                f" {belongs}{did_you_mean(name, known)}"
            )
    kinds = hints(methods[method])
    return methods[method](
        **{
            name: check(name, _fitting(name, str(kinds[name]), value), kinds[name])
            for name, value in fields.items()
        }
    )


def _fitting(name: str, kind: str, value: Any) -> Any:
    """`value` as the field has it: lists, and "a,b" for several words, become tuples."""
    if "tuple" not in kind or not isinstance(value, (str, list, tuple)):
        return value
    words = [str(word).strip() for word in (value.split(",") if isinstance(value, str) else value)]
    if "tuple[int" not in kind:
        return tuple(words)
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        given = shortened(",".join(words))
        raise RecipeError(
            f"--{name.replace('_', '-')} {given}: not a list of whole numbers; write it like"
            " 21,22,25"
        ) from None
