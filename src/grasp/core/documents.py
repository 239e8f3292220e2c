"""Documents from outside: read, and checked against a schema, once, where they come in. Behind that
the types hold.

A document is JSON or TOML that a user, another tool or an older grasp wrote. Whatever is wrong with
one is one line that names the file and the place in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from grasp.errors import CheckpointError, GraspError, RecipeError

MANIFEST = "grasp.json"
"""What grasp says of a checkpoint, beside the weights; its contents: `grasp.core.manifest`."""

T = TypeVar("T")


def read_json(
    path: Path, flag: str = "", error: type[GraspError] = CheckpointError, hint: str = ""
) -> Any:
    """The values of a JSON file. `flag`: what named it; `hint`: the way out. Raises `error`."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as failure:
        raise error(_line(path, flag, f"cannot be read ({_reason(failure)})", hint)) from failure


def read_toml(path: Path, flag: str = "", hint: str = "") -> dict[str, Any]:
    """The values of a TOML file. Raises `RecipeError`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as failure:
        raise RecipeError(
            _line(path, flag, f"cannot be read: {_reason(failure)}", hint)
        ) from failure


def check(
    path: Path,
    values: Any,
    kind: type[T],
    hint: str = "",
    error: type[GraspError] = CheckpointError,
    at: str = "",
) -> T:
    """`values` as `kind`. Raises `error`: the file, the place in it, what is there and what should
    be. `at`: where the values are in the file.
    """
    try:
        return msgspec.convert(values, kind)
    except (msgspec.ValidationError, RecursionError) as failure:
        what, _, place = str(failure).rpartition(" - at `")
        place = place.rstrip("`").removeprefix("$") if what else ""
        place = f"{at}{place}".removeprefix(".")
        raise error(
            _line(path, "", f"{place}: {what or failure}" if place else str(failure), hint)
        ) from failure


def _line(path: Path, flag: str, said: str, hint: str) -> str:
    return f"{flag} {path}: {said}{'; ' if hint else ''}{hint}".strip()


def _reason(failure: BaseException) -> str:
    """What is wrong, without the path, which is said already."""
    if isinstance(failure, RecursionError):
        return "too deeply nested"
    return str(getattr(failure, "strerror", None) or failure)
