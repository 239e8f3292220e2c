"""Which narrowed layers a server runs, and how wide its linears are then. Plain Python.

Gate and up of a layer have one width, and down reads it; widths differ between layers. A server
splits the channels over its devices, so every width must divide among them. It counts heads by the
config, so a layer that lost KV groups or value dimensions is not served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from grasp.core.families import FAMILIES

Record = Mapping[str, Any]
SERVED = ("low-rank", "narrow", "quantized")
"""Kinds of modules that a server runs."""
OF_EXPERTS = (
    ", or `grasp export --format dense` first; compressed with --exclude experts it is served"
)


def kinds(record: Record | None) -> dict[str, Record]:
    """A record and those inside it, by kind: `{"quantized": ..., "low-rank": ..., "narrow": ...}`
    of a narrowed matrix that became a pair and was rounded.
    """
    found: dict[str, Record] = {}
    while record:
        found[record["kind"]] = record
        record = record.get("of")
    return found


def check(structure: Mapping[str, Record]) -> None:
    """Raise `ValueError` for a kind of module that is not served."""
    for path, record in structure.items():
        inside = kinds(record)
        if unknown := inside.keys() - set(SERVED):
            kind = unknown.pop()
            more = OF_EXPERTS if kind == "experts" else ""
            raise ValueError(
                f"config.json: '{path}' is of the kind '{kind}', which the plug-in for"
                f" vLLM does not know; it serves {', '.join(SERVED)}; use transformers{more}"
            )
        if inside.get("narrow", {}).keys() & {"scattered", "gathered"}:
            raise _heads(path)


def check_axes(structure: Mapping[str, Record], model_type: str) -> None:
    """Raise `ValueError` where a matrix outside the MLPs of a model of this type is narrow."""
    mlp = [path for row in FAMILIES if model_type in row.model_types for _, path in row.mlp]
    for path, record in structure.items():
        if "narrow" in kinds(record) and not any(path.endswith(f".{name}") for name in mlp):
            raise _heads(path)


def _heads(path: str) -> ValueError:
    return ValueError(
        f"config.json: '{path}' lost KV groups or value dimensions, which the plug-in for vLLM"
        " cannot serve; it serves MLPs with fewer channels; use transformers"
    )


def outputs(paths: Sequence[str], narrow: Sequence[Record], whole: Sequence[int]) -> list[int]:
    """The outputs that are left of each stacked matrix of `whole` outputs. `narrow`: the records of
    the matrices at `paths` as stored, one for each or one for all together. Raises `ValueError`
    where they differ in width.
    """
    if len(paths) < len(whole):
        return [narrow[0]["rows"] // len(whole)] * len(whole)
    found = [record.get("rows", size) for record, size in zip(narrow, whole, strict=True)]
    if len(set(found)) > 1:
        raise ValueError(
            f"config.json: {' and '.join(paths)} have {' and '.join(map(str, found))} channels;"
            " they must have the same"
        )
    return found


def share(path: str, channels: int, devices: int) -> int:
    """Channels that each device holds. Raises `ValueError` where they do not divide."""
    if channels % devices:
        fit = [str(number) for number in _divisors(channels) if number <= 8]
        raise ValueError(
            f"'{path}' has {channels} channels left, which do not divide among {devices} devices;"
            f" give a --tensor-parallel-size that divides them ({', '.join(fit)}), or narrow to"
            f" multiples of {devices}"
        )
    return channels // devices


def _divisors(number: int) -> Iterator[int]:
    return (one for one in range(1, number + 1) if number % one == 0)
