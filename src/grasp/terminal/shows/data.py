"""`grasp data`: the texts that grasp knows by name, and the types of files."""

from __future__ import annotations

from grasp.data.files import FILE_TYPES
from grasp.data.text import NAMED
from grasp.terminal.bars import emit, table


def show(as_json: bool) -> None:
    """Every named text, and the file types."""
    rows = [
        (name, known.about, "hub: " + "/".join(known.hub) if known.hub else "no network needed")
        for name, known in NAMED.items()
    ]
    rows.append(
        (
            "a path",
            ", ".join(FILE_TYPES) + "; rows of chat messages go through the chat template",
            "no network needed",
        )
    )
    table("", ("DATA", "what", "from"), rows, left=3)
    if as_json:
        emit(
            {
                "named": {name: known.about for name, known in NAMED.items()},
                "file_types": list(FILE_TYPES),
            }
        )
