"""Flags read off declarations: one option for each field of a dataclass, with its help, its default
and its type, in a group of its own.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from grasp.core.fields import REQUIRED, Declared, choices, declared, plain_type
from grasp.recipes.part import Part


class Flag(click.Option):
    """An option that knows whether a recipe may set it (`recipe`), and in which group `--help`
    shows it.
    """

    def __init__(self, *args: Any, recipe: bool = False, group: str = "", **options: Any):
        super().__init__(*args, **options)
        self.recipe, self.group = recipe, group


class Argument(click.Argument):
    """An argument that knows whether a recipe may name it."""

    def __init__(self, *args: Any, recipe: bool = False, **options: Any):
        super().__init__(*args, **options)
        self.recipe = recipe


class Grouped(click.Command):
    """A command whose `--help` shows every group of flags under its title, those without one at
    the end.
    """

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        rest: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            title = getattr(param, "group", "")
            if record is not None:
                (groups.setdefault(title, []) if title else rest).append(record)
        for title, records in {**groups, "Options" if not groups else "Others": rest}.items():
            with formatter.section(title):
                self.before_flags(title, ctx, formatter)
                formatter.write_dl(records, col_max=24)

    def before_flags(self, title: str, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What a command says under the title of a group."""


class Place(click.Path):
    """A file or folder, in which `~` is the home folder, quoted or not."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if "\0" in os.fspath(value):
            self.fail(f"{value!r} holds a NUL character, which no path can", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class Words(click.ParamType):  # type: ignore[type-arg]
    """A comma-separated list, also accepted as a TOML or JSON list; the field says what its places
    may be.
    """

    def __init__(self, of: type):
        self.name = f"{of.__name__},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        listed = isinstance(value, (list, tuple))
        parts = [str(part).strip() for part in (value if listed else str(value).split(","))]
        if value and "" in parts:
            said = "write it like a,b, or leave the flag out"
            self.fail(f"'{value}' has an empty place in the list; {said}", param, ctx)
        return tuple(parts) if value else ()


class NumberOrWord(click.ParamType):  # type: ignore[type-arg]
    """A number or one of a few words, also of TOML or JSON; the field says which it may be."""

    name = "number or text"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value


def option(one: Declared, group: str, hidden: bool = False) -> Flag:
    """The option of a field. It says nothing where it is not given: the default is the
    declaration's.
    """
    text, default = one.help, one.default
    shown = default is not None and default is not False and default != ()
    if shown and default is not REQUIRED:
        said = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{text}  [default: {said}]".strip()
    told: dict[str, Any] = {
        "default": None,
        "help": text,
        "group": group,
        "recipe": one.recipe,
        "hidden": hidden,
    }
    if plain_type(one.kind) is bool:
        return Flag([one.flag], is_flag=True, **told)
    words = "|".join(map(str, one.words)) if len(str(one.words)) < 60 else "NAME"
    return Flag(
        [one.flag],
        type=_click_type(one.kind),
        required=default is REQUIRED,
        metavar=one.metavar or words or None,
        **told,
    )


def _click_type(kind: Any) -> Any:
    found = plain_type(kind)
    if choices(kind):
        return NumberOrWord()
    if typing.get_origin(found) is tuple:
        return Words(plain_type(typing.get_args(found)[0]))
    return Place() if found == str | Path else found


def flags(part: type[Part], *names: str, group: str = "") -> Callable[[Any], Any]:
    """Add the flags of a part to a command, or those that are named; in the part's own group, if
    no other is named.
    """
    chosen = [
        one
        for name, one in declared(part).items()
        if one.flag.startswith("--") and not one.python and (not names or name in names)
    ]

    def decorate(function: Any) -> Any:
        for one in reversed(chosen):
            add(function, option(one, group or part.title))
        return function

    return decorate


def argument(part: type[Part], name: str) -> Callable[[Any], Any]:
    """Add a required field of a part to a command as an argument."""
    one = declared(part)[name]
    return click.argument(name, cls=Argument, recipe=one.recipe)


def add(function: Any, param: click.Parameter) -> None:
    """Give a command a parameter, in front of those it has: decorators are read from below."""
    function.__dict__.setdefault("__click_params__", []).append(param)


_EVERYWHERE = (
    click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout."
    ),
    click.option("--quiet", is_flag=True, help="No progress bars."),
    click.option(
        "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
    ),
)


def everywhere(function: Any) -> Any:
    """Add the options that every command has."""
    for one in reversed(_EVERYWHERE):
        function = one(function)
    return function


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; the others are left to their declarations."""
    return {name: value for name, value in options.items() if value is not None}
