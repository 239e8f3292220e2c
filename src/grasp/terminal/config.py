"""`--config`: a recipe whose values become the defaults of a command's flags.

A recipe may be somebody else's. It sets what its declaration lets it (`grasp.core.fields.flag`),
which is what is computed; all other flags, which grant trust, name what is written, or are about
this machine, are the command line's alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from grasp.core.documents import read_json, read_toml
from grasp.errors import RecipeError, did_you_mean


def recipe_of(path: Path) -> dict[str, Any]:
    """The flags that a .toml recipe or the grasp.json of a checkpoint holds. Raises `RecipeError`
    where it holds none.
    """
    if path.suffix == ".json":
        values = read_json(path, "--config", RecipeError)
        values = values.get("recipe", values) if isinstance(values, dict) else values
    else:
        values = read_toml(path, "--config", "give a .toml recipe or a grasp.json")
    if not isinstance(values, dict):
        raise RecipeError(
            f"--config {path}: holds no table of flags; give a .toml recipe or a grasp.json"
        )
    return values


def read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """`--config`: values of a recipe become defaults; flags given on the command line win."""
    if path is None:
        return None
    values = recipe_of(path)
    known = {
        p.opts[0].lstrip("-").replace("-", "_"): p
        for p in ctx.command.get_params(ctx)
        if p.name not in ("config", "help")
    }
    ctx.default_map = {}
    for key, value in values.items():
        flag = key.replace("-", "_")
        if flag not in known:
            raise RecipeError(
                f"--config {path}: '{key}' is no flag of grasp"
                f" {ctx.info_name}{did_you_mean(flag, known)}"
            )
        if not getattr(known[flag], "recipe", False):
            said = (
                known[flag].human_readable_name
                if isinstance(known[flag], click.Argument)
                else known[flag].opts[0]
            )
            raise RecipeError(
                f"--config {path}: '{key}': only the command line may say {said}, not a recipe;"
                " take the line out"
            )
        ctx.default_map[known[flag].name or ""] = _fits(path, key, value, known[flag])
    return path


_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "integer": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "boolean": ("true or false", (bool,)),
    "text": ("text", (str,)),
    "number or text": ("a number or text", (int, float, str)),
}
"""Types of flags, as click names them: what a recipe may hold for each."""


def _fits(path: Path, key: str, value: Any, param: click.Parameter) -> Any:
    """The value, where it is of the flag's kind: click would make 2 of 2.5, 1 of true and text of
    anything.
    """
    words, types = _KINDS.get(param.type.name, ("a list, or text", (str, int)))
    for one in value if param.type.name not in _KINDS and isinstance(value, list) else [value]:
        if isinstance(one, str) and "\0" in one:
            raise RecipeError(f"--config {path}: '{key}': holds a NUL character, which no text can")
        if isinstance(one, types) and (not isinstance(one, bool) or bool in types):
            continue
        raise RecipeError(f"--config {path}: '{key}': must be {words}, not {one!r}")
    return value
