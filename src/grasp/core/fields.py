"""Values from outside: what a flag, a field or an argument may hold is declared once, in its type,
and checked in one place.

    num_samples: NumSamples = 64            an argument of a function that is `@checked`
    ratio: Share | None = flag(None, "...") a field of a dataclass whose `__post_init__` calls
        `check_fields`
    strength: float = 0.5                   the same without a text or a range
    kind: Literal["a", "b"] = "a"           the same with the words it may be
    kind: Share | Literal["a", "b"] = 0.5   a number, or one of these words

`declared` reads all of it back, for whoever makes flags, keyword arguments, keys of TOML or docs.

The command line, keyword arguments, recipes and experiments all come through here, so none of them
lets in what the others refuse. NaN and infinities lie in no range. Paths are text in which `~` is
the home folder.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import msgspec
from msgspec import Meta

from grasp.errors import RecipeError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")

Share = Annotated[float, Meta(ge=0, lt=1)]
Speedup = Annotated[float, Meta(gt=1, le=1_000)]
NumSamples = Annotated[int, Meta(ge=1, le=1_000_000)]
NumTokens = Annotated[int, Meta(ge=1, le=1 << 24)]
SeqLen = Annotated[int, Meta(ge=2, le=1 << 24)]
"""Models of ten million positions exist; none of more."""
Seed = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
"""Numpy's range, which is the smallest of those that are seeded."""
NumLayers = Annotated[int, Meta(ge=0, le=10_000)]
RankMultiple = Annotated[int, Meta(ge=1, le=65_536)]
BatchSize = Annotated[int, Meta(ge=1, le=65_536)]
Rounds = Annotated[int, Meta(ge=1, le=10_000)]
Count = Annotated[int, Meta(ge=1, le=1_000_000_000)]
"""Of rows, blocks or steps."""
CountFrom0 = Annotated[int, Meta(ge=0, le=1_000_000_000)]
"""The same, or 0."""
NumFewshot = Annotated[int, Meta(ge=0, le=1_000)]

IS_PATH = "path"
Place = Annotated[str, IS_PATH]
"""A file or folder; in a field of a dataclass."""
PathLike = Annotated[str | Path, IS_PATH]
"""A file or folder; in an argument of a function."""

IS_NAME = "name"
Name = Annotated[Any, IS_NAME]
"""Text that names a thing (a text, a method); Python may give the thing itself, which is checked
where it is used.
"""
NamedPath = Annotated[Any, IS_NAME, IS_PATH]
"""The same, and the text may be a path."""
REQUIRED: Any = dataclasses.MISSING
"""The default of a field that has none."""


def flag(
    default: Any,
    help: str,
    recipe: bool = True,
    words: tuple[Any, ...] = (),
    metavar: str = "",
    python: bool = False,
) -> Any:
    """A field with the text that `--help` and the docs show for it.

    `recipe` False: about this machine or about trust, not about the result; no recipe may set it.
    `words`: the values it may take, where they are few. `metavar`: what `--help` writes for the
    value. `python`: a keyword argument only, nothing that a command line or a file could say.
    """
    told = {"help": help, "recipe": recipe and not python, "words": words, "metavar": metavar}
    return dataclasses.field(default=default, metadata={**told, "python": python})


@dataclasses.dataclass(frozen=True)
class Declared:
    """All that the declaration of one field says. `default`: `REQUIRED` where there is none; the
    rest as for `flag`.
    """

    name: str
    kind: Any
    default: Any
    help: str
    recipe: bool
    words: tuple[Any, ...]
    metavar: str
    python: bool

    @property
    def flag(self) -> str:
        """`num_samples` as the command line writes it."""
        return named(self.name)


def declared(of: Any) -> dict[str, Declared]:
    """The fields of a dataclass by name, in order; one that is declared without `flag` has no help
    text, and a recipe may set it.
    """
    kinds: dict[str, Any] = hints(of)
    return {one.name: _declared(one, kinds[one.name]) for one in dataclasses.fields(of)}


def _declared(one: dataclasses.Field[Any], kind: Any) -> Declared:
    factory = one.default_factory
    default = one.default if factory is dataclasses.MISSING else factory()
    plain, told = _parts(kind)[0], one.metadata
    listed = typing.get_args(plain) if typing.get_origin(plain) is typing.Literal else ()
    return Declared(
        one.name,
        kind,
        default,
        told.get("help", ""),
        told.get("recipe", True),
        told.get("words", ()) or listed,
        told.get("metavar", ""),
        told.get("python", False),
    )


def check_fields(record: Any) -> None:
    """Check every field of a dataclass against its type and its words; whole numbers become floats,
    and lists tuples, where the type says so.

    Raises `RecipeError`: the flag, the value, what is allowed.
    """
    kind: Any = type(record)
    for one in declared(kind).values():
        value = check(one.name, getattr(record, one.name), one.kind)
        for word in value if isinstance(value, tuple) else (value,):
            if one.words and word is not None and word not in one.words:
                raise RecipeError(f"{one.flag} {shortened(word)}: {_of(one.words, word)}")
        object.__setattr__(record, one.name, value)


def _of(words: tuple[Any, ...], value: Any) -> str:
    """What is allowed where the choice is of a few words or numbers."""
    known = [str(word) for word in words]
    if isinstance(words[0], str):
        return f"unknown; allowed: {', '.join(known)}{did_you_mean(str(value), known)}"
    return f"must be {' or '.join(known) if len(known) == 2 else 'one of ' + ', '.join(known)}"


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments are checked before it begins: those with a range (`Annotated[...,
    Meta]`), and paths.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def begin(*args: P.args, **options: P.kwargs) -> R:
        given = signature.bind(*args, **options)
        for name, kind in hints(function).items():
            if name in given.arguments and _declares(kind):
                given.arguments[name] = check(name, given.arguments[name], kind)
        return function(*given.args, **given.kwargs)

    return begin


def check(name: str, value: Any, kind: Any, shown: str = "") -> Any:
    """`value` as `kind` has it. Raises `RecipeError` with `shown`, or else the flag `--name`, in
    front.
    """
    shown = shown or named(name)
    plain, marks = _parts(kind)
    if IS_NAME in marks and isinstance(value, PLAIN):
        value = check(name, value, str, shown)
    if IS_PATH in marks:
        return expanded(shown, value)
    if IS_NAME in marks:
        return os.fspath(value) if isinstance(value, os.PathLike) else value
    if choices(kind) and isinstance(value, str):
        value = _number(value)
    if typing.get_origin(plain) in LISTS:
        value = _listed(shown, value, plain_type(typing.get_args(plain)[0]))
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)):  # numpy's
        value = int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, (list, tuple)) and typing.get_origin(plain) in LISTS:
        found = [check(name, one, typing.get_args(plain)[0], shown) for one in value]
        return found if typing.get_origin(plain) is list else tuple(found)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise RecipeError(f"{shown} {shortened(value)}: must be {allowed(kind)}") from None


LISTS = (tuple, list, Sequence)
PLAIN = (str, int, float, bool, list, tuple, dict, type(None))
"""What a file or a command line can say."""
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a table",
}


def _number(text: str) -> float | str:
    """The number that a text says, as a command line has it; a text that says none as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def _listed(shown: str, value: Any, kind: type) -> Any:
    """A list of texts for "a,b", ["a", "b"] or [1, 2], of whole numbers where `kind` is int; all
    else as it is.
    """
    if isinstance(value, str):
        value = value.split(",") if value.strip() else []
    taken: Any = str if kind is int else (str, int)
    if not isinstance(value, (list, tuple)) or kind not in (int, str):
        return value
    if not all(isinstance(one, taken) and not isinstance(one, bool) for one in value):
        return value
    words = [str(word).strip() for word in value]
    said = shortened(",".join(words))
    if "" in words:
        raise RecipeError(
            f"{shown} {said}: an empty place in the list; write it like a,b, or leave the flag out"
        )
    if kind is not int:
        return words
    try:
        return [int(word) for word in words]
    except ValueError:
        raise RecipeError(
            f"{shown} {said}: not a list of whole numbers; write it like 21,22,25"
        ) from None


def allowed(kind: Any) -> str:
    """What a type takes, in words: "a whole number from 1 to 64", "a number at least 0 and below
    1", "at least 0 and below 1, or one of a, b".
    """
    return ", or ".join(map(_allowed, choices(kind) or [kind]))


def _allowed(kind: Any) -> str:
    """Of a type that is no choice of types."""
    plain, marks = _parts(kind)
    if IS_NAME in marks:
        return "text"
    if typing.get_origin(plain) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(plain)))}"
    if typing.get_origin(plain) in LISTS:
        return f"a list, each of it {allowed(typing.get_args(plain)[0])}"
    said = WORDS.get(plain, getattr(plain, "__name__", str(plain)))
    bounds = next(
        (one for one in getattr(_only(kind), "__metadata__", ()) if isinstance(one, Meta)), None
    )
    if bounds is None:
        return said
    if plain is int:
        return f"{said} from {bounds.ge:,} to {bounds.le:,}"
    limits = (
        ("at least", bounds.ge),
        ("above", bounds.gt),
        ("at most", bounds.le),
        ("below", bounds.lt),
    )
    return " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)


def expanded(shown: str, value: Any) -> Any:
    """A path with `~` put in; whatever is no path comes back as it is. Raises `RecipeError` for a
    path that no file can have.
    """
    if not isinstance(value, (str, os.PathLike)):
        return value
    text = os.fspath(value)
    if isinstance(text, str) and "\0" in text:
        raise RecipeError(f"{shown} {shortened(text)}: holds a NUL character, which no path can")
    home = os.path.expanduser(text)
    return value if home == text else type(value)(home)  # type: ignore[call-arg]


def named(field: str) -> str:
    """The flag of a field, or what `--help` calls an argument."""
    return (
        field.upper()
        if field in ("model", "out", "source")
        else "DIR"
        if field == "checkpoint"
        else "--" + field.replace("_", "-")
    )


def shortened(value: Any) -> str:
    """A value as an error names it: on one line, and no longer than a line."""
    text = repr(value) if isinstance(value, str) and not value.isprintable() else str(value)
    return text if len(text) <= 60 else f"{text[:50]}… ({len(text)} characters)"


@functools.cache
def hints(of: Any) -> dict[str, Any]:
    """The types of a dataclass's fields or a function's arguments, ranges and all."""
    return typing.get_type_hints(of, include_extras=True)


def _only(kind: Any) -> Any:
    """`kind` without "or None"."""
    return (
        next((one for one in typing.get_args(kind) if one is not type(None)), kind)
        if type(None) in typing.get_args(kind)
        else kind
    )


def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the plain type, what its annotation adds: ranges, `IS_PATH`, `IS_NAME`)."""
    inner = _only(kind)
    marks: tuple[Any, ...] = getattr(inner, "__metadata__", ())
    return (typing.get_args(inner)[0] if marks else inner), marks


def choices(kind: Any) -> tuple[Any, ...]:
    """The types of `Share | Literal["a", "b"]`, a number or one of a few words; none of others."""
    inner = _only(kind)
    return typing.get_args(inner) if typing.get_origin(inner) is typing.Union else ()


def plain_type(kind: Any) -> Any:
    """The type itself, without "or None" and without ranges."""
    found, marks = _parts(kind)
    if typing.get_origin(found) is typing.Literal:
        return type(typing.get_args(found)[0])
    return str if IS_NAME in marks else found


def _declares(kind: Any) -> bool:
    """Whether a type says more than Python's own."""
    inner, marks = _parts(kind)
    if typing.get_origin(inner) in LISTS:
        marks = _parts(typing.get_args(inner)[0])[1]
    return IS_PATH in marks or any(isinstance(one, Meta) for one in marks)
