"""What a long compression writes down on its way, so that a killed run goes on where it was.

A run that goes on does all it did before in the same order, and takes from OUT.journal what is
there: the sums of blocks already shown, and edits already made. Nothing is written before a run is
`WAIT` seconds old. How it is written: `grasp.core.journal_folder`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from grasp.core.destination import beside, shown
from grasp.core.edits import Step, from_spec
from grasp.core.journal_folder import EditLine, Folder, SumsLine
from grasp.core.processes import is_first, rank
from grasp.core.tensor_file import num_bytes
from grasp.errors import CheckpointError, Interrupted, NumericsError, RecipeError

logger = logging.getLogger(__name__)

WAIT = 30.0
"""Seconds of a run that may be lost: a younger one leaves nothing behind."""
SHARE = 0.05
"""Of a sweep's time that may be spent on writing its sums; a finished sweep's may take five times
that, since they save all of it.
"""
SPEED = 5e8
"""Bytes a second that a disk is thought to take, until one was seen at it."""

Made = TypeVar("Made")


class Summing(Protocol):
    """What has sums that may be kept: collectors, the losses of a search."""

    sums: dict[str, Tensor]

    @property
    def name(self) -> str:
        """What they are sums of."""

    def take(self, key: str, value: Tensor) -> None:
        """Begin the sum `key` with what was summed up before."""


class Sums:
    """Where the sums of one sweep are kept. `blocks`, `loss` and `tokens` say what is in the
    collectors' sums already.
    """

    def __init__(self, journal: Journal, number: int, collectors: Sequence[Summing]):
        self.journal, self.number, self.collectors = journal, number, collectors
        self.blocks, self.loss, self.tokens = 0, 0.0, 0
        self.began = self.written = time.perf_counter()
        self.cost: float | None = None

    def add(self, loss: float, tokens: int, last: bool) -> None:
        """One more block has been shown; write the sums if it is time to."""
        self.blocks, self.loss, self.tokens = (
            self.blocks + 1,
            self.loss + loss,
            self.tokens + tokens,
        )
        if not self.journal.due():
            return
        sums = {
            f"{place}/{key}": value
            for place, collector in enumerate(self.collectors)
            for key, value in collector.sums.items()
        }
        begin = time.perf_counter()
        cost = num_bytes(sums) / SPEED if self.cost is None else self.cost
        since, share = (self.began, 5 * SHARE) if last else (self.written, SHARE)
        if cost <= (begin - since) * share:
            self._write(sums)
            self.written = time.perf_counter()
            self.cost = self.written - begin

    def _write(self, sums: Mapping[str, Tensor]) -> None:
        line = SumsLine(
            sweep=self.number,
            names=[collector.name for collector in self.collectors],
            blocks=self.blocks,
            loss=self.loss,
            tokens=self.tokens,
            on_cpu=[key for key, value in sums.items() if value.device.type == "cpu"],
        )
        self.journal.write(line, sums, f"sums-{self.number}-{self.blocks}")


class Journal:
    """The journal of one run, begun at `began` (`time.perf_counter`). Without a folder it remembers
    nothing. `at_once`: also a young run is written down, since nothing of it may wait in memory.
    """

    def __init__(self, folder: Path | None = None, began: float = 0.0):
        self.folder = None if folder is None else Folder(folder)
        self.began = began
        self.at_once = False
        self.is_open = False
        self._identity: dict[str, Any] | None = None
        self._sweeps = 0
        self._made: list[tuple[str, Step]] = []
        self._waiting: list[tuple[EditLine, Step]] = []

    # --- begin and end

    def claim(self, resume: bool) -> None:
        """Look for what an earlier run left, and lock it. Raises `CheckpointError` where another
        process is at it, or where it would be lost.
        """
        if self.folder is None:
            return
        self.folder.look()
        if self.folder.holds and not resume:
            raise CheckpointError(
                f"{shown(self.folder.path)}: an unfinished run, with {self._content}; go on from it"
                " with --resume, or remove it to begin anew"
            )
        if resume and not self.folder.holds:
            logger.warning("--resume: %s holds no run; beginning anew", shown(self.folder.path))

    def accept(self, identity: dict[str, Any]) -> None:
        """Say what the run is: what makes its numbers, by name, as JSON has it; hashes are 64
        digits. Raises `CheckpointError` naming what differs from the run that is gone on from.
        """
        now = json.loads(json.dumps(identity))
        if self.folder is not None and self.folder.holds:
            before = self.folder.identity()
            for name in dict.fromkeys([*now, *before]):
                one, other = before.get(name), now.get(name)
                if one == other:
                    continue
                how = f"{name} {one}, not {other}"
                if len(str(one)) == len(str(other)) == 64:
                    how = f"other {name}"
                raise CheckpointError(
                    f"--resume: {shown(self.folder.path)} was begun with {how}; give the same, or"
                    " remove it to begin anew"
                )
            self.folder.tidy()
            self.is_open = True
        self._identity = now

    def due(self) -> bool:
        """Whether the run is old enough to be written down; begins to, where it is. Raises
        `CheckpointError` where another process has begun to meanwhile.
        """
        if self.is_open or self.folder is None or self._identity is None:
            return self.is_open
        if not self.at_once and time.perf_counter() - self.began < WAIT:
            return False
        try:
            self.folder.begin(self._identity)
        except OSError as failure:
            self._give_up(failure)
            return False
        self.is_open = True
        waiting, self._waiting = self._waiting, []
        for line, step in waiting:
            self.write(line, step.edit.tensors(), f"edit-{line.number}")
        return self.is_open

    def write(self, line: EditLine | SumsLine, tensors: Mapping[str, Tensor], name: str) -> None:
        """Write a line and its tensors. A disk that refuses ends the journal, not the run."""
        if self.folder is not None and self.is_open:
            try:
                self.folder.write(line, tensors, name)
            except OSError as failure:
                self._give_up(failure)

    def remove(self) -> None:
        """Away with all that this run wrote or went on from. Another's may have come meanwhile."""
        if self.folder is not None and self.is_open:
            self.folder.remove()
            self.is_open = False

    def close(self) -> None:
        """Give the lock back."""
        if self.folder is not None:
            self.folder.close()

    def kept(self) -> str:
        """What an ended run leaves, and how to go on; "" where it is nothing, which is removed."""
        if self.folder is None or not self.folder.holds:
            self.remove()
            return ""
        return (
            f"the journal in {self.folder.path} keeps {self._content}; the same command with"
            " --resume goes on from there"
        )

    # --- what a run asks

    def once(self, key: str, make: Callable[[], Made]) -> Made:
        """The step that was made under this key before, or else what `make()` gives."""
        lines = () if self.folder is None else self.folder.edits.values()
        found = next((line for line in lines if line.key == key), None)
        step: Any = None if found is None else self._step(found)
        if step is None:
            step = make()
        self._made.append((key, step))
        return step

    def repeated(self, number: int, step: Step) -> Step:
        """Step number `number` as it was taken before, where it was. Raises `CheckpointError` where
        that was another one.
        """
        found = None if self.folder is None else self.folder.edits.get(number)
        if self.folder is None or found is None or (found.key and self._key(step) == found.key):
            return step
        if json.loads(json.dumps(step.edit.spec())) != found.spec:
            raise CheckpointError(
                f"--resume: edit {number} was {_said(found.spec)} and is now"
                f" {_said(step.edit.spec())}, so the run is not the same; remove"
                f" {shown(self.folder.path)} to begin anew"
            )
        return self._step(found) or step

    def record(self, number: int, step: Step, parameters: int) -> None:
        """Step number `number` has been taken; `parameters`: of the model afterwards."""
        key = self._key(step)
        self._made = [one for one in self._made if one[1] is not step]
        if self.folder is None or number in self.folder.edits:
            return
        line = EditLine(
            number=number, key=key, spec=step.edit.spec(), note=step.note, parameters=parameters
        )
        if self.due():
            self.write(line, step.edit.tensors(), f"edit-{number}")
        else:
            self._waiting.append((line, step))

    def sweep(self, collectors: Sequence[Summing], device: torch.device) -> Sums:
        """The next sweep of the run; what its collectors have summed up before is in their sums."""
        found = Sums(self, self._sweeps, collectors)
        self._sweeps += 1
        line = None if self.folder is None else self.folder.sums.get(found.number)
        if self.folder is None or line is None or line.names != [one.name for one in collectors]:
            return found
        try:
            for name, value in self.folder.tensors(line):
                place, _, key = name.partition("/")
                where = "cpu" if name in line.on_cpu else device
                collectors[int(place)].take(key, value.to(where))
        except ValueError as failure:
            logger.warning("%s; that sweep begins anew", failure)
            del self.folder.sums[found.number]
            return found
        found.blocks, found.loss, found.tokens = line.blocks, line.loss, line.tokens
        return found

    def _key(self, step: Step) -> str:
        """The name that a step was made under."""
        return next((key for key, made in self._made if made is step), "")

    def _step(self, line: EditLine) -> Step | None:
        """A step as it was written down; None where its tensors are damaged."""
        assert self.folder is not None
        try:
            return Step(from_spec(line.spec, dict(self.folder.tensors(line))), line.note)
        except ValueError as failure:
            logger.warning("%s; that edit is made again", failure)
            del self.folder.edits[line.number]
            return None

    def _give_up(self, failure: OSError) -> None:
        logger.warning("no journal is kept, so --resume will not help: %s", failure)
        self.is_open = True
        self.remove()
        self.close()
        self.folder = None

    @property
    def _content(self) -> str:
        """What is written down, in words."""
        assert self.folder is not None
        edits, last = len(self.folder.edits), max(self.folder.sums, default=None)
        parts = [f"{edits} edit{'s' * (edits != 1)}"] if edits else []
        if last is not None:
            parts.append(f"the sums of {self.folder.sums[last].blocks} blocks of sweep {last + 1}")
        return " and ".join(parts)


def _said(spec: Mapping[str, Any]) -> str:
    """An edit's spec on a line: "factorize model.layers.1.mlp.up_proj 3"."""
    return " ".join(map(str, spec.values()))


@contextmanager
def journal_of(out: Path | None, resume: bool, began: float) -> Iterator[Journal]:
    """The journal of a run that writes `out`, within the block; gone where that ends well, or ends
    in a way in which the same command would end again.

    Raises `CheckpointError` where a journal is there and `resume` is not said, and `Interrupted`
    with what is kept.
    """
    own = "" if is_first() else f".{rank()}"  # each of several processes keeps its own sums
    journal = Journal(None if out is None else beside(out, f".journal{own}"), began)
    try:
        journal.claim(resume)
        yield journal
        journal.remove()
    except KeyboardInterrupt as stop:
        kept = journal.kept()
        if kept:
            raise Interrupted(kept) from stop
        raise
    except (RecipeError, NumericsError):
        journal.remove()
        raise
    except Exception:
        kept = journal.kept() if journal.is_open else ""
        if kept:
            logger.warning(kept)
        raise
    finally:
        journal.close()
