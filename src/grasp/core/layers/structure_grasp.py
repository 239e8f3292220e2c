"""The record of a model's structure in `config.json`: which modules are not as the model's class
makes them.

    "structure": {path: {"kind": "low-rank", "rank": 8}, ...}

`path` is the module's in the model that was saved. A record says all that is needed to place the
module, still without memory, before weights are read. `"of"` in it is the record of the module that
it replaced, where that was one of ours too: a low-rank pair in 8 bits is
`{"kind": "quantized", ..., "of": {"kind": "low-rank", ...}}`. A new kind is a row in `KINDS`.

Checkpoints of format 1 to 3 said it in three tables; `converted` makes one of them.
A file that a checkpoint carries: it needs torch and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .embedding_grasp import HEAD, tie
from .embedding_grasp import place as place_quantized
from .experts_grasp import check_record as check_experts
from .experts_grasp import place as place_experts
from .low_rank_grasp import check_record as check_low_rank
from .low_rank_grasp import place as place_low_rank
from .narrow_grasp import check_record as check_narrow
from .narrow_grasp import place as place_narrow
from .packing_grasp import check_record as check_quantized
from .reading_grasp import own_path, record_of
from .sliced_grasp import check_record as check_sliced
from .sliced_grasp import place as place_sliced
from .span_grasp import check_record as check_span
from .span_grasp import place as place_span

Record = dict[str, Any]


class Kind(NamedTuple):
    """How a record is checked, and how its module is made in the place of an empty one."""

    check: Callable[[str, Record], None]
    place: Callable[[str, nn.Module, Record], nn.Module]


KINDS = {
    "experts": Kind(check_experts, place_experts),
    "low-rank": Kind(check_low_rank, place_low_rank),
    "mlp-span": Kind(check_span, place_span),
    "narrow": Kind(check_narrow, place_narrow),
    "quantized": Kind(check_quantized, place_quantized),
    "sliced": Kind(check_sliced, place_sliced),
    "span": Kind(check_span, place_span),
}


def check_structure(structure: Any) -> None:
    """Raise `ValueError` where the table of a config.json is not what this module describes."""
    if not isinstance(structure, dict):
        raise ValueError(
            f"config.json: 'structure' is {structure!r}; it must give a record to each path"
        )
    for path, record in structure.items():
        inner = record
        while inner is not None:
            if not isinstance(inner, dict) or inner.get("kind") not in KINDS:
                known = ", ".join(KINDS)
                raise ValueError(
                    f"config.json: '{path}' is {inner!r}; its kind must be one of {known}"
                )
            KINDS[inner["kind"]].check(path, inner)
            inner = inner.get("of")


def place(model: nn.Module, structure: dict[str, Record]) -> dict[str, str]:
    """Put what the records describe, unfilled and without memory (meta device), in its place.

    Returns where each path is in this model, which may be of another class than the one saved; a
    body or a classifier has no head. Raises `ValueError`.
    """
    places = {}
    # experts first: other records may be of linears inside them
    for path in sorted(structure, key=lambda path: structure[path]["kind"] != "experts"):
        record = structure[path]
        if record.get("part") == HEAD and _may_lack_head(model, record):
            continue
        here = places[path] = own_path(model, path, _stands_for(record))
        model.set_submodule(here, made(path, model.get_submodule(here), record))
    tie(model)
    return places


def _may_lack_head(model: Any, record: Record) -> bool:
    """Whether this is a body alone, or a classifier of a model whose head is in few bits and no
    more; what a classifier of a sliced model reads is of another width than its own head's.
    """
    if getattr(model, "base_model", None) is model:
        return True
    asked = getattr(model, "get_output_embeddings", None)
    return record["kind"] == "quantized" and asked is not None and asked() is None


def made(path: str, old: nn.Module, record: Record) -> nn.Module:
    """What a record describes, unfilled and without memory, in the place of `old`."""
    inner = record.get("of")
    old = old if inner is None else made(path, old, inner)
    return KINDS[record["kind"]].place(path, old, record)


def _stands_for(record: Record) -> str:
    """What a record is about: a whole decoder layer, the experts or a linear in one, or what is
    before or behind the layers.
    """
    if record["kind"] in ("span", "mlp-span") or record.get("part") == "layer":
        return "layer"
    if record["kind"] == "experts":
        return "experts"
    return "end" if "part" in record else "linear"


def structure_of(model: nn.Module) -> dict[str, Record]:
    """The records of all modules of ours in a model: what its config must say."""
    found = {path: record_of(module) for path, module in model.named_modules()}
    return {path: record for path, record in found.items() if record is not None}


def without_bits(structure: dict[str, Record]) -> dict[str, Record]:
    """The structure of the model before it was quantized."""
    found = {
        path: record.get("of") if record["kind"] == "quantized" else record
        for path, record in structure.items()
    }
    return {path: record for path, record in found.items() if record is not None}


def converted(ranks: Any, pivoted: Any, quantization: Any) -> dict[str, Record]:
    """The structure that the tables of formats 1 to 3 describe. Raises `ValueError`."""
    if not isinstance(ranks, dict):
        raise ValueError(f"config.json: 'ranks' is {ranks!r}; it must give a rank to each path")
    _check_paths("pivoted", pivoted)
    if unknown := sorted(set(pivoted) - ranks.keys()):
        raise ValueError(f"config.json: '{unknown[0]}' is named as pivoted, but has no rank")
    found: dict[str, Record] = {
        path: {"kind": "low-rank", "rank": rank, **({"pivoted": True} if path in pivoted else {})}
        for path, rank in ranks.items()
    }
    if not quantization:
        return found
    if (
        not isinstance(quantization, dict)
        or not {"scheme", "group_size", "modules"} <= quantization.keys()
    ):
        raise ValueError(
            f"config.json: 'quantization' is {quantization!r}; it must hold scheme, group_size and"
            " modules"
        )
    _check_paths("modules", quantization["modules"])
    bits = {key: quantization[key] for key in ("scheme", "group_size")}
    check_quantized("quantization", bits)
    for path in quantization["modules"]:
        pair = found.get(path)
        found[path] = {"kind": "quantized", **bits, **({"of": pair} if pair else {})}
    return found


def _check_paths(name: str, paths: Any) -> None:
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"config.json: '{name}' is {paths!r}; it must be a list of paths")
    if len(set(paths)) < len(paths):
        raise ValueError(f"config.json: '{name}' names a path twice")
