"""What a matrix costs in time: decode speed by shape and rank, measured on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from grasp.core.layers.low_rank_grasp import LowRankLinear

POINTS, ROUNDS = 5, 7
COLD_BYTES = 96_000_000
"""Weights touched between two uses of the same ones: more than caches hold, since decoding reads
every weight once a token.
"""


class Latency:
    """Seconds to multiply one token by a matrix of a shape, dense or low-rank. Measured once a
    shape at a few ranks, in turn; between them linear, and never falling with the rank.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, pivoted: bool):
        self.device, self.dtype, self.pivoted = device, dtype, pivoted
        self.tables: dict[tuple[int, int], tuple[list[int], list[float], float]] = {}

    def __call__(self, shape: tuple[int, int], rank: int | None) -> float:
        if shape not in self.tables:
            self.tables[shape] = self._measure(shape)
        ranks, seconds, dense = self.tables[shape]
        if rank is None:
            return dense
        place = max(i for i, r in enumerate(ranks) if r <= rank)
        if place + 1 == len(ranks):
            return seconds[place]
        share = (rank - ranks[place]) / (ranks[place + 1] - ranks[place])
        return seconds[place] + share * (seconds[place + 1] - seconds[place])

    @torch.no_grad()
    def _measure(self, shape: tuple[int, int]) -> tuple[list[int], list[float], float]:
        """(ranks, seconds at each, seconds dense): medians over rounds in which all variants run in
        turn.
        """
        m, n = shape
        short = min(m, n)
        ranks = sorted(
            {round(short * i / (POINTS - 1)) for i in range(1, POINTS)} - {short}
            | {1, short - 1} - {0}
        )
        variants: list[Callable[[], Any]] = [lambda: nn.Linear(n, m, bias=False)]
        variants += [lambda r=r: LowRankLinear(n, m, r, False, pivoted=self.pivoted) for r in ranks]  # type: ignore[misc]
        stacks = []
        for make in variants:
            module = make()
            size = sum(p.numel() for p in module.parameters()) * self.dtype.itemsize
            copies = [module, *(make() for _ in range(min(COLD_BYTES // max(size, 1), 63)))]
            stacks.append([self._filled(copy) for copy in copies])
        x = torch.ones(1, n, dtype=self.dtype, device=self.device)
        times: list[list[float]] = [[] for _ in stacks]
        for _ in range(ROUNDS):
            for number, stack in enumerate(stacks):
                begin = time.perf_counter()
                for module in stack:
                    result = module(x)
                float(result[0, 0])  # waits for the device
                times[number].append((time.perf_counter() - begin) / len(stack))
        medians = [sorted(values)[ROUNDS // 2] for values in times]
        rising = torch.tensor(medians[1:]).cummax(0).values.tolist()
        return [0, *ranks], [0.0, *rising], medians[0]

    def _filled(self, module: nn.Module) -> nn.Module:
        """A module of small weights on the device; a pivoted pair's places in order."""
        state = {
            name: torch.full(value.shape, 1 / 64) for name, value in module.state_dict().items()
        }
        if "places" in state:
            state["places"] = torch.arange(len(state["places"]), dtype=torch.int32)
        module.load_state_dict(state)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module.to(self.device, self.dtype)
