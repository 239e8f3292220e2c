"""Several processes with a copy of the model each, which share the blocks of the calibration set.

Statistics are additive: each process shows its blocks, and the sums are added up. Decompositions
are shared out, and every process gets those of the others. So all of them see the same, choose the
same edits, and make them on their own copies. The first writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.freed import given_back
from grasp.core.held import Looked
from grasp.core.journal import Journal, Sums
from grasp.core.offloaded import Offloaded
from grasp.core.processes import add_up, of_all, rank, world_size
from grasp.core.records import Calibration
from grasp.core.runner import Item, Resident, Runner
from grasp.core.sharing import Tensors, over_processes
from grasp.errors import GraspError


class Several(Resident):
    """One of several processes (`grasp.core.processes.joined`)."""

    def each(
        self,
        work: Callable[[Item], Tensors],
        items: Sequence[Item],
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensors]:
        yield from over_processes(work, items, keep, self.decoder.workers)

    def _own(self, blocks: Sequence[int]) -> Sequence[int]:
        return blocks[rank() :: world_size()]

    def _together(
        self, collectors: Sequence[Collector], loss: float | None, tokens: int
    ) -> tuple[float | None, int]:
        for collector in collectors:
            add_up(collector.sums, self.decoder.device)
        numbers = {"loss": torch.tensor(loss or 0.0, dtype=torch.float64)}
        numbers["tokens"] = torch.tensor(tokens)
        add_up(numbers, self.decoder.device)
        return None if loss is None else float(numbers["loss"]), int(numbers["tokens"])


class SeveralOffloaded(Offloaded, Several):
    """One of several processes, each of which has one layer in memory at a time. Where they share
    the weights, all make the same passes.
    """

    def show(
        self,
        collectors: Sequence[Collector],
        blocks: Sequence[int],
        task: str = "sweep",
        kept: Sums | None = None,
        layers: Looked | None = None,
    ) -> tuple[float | None, int]:
        # a pass through some layers begins where it can, for each block elsewhere
        in_step = self.offload.shards is not None and layers is None
        with ExitStack() as stack:
            if in_step:
                stack.enter_context(given_back())
                stack.enter_context(self.offload.in_step(self.decoder.stack))
            return super().show(collectors, blocks, task, kept, layers)

    def _passes_of_all(self, passes: int) -> int:
        return max(of_all(passes)) if self.offload.is_in_step else passes


def runner_for(decoder: Decoder, data: Calibration, journal: Journal | None = None) -> Runner:
    """The runner that a model needs, as it was loaded, and by as many processes as there are.
    Raises `GraspError` where these have not the same text.
    """
    check_same("calibration text", data.ids_hash)
    in_memory, alone = decoder.offload is None, world_size() == 1
    if alone:
        return (Resident if in_memory else Offloaded)(decoder, data, journal)
    return (Several if in_memory else SeveralOffloaded)(decoder, data, journal)


def check_same(what: str, value: Any) -> None:
    """Raise `GraspError` where several processes do not have the same JSON value."""
    if world_size() == 1:
        return
    said = json.dumps(value, sort_keys=True)
    found = of_all(hashlib.sha256(said.encode()).hexdigest())
    if odd := [number for number, other in enumerate(found) if other != found[0]]:
        raise GraspError(
            f"process {odd[0]} has other {what} than process 0: take machines of one kind with the"
            " same files and packages, or one process"
        )
