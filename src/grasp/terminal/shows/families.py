"""`grasp families`: the architectures that grasp knows by name."""

from __future__ import annotations

import dataclasses

from grasp.core.families import FAMILIES
from grasp.terminal.bars import emit, say, table


def show(as_json: bool) -> None:
    """Every row of the family table."""
    rows = [
        (f.name, ", ".join(f.model_types), " ".join(roles for roles, _ in f.matrices), f.notes)
        for f in FAMILIES
    ]
    table("", ("family", "model_type", "matrices by role", "notes"), rows, left=4)
    say(
        "An unknown model whose layers are plain linears works by inspection, with a notice. --json"
        " gives the module paths."
    )
    if as_json:
        emit({f.name: dataclasses.asdict(f) for f in FAMILIES})
