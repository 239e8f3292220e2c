"""`grasp verify DIR`: is a checkpoint what it was when grasp wrote it?

Compares every file with the seal in `grasp.json` (grasp.core.seal), weights too: one pass over the
bytes. Needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grasp.core.manifest import MANIFEST
from grasp.core.seal import FOR_PEOPLE, Difference, differences, read_seal
from grasp.errors import CheckpointError
from grasp.terminal.bars import emit, megabytes, plain, progress_bars, say

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `differences` name files that changed, are gone, or were not there; a
    model card that people edited is not one of them but a note.
    """

    path: Path
    files: int
    bytes: int
    differences: tuple[Difference, ...]
    notes: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        """Whether the checkpoint is what was written."""
        return not self.differences


def verify(
    checkpoint: str | Path, progress: Callable[[str, int, int], None] | None = None
) -> Verification:
    """Compare every file of a checkpoint with what was written.

    Raises `CheckpointError` where grasp did not write it, or wrote it before it kept hashes.
    """
    place = Path(checkpoint).expanduser()
    if not (place / MANIFEST).is_file():
        raise CheckpointError(
            f"DIR {checkpoint}: no {MANIFEST} in it; give a checkpoint that grasp wrote"
        )
    seal, manifest = read_seal(place)
    if seal is None:
        raise CheckpointError(
            f"DIR {checkpoint}: written before grasp kept hashes, so there is nothing to compare"
            " with; make it again to have them"
        )
    total, done = sum(file.bytes for file in seal.files.values()), 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress("megabytes compared", done // MEGABYTE, max(total, done) // MEGABYTE)

    found = differences(place, seal, manifest, count)
    notes = tuple(one for one in found if one.file in FOR_PEOPLE)
    return Verification(
        place, len(seal.files), done, tuple(one for one in found if one not in notes), notes
    )


def show(checkpoint: Path, as_json: bool, quiet: bool) -> bool:
    """Run `verify` and say what differs. Returns whether nothing does."""
    with progress_bars(quiet) as bars:
        seen = verify(checkpoint, bars)
    for one in seen.differences:
        say(f"[red]{one.kind}[/red]  {plain(one)}")
    for one in seen.notes:
        say(f"note: {plain(one)}")
    said = f"{seen.files} files, {megabytes(seen.bytes)}"
    number = len(seen.differences)
    say(
        f"{plain(checkpoint)}: as it was written ({said})"
        if seen.same
        else (
            f"{plain(checkpoint)}: {number} {'difference' if number == 1 else 'differences'}"
            f" ({said} compared)"
        )
    )
    if as_json:
        emit(
            {
                "path": str(seen.path),
                "same": seen.same,
                "files": seen.files,
                "bytes": seen.bytes,
                "differences": [
                    {"file": one.file, "kind": one.kind, "what": one.what}
                    for one in seen.differences
                ],
                "notes": [str(one) for one in seen.notes],
            }
        )
    return seen.same
