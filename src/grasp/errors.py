"""The errors a user of grasp can meet. Every message is one line: what, the value, what is allowed,
the way out.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class GraspError(Exception):
    """Base of every error grasp raises on purpose. The command line prints it on one line and exits
    with 2.
    """


class RecipeError(GraspError):
    """A flag, field or combination of them that cannot be carried out."""


class DataError(GraspError):
    """A text source that cannot be read, or holds too little text."""


class ModelError(GraspError):
    """A model that cannot be found, read, or looked into."""


class CheckpointError(GraspError):
    """A checkpoint directory that cannot be written or read."""


class NumericsError(GraspError):
    """A loss, gradient or weight that is not finite. Names the place."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a signal, where something is left: says what, and how to go on."""


def in_words(failure: BaseException) -> tuple[str, int]:
    """(one line, exit status) for an exception that is none of ours: 2 where the machine or a path
    is at fault, 1 for a defect.
    """
    said = " ".join(str(failure).split())[:300]
    if isinstance(failure, OSError) and failure.filename is not None and failure.strerror:
        return f"{os.fsdecode(failure.filename)}: {failure.strerror}", 2
    if isinstance(failure, MemoryError) or any(
        words in said
        for words in ("out of memory", "can't allocate memory", "cannot allocate memory")
    ):
        return (
            (
                f"not enough memory ({said or 'none left'}); fewer or shorter blocks"
                " (--num-samples, --seq-len, --batch-size) need less"
            ),
            2,
        )
    return f"unexpected {type(failure).__name__}: {said}", 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'taylor'?"` where one of `known` is close to `name`, else an empty one."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
