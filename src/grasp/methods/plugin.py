"""Methods that grasp does not bring: in a file that the user names (`--plugin FILE`), or in a
package that announces them under the entry point group `grasp.methods`.

A plugin is Python code and is run. So only the command line names one, never a recipe or an
experiment, which may be somebody else's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grasp.errors import RecipeError
from grasp.methods.base import Method

logger = logging.getLogger(__name__)

GROUP = "grasp.methods"
"""Entry points of installed packages: NAME = "package.module:Class"."""


def methods_in(module: Any) -> dict[str, type[Method]]:
    """Name -> class, of the methods that a module itself defines."""
    return {
        value.name: value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
        and hasattr(value, "name")
    }


def read_plugin(path: Path, taken: Iterable[str]) -> dict[str, type[Method]]:
    """Run the user's file; gives its methods. Raises `RecipeError` where it cannot be run, defines
    no method, or one that is not whole or has a name that is `taken`.
    """
    found = methods_in(_module(path))
    if not found:
        raise RecipeError(
            f"--plugin {path}: defines no method; one is a dataclass that inherits grasp.Method and"
            " has a name (docs/guide.md)"
        )
    for name, kind in found.items():
        if name in taken:
            raise RecipeError(
                f"--plugin {path}: a method called '{name}' is there already; give"
                f" {kind.__name__} another name"
            )
        if problem := _not_whole(kind):
            raise RecipeError(f"--plugin {path}: {kind.__name__} {problem}")
    return found


def _module(path: Path) -> Any:
    """The file as a module, run once in a process as long as it stays the same."""
    try:
        source = path.read_bytes()
    except OSError as failure:
        reason = "no such file" if isinstance(failure, FileNotFoundError) else failure.strerror
        raise RecipeError(f"--plugin {path}: {reason}; give a Python file") from None
    digest = hashlib.sha256(str(path.resolve()).encode() + source).hexdigest()
    name = f"grasp_plugin_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses look for the names in annotations
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except BaseException as failure:
        del sys.modules[name]
        if isinstance(failure, (KeyboardInterrupt, GeneratorExit)):
            raise
        raise RecipeError(f"--plugin {path}: {_where(failure, path)}") from failure
    return module


def _where(failure: BaseException, path: Path) -> str:
    """An exception in the user's file on one line, with the line of the file it came from."""
    frames = traceback.extract_tb(failure.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = failure.lineno if isinstance(failure, SyntaxError) else lines[-1] if lines else None
    said = failure.msg if isinstance(failure, SyntaxError) else " ".join(str(failure).split())
    place = "" if line is None else f"line {line}: "
    return f"{place}{type(failure).__name__}{': ' if said else ''}{said[:300]}"


def _not_whole(kind: type[Method]) -> str:
    """What a method lacks, "" where it is whole."""
    if inspect.isabstract(kind):
        return f"lacks {', '.join(sorted(kind.__abstractmethods__))}"
    return "" if hasattr(kind, "paper") else 'lacks paper: ClassVar[str], its address or ""'


@functools.cache
def of_packages() -> dict[str, type[Method]]:
    """Name -> class, of the methods that installed packages announce. One that cannot be loaded is
    a warning.
    """
    found: dict[str, type[Method]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            kind = point.load()
        except Exception as failure:  # whatever a package may raise
            said = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        else:
            is_method = isinstance(kind, type) and issubclass(kind, Method)
            said = _not_whole(kind) if is_method else "is no grasp.Method"
            said = said or ("" if hasattr(kind, "name") else "lacks a name")
        if said:
            logger.warning("entry point %s: %s = %s: %s", GROUP, point.name, point.value, said)
        else:
            found[kind.name] = kind
    return found
