"""`grasp methods`: every method with its paper and its flags."""

from __future__ import annotations

from pathlib import Path

from grasp.core.fields import declared
from grasp.methods import known
from grasp.terminal.bars import emit, say, table


def show(plugin: Path | None, as_json: bool) -> None:
    """Every method with its fields."""
    found = known(plugin)
    for name, method in found.items():
        say(f"[bold]{name}[/bold]  {method.about()}  {method.paper}")
        rows = [(f"  {one.flag}", one.help) for one in declared(method).values()]
        table("", ("", ""), rows, left=2)
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
