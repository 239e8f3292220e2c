"""Weights that several processes share: each holds some rows of every matrix, and all put them
together when a layer is used, as FSDP2 does (Zhao et al., arXiv 2304.11277).

FSDP2's `fully_shard` cannot follow edits, which change which parameters a layer has and their
shapes. So parameters stay what they are (`grasp.core.offload`), and only what they hold comes from
the processes. Every process has to ask for the same weights in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from grasp.core.processes import rank, world_size

gather_all: Callable[[Tensor, Tensor], object] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch before 2.13
)
Rows = Callable[[int, int], Tensor]
"""The rows of a weight from one number to another."""


class Shards:
    """This process's rows of the weights that were asked for."""

    def __init__(self) -> None:
        self._own: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> (where it lay, its rows)

    def whole(
        self, weights: Sequence[nn.Parameter], sources: Sequence[tuple[object, Rows]]
    ) -> list[Tensor]:
        """The numbers of these weights, by all processes together; of each, where it lies and what
        reads it there. Its rows are read once, and again when it lies elsewhere.
        """
        own = [self._rows(one, *source) for one, source in zip(weights, sources, strict=True)]
        given = torch.cat([one.reshape(-1).view(torch.uint8) for one in own])
        found = given.new_empty(world_size() * len(given))
        gather_all(found, given)
        sizes = [one.numel() * one.element_size() for one in own]
        columns = found.view(world_size(), -1).split(sizes, dim=1)
        return [
            part.reshape(-1).view(one.dtype).view(-1, *one.shape[1:])[: one.shape[0]]
            for part, one in zip(columns, weights, strict=True)
        ]

    def keep(self, weights: Iterable[nn.Parameter]) -> None:
        """Forget the rows of all others."""
        wanted = {id(one) for one in weights}
        for one in [one for one in self._own if id(one) not in wanted]:
            del self._own[one]

    def _rows(self, weight: nn.Parameter, place: object, read: Rows) -> Tensor:
        """Those of this process, as many as every process has: the last may have zeros behind."""
        known, rows = self._own.get(weight, (None, weight))
        if known == place:
            return rows
        each = math.ceil(weight.shape[0] / world_size())
        begin = min(rank() * each, weight.shape[0])
        end = min(begin + each, weight.shape[0])
        rows = weight.new_zeros(each, *weight.shape[1:])
        if begin < end:
            rows[: end - begin] = read(begin, end).to(rows)
        self._own[weight] = (place, rows)
        return rows
