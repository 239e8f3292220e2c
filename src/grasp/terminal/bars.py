"""What people see: progress bars, tables, one-line errors, all on stderr; JSON for programs on
stdout.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console(stderr=True, highlight=False)

BEAT = 8.0
"""Seconds between the lines of progress where there is no terminal to draw bars on."""


class Bars:
    """A progress callback that draws one bar a task, with the time left. A task named "a, b" takes
    over the bar of "a, ...".
    """

    def __init__(self, bars: Progress):
        self.bars = bars
        self.ids: dict[str, Any] = {}
        self.done: dict[str, int] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        key = task.split(",", maxsplit=1)[0]
        if key not in self.ids:
            self.ids[key] = self.bars.add_task(task, total=total or None)
        elif done == 0 or done < self.done[key]:
            self.bars.reset(self.ids[key], description=task, total=total)
        self.done[key] = done
        self.bars.update(self.ids[key], description=task, completed=done, total=max(total, done))
        if done == total == 0:
            self.bars.update(self.ids[key], visible=False)


class Lines:
    """A progress callback for output that is no terminal (a file, a pipe): says every `BEAT`
    seconds which task is at hand and how far it is, also while that task does not call.
    """

    def __init__(self, task: str = ""):
        self.task, self.done, self.total, self.begin = task, 0, 0, time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, name="progress lines", daemon=True)

    def __call__(self, task: str, done: int, total: int) -> None:
        if task != self.task or done == 0:
            self.begin = time.monotonic()
        self.task, self.done, self.total = task, done, total

    def _run(self) -> None:
        pause = BEAT / 4  # the first line comes early: what ran before this may have said nothing
        while not self.over.wait(pause):
            if self.task:
                say(plain(self.line()))
                pause = BEAT

    def line(self) -> str:
        """What is done, how much of it, for how long, and how long it may still take."""
        seconds = time.monotonic() - self.begin
        parts = [f"{seconds:.0f} s"]
        if self.total > 1:
            parts.insert(0, f"{self.done} of {self.total}")
            if 0 < self.done < self.total:
                parts.append(f"about {seconds * (self.total - self.done) / self.done:.0f} s left")
        return f"{self.task}: {', '.join(parts)}"


@contextmanager
def lines(task: str = "") -> Iterator[Lines]:
    """`Lines` for the length of the block."""
    shown = Lines(task)
    shown.thread.start()
    try:
        yield shown
    finally:
        shown.over.set()
        shown.thread.join()


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """The progress callback of a command: bars on a terminal, else a line now and then; nothing
    where the user asked for quiet."""
    if quiet:
        yield lambda task, done, total: None
    elif not console.is_terminal:
        with lines() as shown:
            yield shown
    else:
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bars:
            yield Bars(bars)


@contextmanager
def waiting(task: str, quiet: bool) -> Iterator[None]:
    """While something takes seconds that cannot be counted: a spinner that leaves no trace, or
    lines.
    """
    if quiet:
        yield
    elif console.is_terminal:
        with console.status(task):
            yield
    else:
        with lines(task):
            yield


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1
) -> None:
    """A table on stderr: the first `left` columns flush left, the others right."""
    if title:
        # a title of the table's own would be folded to its width
        say(f"[italic]{plain(title)}[/italic]")
    drawn = Table(header_style="bold", show_header=any(columns), box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        drawn.add_column(
            column, justify="left" if number < left or not column else "right", overflow="fold"
        )
    for row in rows:
        drawn.add_row(*(escape(str(cell)) for cell in row))
    console.print(drawn)


def say(message: str) -> None:
    """One line for people."""
    console.print(message, soft_wrap=True)


def plain(value: object) -> str:
    """Text for `say` that shows as it is, square brackets and all."""
    return escape(str(value))


def emit(value: dict[str, Any]) -> None:
    """The JSON object of `--json`: one line, the last of stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def megabytes(count: int | float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
