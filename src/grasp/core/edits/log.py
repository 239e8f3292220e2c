"""The log of edits: what was done to a model, in order, and what the method thought of it.

It is the entry "edits" of `grasp.json`. Those who come after (recover, report, card, plots) ask the
edits in it; none of them knows a kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct, convert, structs, to_builtins

from grasp.core import documents
from grasp.core.edits.base import Edit, Summary, layer_of
from grasp.core.edits.kinds import from_spec, schema_of

if TYPE_CHECKING:
    from torch import Tensor

    from grasp.core.families import Family
    from grasp.core.records import Attribution

Number = Annotated[int, Meta(ge=0)]


class Note(Struct, frozen=True, omit_defaults=True):
    """What a method thought of an edit.

    `kept`: the singular groups that a pair holds, by falling sigma; `score`, `scores` and
    `singular_values`: of all groups, where the method chose among them. `predicted_loss`: by how
    many nats a token it expects the loss to rise on text that was not seen; `seen_loss`: on the
    calibration text itself, where that is told apart.
    """

    kept: list[Number] | None = None
    score: str = ""
    scores: list[float] | None = None
    singular_values: list[float] | None = None
    predicted_loss: float | None = None
    seen_loss: float | None = None


def noted(
    scored: Attribution,
    kept: Tensor,
    predicted_loss: float | None = None,
    seen_loss: float | None = None,
) -> Note:
    """What a method thinks of a pair that holds the groups `kept` of those it scored."""
    scores, sigmas = _short(scored.scores), _short(scored.singular_values)
    return Note(kept.tolist(), scored.score, scores, sigmas, predicted_loss, seen_loss)


def _short(values: Tensor) -> list[float]:
    """Five significant digits: enough to plot, to rank and to compare runs."""
    return [float(f"{value:.5g}") for value in values.tolist()]


@dataclass(frozen=True)
class Step:
    """What a method yields: an edit, and what it thinks of it."""

    edit: Edit
    note: Note = field(default_factory=Note)


@dataclass(frozen=True)
class Entry(Step):
    """A step that was taken; `parameters`: of the model afterwards."""

    parameters: int = 0

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        note = to_builtins(self.note)
        told = {**self.edit.spec(), "parameters": self.parameters}
        return told | ({"note": note} if note else {})


class EditLog(Sequence[Entry]):
    """All entries, in order; `num_layers`: of the model before the first."""

    def __init__(self, entries: Iterable[Entry] = (), num_layers: int = 0):
        self.entries = list(entries)
        self.num_layers = num_layers

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, place: Any) -> Any:
        return self.entries[place]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def append(self, entry: Entry) -> None:
        """One more."""
        self.entries.append(entry)

    @property
    def layers(self) -> set[int]:
        """Decoder layers that an edit touched."""
        return {layer for entry in self for layer in entry.edit.layers}

    @property
    def gone(self) -> list[int]:
        """Decoder layers that are no more."""
        return sorted({layer for entry in self for layer in entry.edit.summary().gone})

    @property
    def left(self) -> list[int]:
        """For every layer that is left, which one it was."""
        gone = set(self.gone)
        return [layer for layer in range(self.num_layers) if layer not in gone]

    @property
    def places(self) -> list[int]:
        """Where the layers are now that an edit touched, and that are left."""
        return [place for place, layer in enumerate(self.left) if layer in self.layers]

    def trainable(self, family: Family) -> list[str]:
        """Paths of the parameters that edits put there, in the model as it was saved."""
        return self._now(path for entry in self for path in entry.edit.trainable(family))

    def ranks(self) -> dict[str, int]:
        """The rank of every low-rank matrix, by its path in the model as it was saved."""
        found = {one.path: one.rank for one in (entry.edit.summary() for entry in self)}
        paths = [path for path, rank in found.items() if rank is not None]
        return {now: found[path] or 0 for path in paths for now in self._now([path])}

    def _now(self, paths: Iterable[str]) -> list[str]:
        """The paths with the layers numbered anew, without those of layers that are gone."""
        left = self.left
        return [renumbered(path, left) for path in dict.fromkeys(paths) if layer_of(path) in left]

    @property
    def carried(self) -> bool:
        """Whether the model holds modules of ours. Where all that is left of them are MLPs of one
        width in every layer, it is an ordinary model of that width (`widths.settle`).
        """
        left = set(self.left)
        edits = [one.edit for one in self if one.edit.carried and left & set(one.edit.layers)]
        widths = {layer: edit.mlp_width for edit in edits for layer in edit.layers}
        ordinary = left <= widths.keys() and len(set(widths.values())) == 1
        return bool(edits) and not (ordinary and None not in (edit.mlp_width for edit in edits))

    @property
    def served(self) -> bool:
        """Whether vLLM serves the model."""
        return all(entry.edit.served for entry in self)

    def summaries(self) -> list[Summary]:
        """Every edit for people."""
        return [entry.edit.summary() for entry in self]

    def counts(self) -> dict[str, int]:
        """How many edits of each kind, in the words of their summaries."""
        found: dict[str, int] = {}
        for entry in self:
            what = entry.edit.summary().what
            found[what] = found.get(what, 0) + 1
        return found

    def rises(self) -> tuple[float, float] | None:
        """By how much the edits say together that the loss rises, on text that was not seen and on
        the calibration text, nats a token; None where one of them does not say it.
        """
        notes = [entry.note for entry in self]
        expected = [one.predicted_loss for one in notes if one.predicted_loss is not None]
        if not notes or len(expected) < len(notes):
            return None
        seen = [
            rise if one.seen_loss is None else one.seen_loss
            for one, rise in zip(notes, expected, strict=True)
        ]
        return sum(expected), sum(seen)

    def to_json(self) -> list[dict[str, Any]]:
        """The manifest's "edits"."""
        return [entry.to_json() for entry in self]


def renumbered(path: str, left: Sequence[int]) -> str:
    """A path whose layer's number is that layer's place in `left`."""
    parts = path.split(".")
    place = next(number for number, part in enumerate(parts) if part.isdigit())
    return ".".join([*parts[:place], str(left.index(int(parts[place]))), *parts[place + 1 :]])


class _Entry(Struct):
    edit: str
    parameters: Number = 0
    note: Note = Note()


FLAT = tuple(one.name for one in structs.fields(Note))
"""Format 3 and earlier kept the note among the edit's own entries."""


def checked_entries(path: Path, found: Sequence[Any], hint: str) -> list[dict[str, Any]]:
    """The entries of a manifest at `path`, notes in their place. Raises `CheckpointError` for what
    makes no sense.
    """
    return [_checked(path, entry, hint, f"edits[{place}]") for place, entry in enumerate(found)]


def _checked(path: Path, found: Any, hint: str, at: str) -> dict[str, Any]:
    entry = documents.check(path, found, dict, hint, at=at).copy()
    if "note" not in entry and (note := {key: entry.pop(key) for key in FLAT if key in entry}):
        entry["note"] = note
    told = documents.check(path, entry, _Entry, hint, at=at)
    documents.check(path, entry, schema_of(path, told.edit, hint), hint, at=at)
    return entry


def read_log(manifest: Mapping[str, Any]) -> EditLog:
    """The log in a manifest, as `grasp.core.manifest.read_manifest` gives it."""
    entries = (
        Entry(from_spec(one), convert(one.get("note", {}), Note), int(one.get("parameters", 0)))
        for one in manifest["edits"]
    )
    return EditLog(entries, int(manifest["model"]["num_layers"]))
