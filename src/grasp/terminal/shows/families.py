"""`grasp families`: the architectures that grasp knows by name."""

from __future__ import annotations

import dataclasses

from grasp.core.families import FAMILIES
from grasp.terminal.bars import emit, say, table


def show(as_json: bool) -> None:
    """Every row of the family table."""
    rows = [
        (
            f.name,
            ", ".join(f.model_types),
            " ".join(roles for roles, _ in f.matrices),
            "yes" if f.heads_by_width else "no",
            f.notes,
        )
        for f in FAMILIES
    ]
    table("", ("family", "model_type", "matrices by role", "KV groups", "notes"), rows, left=5)
    say(
        "KV groups: whether whole ones go out of a layer with plain smaller matrices. An unknown"
        " model is inspected: linears and experts of its layers are compressed, the rest is left"
        " alone and named. --json gives the paths of matrices, norms, embeddings and head."
    )
    if as_json:
        emit({f.name: dataclasses.asdict(f) for f in FAMILIES})
