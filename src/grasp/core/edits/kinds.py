"""The kinds of edits there are, by name. A new kind is a file and a row here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from grasp.core.edits.base import Edit
from grasp.core.edits.drop import Drop
from grasp.core.edits.drop_experts import DropExperts
from grasp.core.edits.factorize import Factorize
from grasp.core.edits.narrow import Narrow
from grasp.core.edits.quantize import Quantize
from grasp.core.edits.replace import Replace
from grasp.core.edits.replace_mlp import ReplaceMLP
from grasp.core.edits.rewrite import Rewrite
from grasp.core.edits.slice import Slice
from grasp.core.edits.split_experts import SplitExperts
from grasp.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

KINDS: dict[str, type[Edit]] = {
    one.kind: one
    for one in (
        Drop,
        DropExperts,
        Factorize,
        Narrow,
        Quantize,
        Replace,
        ReplaceMLP,
        Rewrite,
        Slice,
        SplitExperts,
    )
}


def from_spec(spec: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Edit:
    """The edit that a spec and its tensors describe; without them, for reading a log."""
    return KINDS[spec["edit"]].from_spec(spec, tensors or {})


def schema_of(path: Path, kind: str, hint: str) -> type[Struct]:
    """What a spec of this kind holds. Raises `CheckpointError` for a kind that there is not."""
    if kind not in KINDS:
        raise CheckpointError(
            f"{path}: it names an edit '{kind}', which this grasp does not know"
            f" ({', '.join(KINDS)}); {hint}"
        )
    return KINDS[kind].schema
