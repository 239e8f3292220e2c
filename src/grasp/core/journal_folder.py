"""The folder that a journal lies in: what is in its files, and how they are written so that a
crash, at any moment, loses no more than the last line.

    run.json         what the run is
    log.jsonl        a line for every edit, and for the sums of a sweep so far
    *.safetensors    the tensors of a line, named in it with their sha256

A line is written after its tensors are on the disk, so a line that is there is whole; one that was
cut, or whose file is gone, is as if it had never been.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from torch import Tensor

from grasp.core.destination import shown
from grasp.core.edits import Note
from grasp.core.partial import hold
from grasp.core.tensor_file import read_tensors, write_tensors
from grasp.core.writing import to_disk
from grasp.errors import CheckpointError

RUN, LOG = "run.json", "log.jsonl"


class Line(Struct, kw_only=True):
    """A line of the log; `file` holds its tensors."""

    file: str = ""
    sha256: str = ""


class EditLine(Line, tag="edit"):
    """Edit number `number` of the run, made under the name `key`, if any."""

    number: int
    key: str
    spec: dict[str, Any]
    note: Note
    parameters: int


class SumsLine(Line, tag="sums"):
    """The sums of the first `blocks` blocks of sweep number `sweep`, by the collectors `names`;
    `on_cpu`: those that lay in the computer's memory, whatever the model's device.
    """

    sweep: int
    names: list[str]
    blocks: int
    loss: float
    tokens: int
    on_cpu: list[str]


class Folder:
    """The folder at `path`, which may not be there yet, and its lines."""

    def __init__(self, path: Path):
        self.path = path
        self.edits: dict[int, EditLine] = {}
        self.sums: dict[int, SumsLine] = {}
        self._held = ExitStack()
        self._new: list[Path] = []

    @property
    def holds(self) -> bool:
        """Whether there is anything to lose."""
        return bool(self.edits or self.sums)

    def look(self) -> None:
        """Lock what an earlier run left and read it; what cannot be read was not written, and a
        folder with nothing in it is removed.

        Raises `CheckpointError` where another process is at it, or where it is no journal.
        """
        if not self.path.is_dir():
            return
        self._lock()
        with suppress(OSError, msgspec.DecodeError):
            self.identity()
            for line in (self.path / LOG).read_bytes().splitlines():
                with suppress(msgspec.DecodeError, UnicodeDecodeError):
                    found = msgspec.json.decode(line, type=EditLine | SumsLine)
                    if (self.path / found.file).is_file():
                        self._keep(found)
        if not self.holds:
            self._clear()

    def identity(self) -> dict[str, Any]:
        """What the run is that wrote this."""
        return msgspec.json.decode((self.path / RUN).read_bytes(), type=dict[str, Any])

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Make the folder. Raises `CheckpointError` where somebody else has, `OSError` where it
        cannot be made.
        """
        home = self.path.parent
        self._new = [one for one in (home, *home.parents) if not one.exists()]
        home.mkdir(parents=True, exist_ok=True)
        try:
            self.path.mkdir()
        except FileExistsError:
            raise self._taken() from None
        self._lock()
        self._replace(RUN, json.dumps(identity).encode())
        to_disk(home)

    def write(self, line: EditLine | SumsLine, tensors: Mapping[str, Tensor], name: str) -> None:
        """Write tensors to the file `name`, then the line that makes them count. Raises `OSError`
        for what the disk refuses.
        """
        path = self.path / f"{name}.safetensors"
        path.unlink(missing_ok=True)
        line.file, line.sha256 = path.name, write_tensors(path, tensors)
        to_disk(self.path)
        with (self.path / LOG).open("ab") as log:
            log.write(msgspec.json.encode(line) + b"\n")
            log.flush()
            os.fsync(log.fileno())
        before = self._keep(line)
        if before is not None and before.file != line.file:
            with suppress(OSError):
                (self.path / before.file).unlink()

    def tensors(self, line: Line) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a line. Raises `ValueError` naming the file where they are damaged."""
        path = self.path / line.file
        try:
            yield from read_tensors(path, line.sha256)
        except ValueError as failure:
            raise ValueError(f"--resume: {shown(path)}: {failure}") from failure

    def tidy(self) -> None:
        """Write the log anew without what was cut, and remove the files that no line names."""
        lines = [*self.sums.values(), *self.edits.values()]
        self._replace(LOG, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        named = {RUN, LOG, *(line.file for line in lines)}
        for path in self.path.iterdir():
            if path.name not in named:
                path.unlink()

    def remove(self) -> None:
        """Away with it, and with the folders that were made for it where they are empty."""
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._new:
            with suppress(OSError):
                folder.rmdir()
        self.edits, self.sums, self._new = {}, {}, []

    def close(self) -> None:
        """Give the lock back."""
        self._held.close()

    def _keep(self, line: EditLine | SumsLine) -> Line | None:
        """Remember a line; gives the one in whose place it stands."""
        before: Line | None
        if isinstance(line, EditLine):
            before, self.edits[line.number] = self.edits.get(line.number), line
        else:
            before, self.sums[line.sweep] = self.sums.get(line.sweep), line
        return before

    def _replace(self, name: str, data: bytes) -> None:
        """A small file, whole or as it was."""
        new = self.path / f"{name}.new"
        new.write_bytes(data)
        to_disk(new)
        os.replace(new, self.path / name)
        to_disk(self.path)

    def _clear(self) -> None:
        ours = {RUN, f"{RUN}.new", LOG, f"{LOG}.new"}
        for path in self.path.iterdir():
            if path.name not in ours and path.suffix != ".safetensors":
                raise CheckpointError(
                    f"{shown(self.path)}: the journal of the run would be here, but it holds"
                    f" {path.name}; move it away, or choose another OUT"
                )
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _lock(self) -> None:
        try:
            self._held.enter_context(hold(self.path))
        except BlockingIOError:
            raise self._taken() from None

    def _taken(self) -> CheckpointError:
        return CheckpointError(
            f"{shown(self.path)}: another process is compressing there; wait for it, or choose"
            " another OUT"
        )
