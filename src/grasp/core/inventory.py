"""Where the bytes of a model are: by part of the model, and by how its numbers are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from grasp.core.decoder import Decoder
from grasp.core.edits.placing import vocabulary_paths
from grasp.core.experts import mixtures
from grasp.core.layer import is_low_rank, is_quantized
from grasp.core.layers.experts_grasp import SPLIT
from grasp.core.layers.packing_grasp import DYNAMIC

REST, EXPERTS = "everything else", "experts"


@dataclass(frozen=True)
class Holding:
    """Matrices of one `part` ("down", "embed_tokens") that are `stored` alike ("4 bits, groups of
    64"), how many, and their bytes.
    """

    part: str
    stored: str
    matrices: int
    bytes: int


def inventory(decoder: Decoder) -> list[Holding]:
    """All of a model, part after part; within a part the most bytes first. A tied head counts with
    the embedding.
    """
    family, seen = decoder.family, set[int]()
    found: dict[tuple[str, str], tuple[int, int]] = {}

    def count(part: str, module: nn.Module) -> None:
        own = [one for one in module.parameters() if id(one) not in seen]
        seen.update(id(one) for one in own)
        size = sum(one.numel() * one.element_size() for one in own)
        if size:
            key = part, "" if part == REST else stored_as(module)
            number, before = found.get(key, (0, 0))
            found[key] = number + 1, before + size

    for path in vocabulary_paths(decoder).values():
        count(path.rpartition(".")[2], decoder.module(path))
    for layer in decoder.stack:
        for role, name in family.matrices:
            if (module := _at(layer, name)) is not None:
                count(role, module)
    for mixed in mixtures(decoder):
        if mixed.is_fused:
            count(EXPERTS, mixed.experts)
        for expert in getattr(mixed.experts, SPLIT, ()):
            for module in expert.children():
                count(EXPERTS, module)
    count(REST, decoder.model)
    order = list(dict.fromkeys(part for part, _ in found))
    rows = [Holding(part, how, *numbers) for (part, how), numbers in found.items()]
    return sorted(rows, key=lambda row: (order.index(row.part), -row.bytes))


def stored_as(module: Any) -> str:
    """In words: "4 bits, groups of 64", "8 bits, activations too", "16 bits", with "pair" where it
    is one.
    """
    pair = ", pair" if getattr(module, "rank", None) is not None or is_low_rank(module) else ""
    if is_quantized(module):
        bits = int("".join(filter(str.isdigit, module.scheme)))
        groups = f", groups of {module.group_size}" if bits < 8 else ""
        too = ", activations too" if module.scheme == DYNAMIC else ""
        return f"{bits} bits{groups}{too}{pair}"
    return f"{8 * next(module.parameters()).element_size()} bits{pair}"


def _at(layer: nn.Module, name: str) -> Any:
    try:
        module = layer.get_submodule(name)
    except AttributeError:
        return None
    return module if hasattr(module, "weight") else None
