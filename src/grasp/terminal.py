"""What people see: progress bars, tables, one-line errors, all on stderr; JSON for programs on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True, highlight=False)


class Bars:
    """A progress callback that draws one bar a task, with the time left. A task named "a, b" takes over the bar of "a, ..."."""

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


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[Bars]:
    """Bars for the length of the block; none where stderr is not a terminal or the user asked for quiet."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("[dim]left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        yield Bars(bars)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> None:
    """A table on stderr: the first `left` columns flush left, the others right."""
    if title:
        say(f"[italic]{plain(title)}[/italic]")  # a title of the table's own would be folded to its width
    drawn = Table(header_style="bold", show_header=any(columns), box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        drawn.add_column(column, justify="left" if number < left or not column else "right", overflow="fold")
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
