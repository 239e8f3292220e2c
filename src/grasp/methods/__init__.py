"""The compression methods. One file is one method is one paper; this folder is the registry."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

from grasp.core.fields import check, declared, named, shortened
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


def class_of(name: str) -> type[Method]:
    """The method's class. Raises `RecipeError` for a name that there is not."""
    methods = available()
    if name not in methods:
        raise RecipeError(
            f"--method {shortened(name)}: unknown; allowed:"
            f" {', '.join(methods)}{did_you_mean(str(name), methods)}"
        )
    return methods[name]


def make(method: str | Method, fields: dict[str, Any], beside: Iterable[str] = ()) -> Method:
    """A method by name with its fields, or the method given. `beside`: what else the caller takes,
    one of which a wrong name may have meant.

    Raises `RecipeError` for an unknown name, field or value.
    """
    if isinstance(method, Method):
        if fields:
            raise RecipeError(
                f"fields {', '.join(fields)} go into {type(method).__name__}(...), not beside it"
            )
        return method
    known = declared(class_of(method))
    for name in fields:
        if name not in known:
            owners = [other for other, cls in available().items() if name in declared(cls)]
            belongs = f"it belongs to {', '.join(owners)}" if owners else "no method has it"
            raise RecipeError(
                f"{named(name)}: not a flag of --method {method};"
                f" {belongs}{did_you_mean(name, [*known, *beside])}"
            )
    given = {name: check(name, value, known[name].kind) for name, value in fields.items()}
    return class_of(method)(**given)
