"""`grasp methods`: every method, what it does, and its paper."""

from __future__ import annotations

from pathlib import Path

from grasp.core.fields import declared
from grasp.methods import known
from grasp.terminal.bars import emit, say, table


def show(plugin: Path | None, as_json: bool) -> None:
    """Every method in a row; its fields are in the JSON."""
    found = known(plugin)
    rows = [
        (name, method.about(), method.paper.removeprefix("https://arxiv.org/abs/"))
        for name, method in found.items()
    ]
    table("", ("method", "what it does", "arXiv"), rows, left=3)
    say("The flags of one: grasp compress --method NAME --help. --json gives those of all.")
    if as_json:
        emit(
            {
                name: {
                    "paper": method.paper,
                    "fields": {one.name: one.help for one in declared(method).values()},
                }
                for name, method in found.items()
            }
        )
