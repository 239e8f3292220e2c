"""Whether a path can be written: asked by every verb before any work is done, by a dry run too.

A directory OUT may be new, or exist and be empty; it may be a symbolic link to an empty directory,
or a mount point. It must not lie in a model that is read.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from grasp.core.partial import bytes_of, is_partial, partials, state_of
from grasp.errors import CheckpointError, RecipeError

SPARE = 1.02
"""Room asked for on the disk, over the bytes of the weights."""
ROOM_FOR_A_FILE = 1e6
"""Bytes asked for where a results file, a page or a picture is to be written."""
INSIDE = 160
"""Bytes a path may still grow by below OUT."""


def check_destination(out: Path, num_bytes: int, *models: object) -> None:
    """Raise `CheckpointError` where `out` cannot take a checkpoint of `num_bytes`: asked before any
    work is done.

    `models`: names or paths of what is read; `out` must not lie in one of them.
    """
    problem = (
        _impossible(out) or _taken(out) or _inside(out, models) or _no_room(out, num_bytes * SPARE)
    )
    if problem:
        raise CheckpointError(f"OUT {shown(out)}: {problem}")


def check_file(path: Path, flag: str, new_folder: bool = False) -> None:
    """Raise `RecipeError` naming the flag where a file cannot be written; an ordinary file that is
    there is replaced.

    `new_folder`: the folder is made where it is not there.
    """
    problem = (
        _impossible(path) or _not_replaced(path, new_folder) or _no_room(path, ROOM_FOR_A_FILE)
    )
    if problem:
        raise RecipeError(f"{flag} {shown(path)}: {problem}")


def check_beside(path: Path, out: Path, what: str) -> None:
    """Raise `CheckpointError` where a folder that is used on the way to `out` cannot be made;
    `what` says for what.
    """
    problem = _impossible(path)
    if not problem and not os.path.isdir(path):
        place = existing(real(path))
        problem = (
            ""
            if place.is_dir() and os.access(place, os.W_OK | os.X_OK)
            else f"{place} is not writable"
        )
    if problem:
        raise CheckpointError(
            f"OUT {shown(out)}: {what} {shown(path)}: {problem}; choose another path, such as"
            f" {out / 'model'}"
        )


def real(path: Path) -> Path:
    """The path without symbolic links: where writing goes."""
    return Path(os.path.realpath(path))


def name_of(out: Path) -> str:
    """What a checkpoint in `out` is called: "." and ".." have no name of their own."""
    return out.name if out.name not in ("", "..") else real(out).name


def beside(out: Path, ending: str) -> Path:
    """The folder beside `out` that is called like it, with `ending`: where a run keeps what is
    needed on the way.
    """
    place = out if out.name == name_of(out) else real(out)
    return place.with_name(place.name + ending)


def contents(directory: Path) -> list[Path]:
    """What is in a directory, but for what killed runs of grasp left and what a file system puts
    into its root.
    """
    return [
        path
        for path in directory.iterdir()
        if path.name != "lost+found" and not (is_partial(path) and state_of(path) == "dead")
    ]


def shown(path: Path) -> str:
    """A path as a message can show it on one line."""
    text = os.fspath(path)
    return text if _printable(text) else ascii(text)


def size(num_bytes: int | float) -> str:
    """Bytes as people read them, never rounded to nothing."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _printable(text: str) -> bool:
    return not any(
        ord(letter) < 32 or ord(letter) == 127 or 0xD800 <= ord(letter) < 0xE000 for letter in text
    )


def existing(path: Path) -> Path:
    """The path itself where it is there, else the nearest folder above it that is."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _impossible(path: Path) -> str:
    """Names that nothing can have, whatever is on the disk; links that lead nowhere."""
    if not _printable(os.fspath(path)):
        return "its name is not UTF-8 text, or holds control characters; choose another"
    whole = path.absolute()
    for place in (whole, *whole.parents):
        if os.path.islink(place) and not os.path.exists(place):
            link = "a symbolic link" if place == whole else f"{place} is a symbolic link"
            return (
                f"{link} to {os.readlink(place)}, which is not there; make that first, or choose"
                " another path"
            )
    place = existing(real(path))
    longest, most = os.pathconf(place, "PC_NAME_MAX"), os.pathconf(place, "PC_PATH_MAX") - INSIDE
    if any(len(os.fsencode(part)) > longest for part in whole.parts):
        return f"a name in it is too long; at most {longest} bytes"
    if len(os.fsencode(real(path))) > most:
        return f"the path is too long; at most {most} bytes"
    return ""


def _taken(out: Path) -> str:
    """What is at `out`, or above it, that keeps a directory from being made or filled there."""
    target = real(out)
    place = existing(target)
    if not place.is_dir():
        return (
            "exists and is not an empty directory; choose another path or remove it"
            if place == target
            else f"{place} is not a directory"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} is not writable; choose another path"
    if place != target:
        return ""
    try:
        found = contents(target)
    except OSError as failure:
        return f"cannot be read ({failure.strerror})"
    if found and all(map(is_partial, found)):
        return (
            f"another process is writing there ({found[0].name}); choose another path, or remove"
            " that if it has ended"
        )
    return "exists and is not an empty directory; choose another path or remove it" if found else ""


def _not_replaced(path: Path, new_folder: bool) -> str:
    """What keeps a file from being written or replaced at `path`."""
    target = real(path)
    if target.is_dir():
        return "is a directory; name a file in it"
    if os.path.lexists(target) and not target.is_file():
        return "is not an ordinary file; choose another path"
    if target.is_file() and not os.access(target, os.W_OK):
        return "is there and not writable; choose another path"
    place = existing(target.parent)
    if not place.is_dir() or (place != target.parent and not new_folder):
        return f"{path.parent} is not a directory; make it first, or choose another path"
    return (
        ""
        if os.access(place, os.W_OK | os.X_OK)
        else f"{place} is not writable; choose another path"
    )


def _inside(out: Path, models: tuple[object, ...]) -> str:
    for model in models:
        place = os.path.expanduser(model) if isinstance(model, (str, os.PathLike)) else ""
        if os.path.isdir(place) and real(Path(place)) in real(out).parents:
            return f"lies in {place}, which is read and stays as it is; choose a path outside it"
    return ""


def _no_room(path: Path, needed: int | float) -> str:
    """What killed runs left beside `path` or in it is removed before anything is written, so it
    counts as free.
    """
    target = real(path)
    place = existing(target)
    dead = {
        left
        for folder in (target, target.parent)
        for left in partials(folder)
        if state_of(left) == "dead"
    }
    free = shutil.disk_usage(place).free + sum(map(bytes_of, dead))
    if free >= needed:
        return ""
    return f"needs {size(needed)}, {place} has {size(free)} free; free some or choose another disk"
