"""How work that takes long says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`progress(task, done, total)`: called at the start of a task with done = 0, and after every step.
"""


def silent(task: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""
