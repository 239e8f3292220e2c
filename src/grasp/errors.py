"""The errors a user of grasp can meet. Every message is one line: what, the value, what is allowed, the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraspError(Exception):
    """Base of every error grasp raises on purpose. The command line prints it on one line and exits with 2."""


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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'taylor'?"` where one of `known` is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
