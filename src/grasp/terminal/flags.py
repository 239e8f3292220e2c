"""The flags of the command line: those the commands share, those read off the methods, and recipes
as defaults.

A recipe may be somebody else's. It sets the flags that are declared as `RecipeOption`, which say
what is computed; all others, which grant trust, name what is written, or are about this machine,
are the command line's alone.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from grasp.errors import RecipeError, did_you_mean


class RecipeOption(click.Option):
    """A flag that a recipe may set too."""


class RecipeArgument(click.Argument):
    """An argument that a recipe may name too."""


class Place(click.Path):
    """A file or folder, in which `~` is the home folder, quoted or not."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if "\0" in os.fspath(value):
            self.fail(f"{value!r} holds a NUL character, which no path can", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class Words(click.ParamType):  # type: ignore[type-arg]
    """A comma-separated list, also accepted as a TOML or JSON list."""

    def __init__(self, of: type):
        self.of, self.name = of, f"{of.__name__},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        parts = (
            value
            if isinstance(value, (list, tuple))
            else [word.strip() for word in str(value).split(",")]
            if value
            else []
        )
        if "" in parts:
            self.fail(
                f"'{value}' has an empty place in the list; write it like a,b, or leave the"
                " flag out",
                param,
                ctx,
            )
        try:
            return tuple(self.of(part) for part in parts)
        except ValueError:
            self.fail(
                f"'{value}' is not a list of {self.of.__name__}; write it like 21,22,25", param, ctx
            )


class MethodCommand(click.Command):
    """`grasp compress`: its own flags, then one flag for each field of every method, read off the
    methods when it runs.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        taken = {param.name for param in own}
        return [*own, *(option for option in _method_options() if option.name not in taken)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Two lists: the flags of the methods, then those of the command."""
        method_flags = {option.name for option in _method_options()}
        lists: dict[str, list[tuple[str, str]]] = {
            "Method flags (each names the methods it belongs to)": [],
            "Options": [],
        }
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                lists["Options" if param.name not in method_flags else next(iter(lists))].append(
                    record
                )
        for title, records in lists.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _method_options() -> list[click.Option]:
    from grasp.methods import available

    helps: dict[str, dict[str, list[str]]] = {}
    kinds: dict[str, Any] = {}
    recipe: dict[str, bool] = {}
    for name, method in available().items():
        hints = typing.get_type_hints(method)
        for field in dataclasses.fields(method):
            helps.setdefault(field.name, {}).setdefault(field.metadata["help"], []).append(name)
            recipe[field.name] = recipe.get(field.name, True) and field.metadata["recipe"]
            kind = kinds.setdefault(field.name, hints[field.name])
            if kind != hints[field.name] and "tuple" in str(kind):
                kinds[field.name] = tuple[str, ...]  # the method chosen says what the words may be
    options: list[click.Option] = []
    for name, kind in kinds.items():
        option = RecipeOption if recipe[name] else click.Option
        text = " ".join(f"[{', '.join(owners)}] {text}" for text, owners in helps[name].items())
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            options.append(option([flag], is_flag=True, default=None, help=text))
        else:
            options.append(option([flag], type=_click_type(kind), default=None, help=text))
    return options


class RecipeCommand(click.Command):
    """`grasp recover`: its own flags, then one flag for each field of the recipe, read off it when
    it runs.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from grasp.compensation.recipe import Recipe

        own = super().get_params(ctx)
        taken = {param.name for param in own}
        hints, options = typing.get_type_hints(Recipe), []
        for field in dataclasses.fields(Recipe):
            text, flag = field.metadata["help"], f"--{field.name.replace('_', '-')}"
            if field.name in taken:
                continue
            if hints[field.name] is bool:
                options.append(click.Option([flag], is_flag=True, default=None, help=text))
                continue
            said = "" if field.default is None else f"  [default: {field.default}]"
            words = field.metadata["words"]
            kind = _click_type(hints[field.name])
            options.append(
                click.Option(
                    [flag],
                    type=kind,
                    default=None,
                    help=text + said,
                    metavar="|".join(words) or None,
                )
            )
        return [*own, *options]


def _click_type(kind: Any) -> Any:
    plain = (
        next((k for k in typing.get_args(kind) if k is not type(None)), kind)
        if type(None) in typing.get_args(kind)
        else kind
    )
    if typing.get_origin(plain) is tuple:
        return Words(typing.get_args(plain)[0])
    return plain


def read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """`--config`: values of a recipe become defaults; flags given on the command line win."""
    if path is None:
        return None
    from grasp.core.documents import read_json, read_toml

    if path.suffix == ".json":
        values = read_json(path, "--config", RecipeError)
        values = values.get("recipe", values) if isinstance(values, dict) else values
    else:
        values = read_toml(path, "--config", "give a .toml recipe or a grasp.json")
    if not isinstance(values, dict):
        raise RecipeError(
            f"--config {path}: holds no table of flags; give a .toml recipe or a grasp.json"
        )
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
        if not isinstance(known[flag], (RecipeOption, RecipeArgument)):
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


_OPTIONS: dict[str, Callable[..., Any]] = {
    "data": click.option(
        "--data",
        cls=RecipeOption,
        default="pydoc",
        show_default=True,
        help=(
            "Calibration text: a named set (see `grasp data`), a file, self or pydoc; several,"
            " separated by commas, are mixed."
        ),
    ),
    "text_field": click.option(
        "--text-field",
        cls=RecipeOption,
        help="Column of the text in .jsonl, .json, .csv or .parquet files.",
    ),
    "seed": click.option(
        "--seed",
        cls=RecipeOption,
        type=int,
        default=0,
        show_default=True,
        help="Draws the calibration blocks.",
    ),
    "device": click.option(
        "--device", help="cpu, cuda, cuda:1, mps; default: cuda if there is one."
    ),
    "dtype": click.option(
        "--dtype", cls=RecipeOption, help="float32, bfloat16 or float16; default: as stored."
    ),
    "trust": click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run Python code that the model repository brings.",
    ),
    "json": click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout."
    ),
    "quiet": click.option("--quiet", is_flag=True, help="No progress bars."),
    "debug": click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
    ),
}


def shared(*names: str) -> Callable[[Any], Any]:
    """Add options that several commands share, by name, in this order."""

    def decorate(function: Any) -> Any:
        for name in reversed((*names, "json", "quiet", "debug")):
            function = _OPTIONS[name](function)
        return function

    return decorate
