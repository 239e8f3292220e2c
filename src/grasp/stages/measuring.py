"""How long variants of some matrices take, as shares of the first variant's time.

All variants run in short turns, in many rounds, and the lowest tenth of a variant's turns counts:
other work on the machine only ever adds time. Decoding reads every weight once a token, so caches
do not help it: the variants' numbers lie one behind another in one ring of memory, and many bytes
are touched before the same ones are used again. The ring is all the memory that this takes.
"""

from __future__ import annotations

import copy
import math
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grasp.core.clock import Clock
from grasp.core.layers.low_rank_grasp import fuse
from grasp.core.layers.reading_grasp import features
from grasp.stages.in_place import Times, lowest_tenth

ROUNDS, LEAST_ROUNDS = 12, 4
"""After one of warm-up."""
ENOUGH = 1.5
"""Seconds after which no other round begins, once there are a few."""
COLD_BYTES = 256_000_000
"""Of the ring: more than caches hold."""
MOST_COPIES, LEAST_COPIES = 8, 2
"""That a variant runs in its turn, so that a turn is long enough to be timed."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Variant:
    """Modules without memory (meta device) that read one tensor, by the name they have in their
    parent. `fused`: their first products run as one, where their names say that they may.
    """

    modules: Mapping[str, nn.Module]
    fused: bool = False

    @property
    def size(self) -> int:
        """Numbers of all its parameters."""
        return sum(p.numel() for module in self.modules.values() for p in module.parameters())


class Ring:
    """Numbers in a ring: whoever takes some gets those behind the last taken."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        some = torch.rand(min(size, 1 << 16), generator=generator).sub_(0.5).div_(16)
        self.numbers = some.to(device, dtype).repeat(-(-size // len(some)))
        self.place = 0

    def take(self, size: int) -> Tensor:
        """(size,), a view."""
        start = -(-self.place // 64) * 64
        if start + size > len(self.numbers):
            start = 0
        self.place = start + size
        return self.numbers[start : self.place]


@dataclass(frozen=True)
class Curve:
    """Times at rising places; linear between them and beyond the last."""

    places: Sequence[float]
    times: Sequence[Times]

    @classmethod
    def rising(cls, places: Sequence[float], times: Sequence[Times]) -> Curve:
        """That never falls. Noise only adds time: what more takes less time took too much."""
        lowest = list(accumulate(reversed(times), lambda a, b: a.mapped(min, b)))
        return cls(places, lowest[::-1])

    def at(self, place: float) -> Times:
        if place <= self.places[0] or len(self.places) == 1:
            return self.times[0]
        above = min(bisect_right(self.places, place), len(self.places) - 1)
        low, high = self.places[above - 1], self.places[above]
        share = (place - low) / (high - low)
        return self.times[above - 1].mapped(
            lambda a, b: max(a + share * (b - a), 0.0), self.times[above]
        )


@torch.no_grad()
def shares(
    variants: Mapping[Key, Variant],
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    clock: Clock,
    most_bytes: int,
) -> dict[Key, Times]:
    """Each variant's time as a share of the first one's, in decoding one token and in reading
    `tokens`. `most_bytes`: what the model itself reads before it reads a weight again.
    """
    largest = max(variant.size for variant in variants.values())
    room = min(COLD_BYTES, most_bytes) // dtype.itemsize
    ring = Ring(max(room, largest, 1), dtype, device)
    stacks = {}
    for key, variant in variants.items():
        count = room // max(variant.size * len(variants), 1)
        copies = min(max(count, LEAST_COPIES), MOST_COPIES)
        stacks[key] = [filled(variant, ring) for _ in range(copies)]
    columns = {features(module)[0] for v in variants.values() for module in v.modules.values()}
    found: dict[str, dict[Key, list[float]]] = {}
    for phase, length in (("decode", 1), ("prefill", tokens)):
        inputs = {
            width: torch.full((1, length, width), 1 / 64, dtype=dtype, device=device)
            for width in columns
        }
        found[phase] = {key: [] for key in variants}
        began = time.monotonic()
        for number in range(ROUNDS + 1):
            for key, stack in stacks.items():
                running = stack if phase == "decode" else stack[:1]
                seconds = _run(running, inputs, clock) / len(running)
                if number:
                    found[phase][key].append(seconds)
            if number >= LEAST_ROUNDS and time.monotonic() - began > ENOUGH:
                break
    lowest = {
        key: Times(lowest_tenth(found["decode"][key]), lowest_tenth(found["prefill"][key]))
        for key in variants
    }
    first = lowest[next(iter(variants))]
    return {
        key: times.mapped(lambda a, b: a / b if b else 1.0, first) for key, times in lowest.items()
    }


def _run(stack: Sequence[nn.Module], inputs: Mapping[int, Tensor], clock: Clock) -> float:
    """Seconds in which every module of every parent in `stack` runs once."""
    calls = [(module, inputs[features(module)[0]]) for p in stack for module in p.children()]
    begin = clock.mark()
    for module, given in calls:
        result = module(given)
    end = clock.mark()
    float(result.flatten()[0])  # waits for the device
    return clock.seconds(begin, end)


def filled(variant: Variant, ring: Ring) -> nn.Module:
    """A parent whose children are the variant's modules, their numbers taken from the ring in one
    piece, what is fused side by side.
    """
    parent = nn.Module()
    block = ring.take(variant.size)
    states: dict[str, dict[str, Any]] = {name: {} for name in variant.modules}
    at = 0
    for first in (True, False):
        for name, module in variant.modules.items():
            for word, parameter in module.named_parameters():
                if (word == "weight_in") == first:
                    size = math.prod(parameter.shape)
                    states[name][word] = block[at : at + size].view(parameter.shape)
                    at += size
    for name, module in variant.modules.items():
        new = copy.deepcopy(module)
        for word, buffer in module.named_buffers():  # places among the outputs or inputs
            states[name][word] = torch.arange(len(buffer), dtype=buffer.dtype, device=block.device)
        new.load_state_dict(states[name], assign=True)
        parent.add_module(name, new)
    if variant.fused:
        fuse(parent)
    return parent
