"""A manifest -> what every layer kept: the cells of the picture (`picture.py`).

A cell is a matrix of a layer, or a width of it; its share is what is left of its numbers, from 0
(gone) to 1. The manifest's "layers" say what there was of every matrix and what is left, its edits
how many channels, groups and dimensions. A manifest from before "layers" was kept says it by ranks
and parameter counts only (`old_shapes.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grasp.core.edits import EditLog, Summary, read_log
from grasp.report.old_shapes import shapes_from_ranks

ATTENTION, MLP = "attention", "mlp"
AXES = {
    "channels": "MLP channels",
    "kv_groups": "KV groups",
    "value_dims": "value dims",
    "key_dims": "key dims",
}
"""Axes that can become narrower, in the words of the picture."""


@dataclass(frozen=True)
class Cell:
    """One matrix, or one width, of one layer: how many numbers there were (`of`) and are (`left`),
    whether that is a low-rank pair (of this `rank`), whether it became `narrower`.
    """

    of: int
    left: int
    rank: int | None = None
    narrower: bool = False

    @property
    def share(self) -> float:
        """What is left, 0 to 1: a pair near full rank may store more than the matrix did."""
        return min(1.0, self.left / self.of) if self.of else 0.0

    @property
    def whole(self) -> bool:
        """Whether it is as it was."""
        return self.rank is None and not self.narrower and self.left >= self.of

    @property
    def how(self) -> str:
        """What was done, in words."""
        if not self.left:
            return "gone"
        pair = None if self.rank is None else f"low-rank, rank {self.rank:,}"
        return " and ".join(filter(None, ("narrower" if self.narrower else None, pair))) or "dense"


@dataclass(frozen=True)
class Strip:
    """A row of the picture: the cells of one matrix, or of one width, by layer."""

    name: str
    cells: Mapping[int, Cell]
    is_width: bool = False

    @property
    def share(self) -> float:
        """What is left of it in all layers together."""
        return _share(self.cells.values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """Those of its low-rank pairs, rising."""
        return tuple(sorted({c.rank for c in self.cells.values() if c.rank is not None}))

    @property
    def lefts(self) -> tuple[int, ...]:
        """How many are left, rising, of layers that have some."""
        return tuple(sorted({cell.left for cell in self.cells.values() if cell.left}))

    @property
    def most(self) -> int:
        """The most that a layer had."""
        return max((cell.of for cell in self.cells.values()), default=0)


@dataclass(frozen=True)
class Kept:
    """What every layer of a model kept. `parts`: the strips of the matrices, by part of the layer;
    `widths`: of the axes on which a layer became narrower; `removed`: layers that are no more.
    """

    num_layers: int
    parts: Mapping[str, tuple[Strip, ...]]
    widths: tuple[Strip, ...]
    removed: tuple[int, ...]

    @property
    def strips(self) -> tuple[Strip, ...]:
        """All matrices."""
        return tuple(strip for strips in self.parts.values() for strip in strips)

    @property
    def whole(self) -> Strip:
        """All matrices of a layer taken together."""
        found: dict[int, list[Cell]] = {}
        for strip in self.strips:
            for layer, cell in strip.cells.items():
                found.setdefault(layer, []).append(cell)
        sums = {
            layer: Cell(sum(c.of for c in cells), sum(c.left for c in cells))
            for layer, cells in found.items()
        }
        return Strip("all matrices", sums)

    @property
    def changed(self) -> bool:
        """Whether anything of this is not as it was."""
        cells = [c for strip in (*self.strips, *self.widths) for c in strip.cells.values()]
        return bool(self.removed) or not all(cell.whole for cell in cells)

    def without(self, part: str) -> list[int]:
        """Layers that are still there, but have nothing left of a part."""
        strips = self.parts.get(part, ())
        layers = {layer for strip in strips for layer in strip.cells} - set(self.removed)
        return sorted(
            layer
            for layer in layers
            if not any(strip.cells[layer].left for strip in strips if layer in strip.cells)
        )

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Kept:
        """Of a manifest as `read_manifest` gives it."""
        log = read_log(manifest)
        removed = set(log.gone)
        layers = manifest.get("layers")
        if layers is None:
            layers = shapes_from_ranks(log, manifest["parameters"]["before"])
        cells: dict[str, dict[str, dict[int, Cell]]] = {ATTENTION: {}, MLP: {}}
        for layer, found in enumerate(layers):
            for part in cells:
                for name, told in found.get(part, {}).items():
                    cell = _matrix(told, layer in removed)
                    cells[part].setdefault(name, {})[layer] = cell
        names = short_names([name for found in cells.values() for name in found])
        parts = {
            part: tuple(Strip(names[name], by_layer) for name, by_layer in found.items())
            for part, found in cells.items()
            if found
        }
        kept = cls(len(layers) or log.num_layers, parts, (), tuple(sorted(removed)))
        gone = {part: {*removed, *kept.without(part)} for part in cells}
        widths = tuple(_widths(log, layers, gone))
        return cls(kept.num_layers, parts, widths, kept.removed)


def _matrix(told: Mapping[str, Any], removed: bool) -> Cell:
    (rows, columns), left = told["of"], told["left"]
    if removed or not told["numbers"]:
        return Cell(rows * columns, 0)
    narrower = left[0] < rows or left[1] < columns
    return Cell(rows * columns, told["numbers"], told.get("rank"), narrower)


def _widths(
    log: EditLog, layers: Sequence[Mapping[str, Any]], gone: Mapping[str, set[int]]
) -> Iterator[Strip]:
    """The axes on which some layer became narrower, as all layers have them."""
    lefts: dict[tuple[str, int], Summary] = {}
    for entry in log:
        told = entry.edit.summary()
        if told.axis:
            lefts |= {(told.axis, layer): told for layer in entry.edit.layers}
    for axis in dict.fromkeys([*AXES, *(axis for axis, _ in lefts)]):
        if not any(narrowed == axis for narrowed, _ in lefts):
            continue
        cells = {}
        for layer in range(max(len(layers), log.num_layers)):
            cut = lefts.get((axis, layer))
            was = layers[layer]["widths"].get(axis) if layer < len(layers) else None
            of = (cut.of if cut else None) if was is None else was
            if not of:
                continue
            absent = layer in gone[part_of_axis(axis)]
            left = min(cut.left, of) if cut else of
            groups = lefts.get(("kv_groups", layer))
            if axis in ("value_dims", "key_dims") and cut is None and groups and groups.of:
                left = of * groups.left // groups.of  # they went with their group
            left = 0 if absent else left
            cells[layer] = Cell(of, left, narrower=0 < left < of)
        if cells:
            yield Strip(AXES.get(axis, axis.replace("_", " ")), cells, is_width=True)


def part_of_axis(axis: str) -> str:
    """The part of a layer whose width it is."""
    return MLP if axis in ("channels", "experts") else ATTENTION


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Path of a matrix inside its layer -> what to call it: its last part, if only one ends so."""
    last = Counter(name.rsplit(".", 1)[-1] for name in names)
    return {name: tail if last[tail := name.rsplit(".", 1)[-1]] == 1 else name for name in names}


def _share(cells: Any) -> float:
    found = list(cells)
    of = sum(cell.of for cell in found)
    return min(1.0, sum(cell.left for cell in found) / of) if of else 0.0
