"""Which rows and columns go with a part of an axis, matrix by matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grasp.core.axes import Sizes
from grasp.core.decoder import Decoder
from grasp.core.layers.reading_grasp import features
from grasp.errors import RecipeError

CHANNELS, KV_GROUPS, VALUE_DIMS = "channels", "kv_groups", "value_dims"
WORDS = {CHANNELS: "channels", KV_GROUPS: "KV groups", VALUE_DIMS: "value dimensions"}


@dataclass(frozen=True)
class Cut:
    """What is left of the matrix at `path` inside a layer: its `rows` and `columns`, rising; None:
    all. `scattered`, `gathered`: outputs, inputs keep their width.
    """

    path: str
    rows: Tensor | None = None
    columns: Tensor | None = None
    scattered: bool = False
    gathered: bool = False

    def size(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) that are left of a matrix of `shape`."""
        rows = shape[0] if self.rows is None else len(self.rows)
        return rows, shape[1] if self.columns is None else len(self.columns)

    def of(self, matrix: Tensor) -> Tensor:
        """What is left of W (out, in)."""
        matrix = matrix if self.rows is None else matrix[self.rows.to(matrix.device)]
        return matrix if self.columns is None else matrix[:, self.columns.to(matrix.device)]


def cuts(decoder: Decoder, layer: int, axis: str, keep: Tensor) -> list[Cut]:
    """The cuts that leave the places `keep` of `axis`. Raises `RecipeError` for an axis or a place
    that there is not.
    """
    family, sizes = decoder.family, sizes_of(decoder, layer)
    length = length_of(decoder, layer, axis)
    whole = keep.dim() == 1 and not keep.is_floating_point() and bool((keep.diff() > 0).all())
    if not whole or not len(keep) or not 0 <= int(keep[0]) <= int(keep[-1]) < length:
        raise RecipeError(
            f"layer {layer}: what is kept of its {length} {WORDS[axis]} must be some of them,"
            " rising"
        )
    units = keep.tolist()
    if axis == CHANNELS:
        roles = [role for role in ("gate", "up") if family.holding(role)]
        rows = _rows(decoder, sizes, dict.fromkeys(roles, units))
        columns = family.columns("down", sizes, units)
        found = [Cut(path, rows=places) for path, places in rows.items()]
        return [*found, Cut(family.path("down"), columns=columns)]
    if axis == KV_GROUPS:
        _check_norms(decoder, layer, sizes)
        queries = sizes.queries(units)
        rows = _rows(decoder, sizes, {"q": queries, "k": units, "v": units})
        wide = not family.heads_by_width
        found = [Cut(path, rows=places, scattered=wide) for path, places in rows.items()]
        columns = family.columns("o", sizes, queries)
        return [*found, Cut(family.path("o"), columns=columns, gathered=wide)]
    return _of_values(decoder, layer, sizes, keep)


def length_of(decoder: Decoder, layer: int, axis: str) -> int:
    """How many places an axis of a layer has now. Raises `RecipeError` for an axis that there is
    not.
    """
    sizes = sizes_of(decoder, layer)
    lengths = {
        CHANNELS: sizes.channels,
        KV_GROUPS: sizes.kv_heads,
        VALUE_DIMS: sizes.kv_heads * sizes.head_dim,
    }
    if axis not in lengths:
        raise RecipeError(f"layer {layer}: there is no axis '{axis}'; there are {', '.join(WORDS)}")
    return lengths[axis]


def _check_norms(decoder: Decoder, layer: int, sizes: Sizes) -> None:
    """Raise `RecipeError` where a norm of queries or keys runs over all heads, as OLMo2's: without
    some of them the others would come out otherwise.
    """
    module = decoder.layer(layer).module
    for path in decoder.family.norms.heads:
        norm: Any = module.get_submodule(path)
        if norm.weight.numel() != sizes.head_dim:
            raise RecipeError(
                f"layer {layer}: '{path}' runs over all heads, so no KV group can go; take value"
                " dimensions"
            )


def sizes_of(decoder: Decoder, layer: int) -> Sizes:
    """The axes of a layer as it is now."""
    family, sizes = decoder.family, Sizes.of(decoder.config)
    module = decoder.layer(layer).module
    channels = features(module.get_submodule(family.path("down")))[0]
    queries = features(module.get_submodule(family.path("o")))[0] // sizes.head_dim
    kv_heads = queries // sizes.group
    return replace(sizes, channels=channels, heads=queries, kv_heads=kv_heads)


def _of_values(decoder: Decoder, layer: int, sizes: Sizes, keep: Tensor) -> list[Cut]:
    """The dimensions `keep` of the value heads leave v, and o in every query head that reads them.
    Both keep their width: the attention between them has heads of one size.
    """
    family = decoder.family
    values, kept = family.rows("v", sizes), set(keep.tolist())
    gone = {int(values[place]) for place in range(len(values)) if place not in kept}
    path = family.path("v")
    height = features(decoder.layer(layer).module.get_submodule(path))[1]
    rows = torch.tensor([row for row in range(height) if row not in gone])
    head, place = keep // sizes.head_dim, keep % sizes.head_dim
    queries = [
        (int(kv) * sizes.group + number) * sizes.head_dim + int(where)
        for kv, where in zip(head, place, strict=True)
        for number in range(sizes.group)
    ]
    columns = family.columns("o", sizes)[torch.tensor(sorted(queries))]
    return [
        Cut(path, rows=rows, scattered=True),
        Cut(family.path("o"), columns=columns, gathered=True),
    ]


def _rows(decoder: Decoder, sizes: Sizes, units: dict[str, list[int]]) -> dict[str, Tensor]:
    """Matrix -> the rows, rising, that these units of its roles are."""
    found: dict[str, list[Tensor]] = {}
    for role, chosen in units.items():
        rows = decoder.family.rows(role, sizes, chosen)
        found.setdefault(decoder.family.path(role), []).append(rows)
    return {path: torch.cat(parts).sort().values for path, parts in found.items()}
