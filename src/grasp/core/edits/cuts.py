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

CHANNELS, KV_GROUPS = "channels", "kv_groups"
VALUE_DIMS, KEY_DIMS = "value_dims", "key_dims"
WORDS = {
    CHANNELS: "channels",
    KV_GROUPS: "KV groups",
    VALUE_DIMS: "value dimensions",
    KEY_DIMS: "key dimensions",
}


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
    of_heads = _of_values if axis == VALUE_DIMS else _of_keys
    return of_heads(decoder, layer, sizes, keep)


def length_of(decoder: Decoder, layer: int, axis: str) -> int:
    """How many places an axis of a layer has now. Raises `RecipeError` for an axis that there is
    not.
    """
    sizes = sizes_of(decoder, layer)
    lengths = {
        CHANNELS: sizes.channels,
        KV_GROUPS: sizes.kv_heads,
        **dict.fromkeys((VALUE_DIMS, KEY_DIMS), sizes.kv_heads * sizes.head_dim),
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
    """The axes of a layer as it is now; no channels where its MLP has no common width of them."""
    family, sizes = decoder.family, Sizes.of(decoder.config)
    module = decoder.layer(layer).module
    channels = 0
    for path in family.holding("down"):
        channels = features(module.get_submodule(path))[0]
    queries = features(module.get_submodule(family.path("o")))[0] // sizes.head_dim
    kv_heads = queries // sizes.group
    return replace(sizes, channels=channels, heads=queries, kv_heads=kv_heads)


def rotary(decoder: Decoder) -> int:
    """How many numbers of a head rotary embeddings turn: the first ones, number i in a plane with
    number i + half (so in every family of the table). 0 where positions are learnt.
    """
    found = [
        2 * buffer.numel()
        for name, buffer in decoder.model.named_buffers()
        if name.endswith("inv_freq")
    ]
    return max(found, default=0)


def _of_values(decoder: Decoder, layer: int, sizes: Sizes, keep: Tensor) -> list[Cut]:
    """The dimensions `keep` of the value heads leave v, and o in every query head that reads them.
    Both keep their width: the attention between them has heads of one size.
    """
    family, path = decoder.family, decoder.family.path("v")
    gone = family.rows("v", sizes)[_others(sizes, keep)]
    columns = family.columns("o", sizes)[_of_queries(sizes, keep)]
    return [
        Cut(path, rows=_left(decoder, layer, path, gone), scattered=True),
        Cut(family.path("o"), columns=columns, gathered=True),
    ]


def _of_keys(decoder: Decoder, layer: int, sizes: Sizes, keep: Tensor) -> list[Cut]:
    """The dimensions `keep` of the key heads leave k, and q in every query head that meets them.
    Both keep their width, with zeros on the way, which add nothing to their product, rotated or
    not. Raises `RecipeError` where a norm follows, whose scale zeros would change.
    """
    family = decoder.family
    if family.norms.heads:
        raise RecipeError(
            f"layer {layer}: '{family.norms.heads[-1]}' takes the scale of all numbers of a key, so"
            " no key dimension can go; take value dimensions"
        )
    others = _others(sizes, keep)
    gone = {
        "k": family.rows("k", sizes)[others],
        "q": family.rows("q", sizes)[_of_queries(sizes, others)],
    }
    rows: dict[str, list[Tensor]] = {}
    for role, places in gone.items():
        rows.setdefault(family.path(role), []).append(places)
    return [
        Cut(path, rows=_left(decoder, layer, path, torch.cat(places)), scattered=True)
        for path, places in rows.items()
    ]


def _others(sizes: Sizes, keep: Tensor) -> Tensor:
    """The dimensions of key-value heads that are not among `keep`."""
    stay = torch.zeros(sizes.kv_heads * sizes.head_dim, dtype=torch.bool)
    return (~stay.index_fill(0, keep.long().cpu(), True)).nonzero()[:, 0]


def _of_queries(sizes: Sizes, places: Tensor) -> Tensor:
    """Where these dimensions of key-value heads are in all query heads of their groups, rising."""
    head, place = places.cpu() // sizes.head_dim, places.cpu() % sizes.head_dim
    queries = head[:, None] * sizes.group + torch.arange(sizes.group)
    return (queries * sizes.head_dim + place[:, None]).flatten().sort().values


def _left(decoder: Decoder, layer: int, path: str, gone: Tensor) -> Tensor:
    """The rows of a matrix, which keeps its width, without these."""
    height = features(decoder.layer(layer).module.get_submodule(path))[1]
    stay = torch.ones(height, dtype=torch.bool)
    return stay.index_fill(0, gone, False).nonzero()[:, 0]


def _rows(decoder: Decoder, sizes: Sizes, units: dict[str, list[int]]) -> dict[str, Tensor]:
    """Matrix -> the rows, rising, that these units of its roles are."""
    found: dict[str, list[Tensor]] = {}
    for role, chosen in units.items():
        rows = decoder.family.rows(role, sizes, chosen)
        found.setdefault(decoder.family.path(role), []).append(rows)
    return {path: torch.cat(parts).sort().values for path, parts in found.items()}
