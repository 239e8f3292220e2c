"""The compression methods. One file is one method is one paper; this folder is the registry, beside
what packages and a user's file bring (plugin.py).
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grasp.core.fields import check, declared, named, shortened
from grasp.errors import RecipeError, did_you_mean
from grasp.methods.base import Method
from grasp.methods.plugin import methods_in, of_packages, read_plugin

logger = logging.getLogger(__name__)


@functools.cache
def available() -> dict[str, type[Method]]:
    """Name -> method class, of every file in this folder, then of installed packages."""
    own: dict[str, type[Method]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        own |= methods_in(importlib.import_module(f"{__name__}.{module_info.name}"))
    more = of_packages()
    for name in own.keys() & more.keys():
        logger.warning(
            "%s.%s: a method called '%s' is in grasp already, which is taken",
            more[name].__module__,
            more[name].__name__,
            name,
        )
    return dict(sorted({**more, **own}.items()))


def known(plugin: str | Path | None = None) -> dict[str, type[Method]]:
    """All there are, those of a user's file among them. Raises `RecipeError` for a file that is no
    plugin.
    """
    own = available()
    return own if plugin is None else {**own, **read_plugin(Path(plugin), own)}


def class_of(name: str, plugin: str | Path | None = None) -> type[Method]:
    """The method's class. Raises `RecipeError` for a name that there is not."""
    methods = known(plugin)
    if name not in methods:
        raise RecipeError(
            f"--method {shortened(name)}: unknown; allowed:"
            f" {', '.join(methods)}{did_you_mean(str(name), methods)}"
        )
    return methods[name]


def make(
    method: str | Method,
    fields: dict[str, Any],
    beside: Iterable[str] = (),
    plugin: str | Path | None = None,
) -> Method:
    """A method by name with its fields, or the method given. `beside`: what else the caller takes,
    one of which a wrong name may have meant. `plugin`: a file with methods.

    Raises `RecipeError` for an unknown name, field or value.
    """
    if isinstance(method, Method):
        if fields:
            raise RecipeError(
                f"fields {', '.join(fields)} go into {type(method).__name__}(...), not beside it"
            )
        return method
    chosen = class_of(method, plugin)
    own = declared(chosen)
    for name in fields:
        if name not in own:
            owners = [one for one, cls in known(plugin).items() if name in declared(cls)]
            belongs = f"it belongs to {', '.join(owners)}" if owners else "no method has it"
            raise RecipeError(
                f"{named(name)}: not a flag of --method {method};"
                f" {belongs}{did_you_mean(name, [*own, *beside])}"
            )
    return chosen(**{name: check(name, value, own[name].kind) for name, value in fields.items()})
