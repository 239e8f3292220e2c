"""Paths -> what a report can show: results files and the manifests of checkpoints, found where a
user points.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grasp.core.edits import EditLog, Entry, place_of, read_log
from grasp.core.manifest import MANIFEST, read_manifest
from grasp.core.results import KIND, Results
from grasp.errors import CheckpointError
from grasp.report.bounds import LIMITS, bounded, shortened
from grasp.report.kept import Kept, part_of_axis
from grasp.report.old_shapes import part_of

ALLOWED = (
    "a checkpoint (a directory with grasp.json), a results file (of grasp eval, bench, compare or"
    " demo), or a directory that holds some"
)


@dataclass(frozen=True)
class Matrix:
    """A matrix that became low-rank. `groups`: how many it had, 0 where the method did not count
    them.
    """

    path: str
    layer: int
    name: str
    rank: int
    groups: int = 0
    kept: tuple[int, ...] = ()
    score: str = ""
    scores: tuple[float, ...] = ()
    singular_values: tuple[float, ...] = ()
    predicted_loss: float | None = None

    @property
    def keeps_the_first(self) -> bool:
        """Whether the kept groups are those of the largest singular values: then only their number
        was chosen.
        """
        return self.kept == tuple(range(len(self.kept)))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's manifest (`raw`), and its parts that are drawn. `edited`: the layers that an
    edit touched, `dropped` those that are no more. `losses`: what each edit is expected to cost, by
    layer and part of the layer, nats a token; none where one does not say it.
    """

    path: Path
    raw: Mapping[str, Any] = field(repr=False)
    source: str
    method: str
    paper: str
    fields: Mapping[str, Any]
    num_layers: int
    before: int
    after: int
    redundancy_kind: str
    redundancy: Mapping[int, float]
    matrices: tuple[Matrix, ...]
    dropped: tuple[int, ...]
    edited: frozenset[int]
    kept: Kept = field(repr=False)
    losses: tuple[tuple[int, str, float], ...]
    prediction: Mapping[str, float]
    recovery: tuple[Mapping[str, float], ...]
    seconds: Mapping[str, float]

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def ratio(self) -> float:
        """Share of all parameters that is gone."""
        return 1 - self.after / self.before

    @classmethod
    def read(cls, directory: Path) -> Checkpoint:
        """Raises `CheckpointError` where the manifest is damaged."""
        manifest = read_manifest(directory)
        try:
            return cls._of(directory, shortened(manifest, LIMITS[1][0], sys.maxsize))
        except (
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            ValueError,
            ZeroDivisionError,
        ) as failure:
            raise CheckpointError(
                f"{directory / MANIFEST}: the manifest is damaged: {failure!r}; make the checkpoint"
                " again"
            ) from failure

    @classmethod
    def _of(cls, directory: Path, found: dict[str, Any]) -> Checkpoint:
        model = found["model"]
        sizes = found["parameters"]
        method = dict(found["method"])
        log = read_log(found)
        kind, redundancy = next(iter((found.get("redundancy") or {}).items()), ("", {}))
        prediction = {
            str(key): float(value) for key, value in (found.get("prediction") or {}).items()
        }
        curve = (found.get("recovery") or {}).get("curve") or ()
        checkpoint = cls(
            directory,
            found,
            str(model["source"]),
            str(method.pop("name")),
            str(method.pop("paper", "")),
            method,
            int(model["num_layers"]),
            int(sizes["before"]),
            int(sizes["after"]),
            kind,
            {int(layer): float(score) for layer, score in redundancy.items()},
            tuple(_matrix(entry) for entry in log if entry.edit.summary().rank is not None),
            tuple(log.gone),
            frozenset(log.layers),
            Kept.of(found),
            _losses(log),
            prediction,
            tuple(
                {
                    str(key): float(value)
                    for key, value in step.items()
                    if isinstance(value, (int, float))
                }
                for step in curve
            ),
            {str(key): float(value) for key, value in (found.get("seconds") or {}).items()},
        )
        if not 0 < checkpoint.after <= checkpoint.before:
            raise ValueError(f"{checkpoint.before} parameters -> {checkpoint.after}")
        if not all(
            map(math.isfinite, [*checkpoint.redundancy.values(), *checkpoint.prediction.values()])
        ):
            raise ValueError("a score or predicted loss is not finite")
        return checkpoint


def _losses(log: EditLog) -> tuple[tuple[int, str, float], ...]:
    found = []
    for entry in log:
        told, loss = entry.edit.summary(), entry.note.predicted_loss
        if loss is None:
            return ()
        place = place_of(told.path)
        part = "whole layer"
        if place is not None or told.axis:
            part = part_of(place[1]) if place is not None else part_of_axis(told.axis)
        layers = entry.edit.layers
        found += [(layer, part, loss / len(layers)) for layer in layers]
    return tuple(found)


def _matrix(entry: Entry) -> Matrix:
    told, note = entry.edit.summary(), entry.note
    place = place_of(told.path)
    if place is None:
        raise ValueError(f"{told.path}: names no layer")
    scores, values = tuple(note.scores or ()), tuple(note.singular_values or ())
    kept, loss = tuple(note.kept or ()), note.predicted_loss
    numbers = (*scores, *values, *([] if loss is None else [loss]))
    if (
        len(scores) != len(values)
        or not all(map(math.isfinite, numbers))
        or any(not 0 <= group < len(scores) for group in kept if scores)
    ):
        raise ValueError(
            f"{told.path}: scores, singular values and kept groups do not belong together"
        )
    return Matrix(
        told.path,
        *place,
        told.rank or 0,
        len(values),
        kept,
        note.score,
        scores,
        values,
        loss,
    )


@dataclass(frozen=True)
class Material:
    """What was found: results files with their paths, and checkpoints."""

    results: tuple[tuple[Path, Results], ...]
    checkpoints: tuple[Checkpoint, ...]

    @property
    def names(self) -> list[str]:
        """What to call each checkpoint: as little of the end of its path as tells it from the
        others.
        """
        parts = [one.path.absolute().parts for one in self.checkpoints]
        return ["/".join(mine[-_distinct(mine, parts) :]) for mine in parts]


def _distinct(mine: Sequence[str], others: Sequence[Sequence[str]]) -> int:
    """How many of the last parts of a path no other of the paths ends with."""
    return next(
        (
            length
            for length in range(1, len(mine))
            if sum(tuple(other[-length:]) == tuple(mine[-length:]) for other in others) == 1
        ),
        len(mine),
    )


def gather(paths: Sequence[Path]) -> Material:
    """Read everything the paths hold, each thing once. Raises `CheckpointError` where one holds
    nothing, or something damaged.
    """
    places: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"PATH {path}: no such file or directory; give {ALLOWED}")
        found = [_place(path)] if path.is_file() else list(_inside(path))
        if not found:
            raise CheckpointError(f"PATH {path}: holds nothing to report; give {ALLOWED}")
        for place in found:
            places.setdefault(place.resolve(), place)
    if not places:
        raise CheckpointError(f"PATH: nothing was given; give {ALLOWED}")
    files = tuple(
        (place, bounded(Results.read(place))) for place in places.values() if place.is_file()
    )
    return Material(
        files, tuple(Checkpoint.read(place) for place in places.values() if place.is_dir())
    )


def _place(file: Path) -> Path:
    """A results file as it is, a checkpoint for its manifest."""
    return file.absolute().parent if file.name == MANIFEST else file


def _inside(directory: Path) -> Iterator[Path]:
    """The results files and checkpoints in a directory, or one level below. A checkpoint holds no
    others.
    """
    yield from _here(directory)
    if not (directory / MANIFEST).is_file():
        for child in sorted(
            path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")
        ):
            yield from _here(child)


def _here(directory: Path) -> Iterator[Path]:
    if (directory / MANIFEST).is_file():
        yield directory
    for file in sorted(directory.glob("*.json")):
        if not file.name.startswith(".") and (file.name == "results.json" or _is_results(file)):
            yield file


def _is_results(file: Path) -> bool:
    """By its first bytes: a directory may hold other, and large, JSON files."""
    try:
        with file.open("rb") as stream:
            return f'"{KIND}"'.encode() in stream.read(200)
    except OSError:
        return False
