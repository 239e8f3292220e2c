"""How narrow each layer becomes, so that the model loses what was asked for, to within one channel.

A layer gives a share of its numbers, and each of its parts (channels of the MLP, KV groups, value
dimensions) the same share of its units. Most parts go by coarse steps (a KV group is a large part
of a layer), so they are rounded to the nearest step, and channels make up the rest: first in the
layer itself, then, where it has none to spare, in others.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from grasp.core.decoder import Decoder
from grasp.core.edits.cuts import CHANNELS, Cut, cuts, length_of
from grasp.core.layer import Linear
from grasp.errors import GraspError


@dataclass(frozen=True)
class Part:
    """An axis of one layer that can lose units: it has `count` of them, `step` go at a time, and
    `each` numbers (biases among them) are stored for one.
    """

    layer: int
    axis: str
    count: int
    each: int
    step: int = 1

    @property
    def size(self) -> int:
        """Numbers that all its units take."""
        return self.count * self.each

    @property
    def most(self) -> int:
        """The most numbers that can go: one step of units stays."""
        return (self.count - self.step) * self.each


def part(decoder: Decoder, layer: int, axis: str, step: int = 1) -> Part | None:
    """The axis of a layer, where something of it can go: the family's row says what its matrices
    are for, its code can do without, they are all dense, and there is more than one step.
    """
    linears = decoder.layer(layer).linears
    try:
        count = length_of(decoder, layer, axis)
        whole, least = (cuts(decoder, layer, axis, torch.arange(n)) for n in (count, 1))
    except GraspError:
        return None
    if count <= step or any(cut.path not in linears for cut in whole):
        return None
    gone = sum(
        _numbers(linears[cut.path], cut) - _numbers(linears[left.path], left)
        for cut, left in zip(whole, least, strict=True)
    )
    return Part(layer, axis, count, gone // (count - 1), step)


def _numbers(linear: Linear, cut: Cut) -> int:
    """What is stored of a matrix that was cut, and of its bias."""
    rows, columns = cut.size(linear.shape)
    return rows * columns + (rows if getattr(linear.module, "bias", None) is not None else 0)


def spread(
    parts: Sequence[Part], target: float, weights: Mapping[int, float] | None = None
) -> dict[int, float]:
    """How many numbers each layer gives, `target` together: its share of its own numbers goes by
    its weight (all alike if not given), and none gives more than it can. `target` must be at most
    what all can.
    """
    sizes, most = _by_layer(parts, "size"), _by_layer(parts, "most")
    wanted = {layer: size * (weights or {}).get(layer, 1.0) for layer, size in sizes.items()}
    low, high = 0.0, 1.0

    def given(scale: float) -> dict[int, float]:
        return {layer: min(scale * wanted[layer], float(most[layer])) for layer in sizes}

    while sum(given(high).values()) < target and high < 1e30:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(given(middle).values()) < target else (low, middle)
    return given(high)


def widths(parts: Sequence[Part], gives: Mapping[int, float], target: float) -> dict[Part, int]:
    """How many units of each part are left where each layer gives so many numbers, `target`
    together; more than that by less than one channel, or one step where there are no channels.
    """
    sizes = _by_layer(parts, "size")
    coarse = [one for one in parts if one.axis != CHANNELS]
    fine = [one for one in parts if one.axis == CHANNELS]
    left = {one: _rounded(one, gives[one.layer] / sizes[one.layer]) for one in coarse}
    room = sum(one.most for one in fine)

    def short() -> float:
        return target - sum((one.count - n) * one.each for one, n in left.items())

    while short() < 0 and (given := [one for one in coarse if left[one] < one.count]):
        back = min(given, key=lambda one: left[one] / one.count)
        if short() + back.step * back.each > room:
            break
        left[back] += back.step
    while short() > room + 1e-6 and (able := [one for one in coarse if left[one] > one.step]):
        next_one = max(able, key=lambda one: left[one] / one.count)
        left[next_one] -= next_one.step
    rest = dict(gives)
    for one, n in left.items():
        rest[one.layer] -= (one.count - n) * one.each
    return left | _filled(fine, [rest[one.layer] / one.each for one in fine], short())


def _rounded(one: Part, share: float) -> int:
    """The units left, a whole number of steps, where about this share goes."""
    steps = one.count // one.step
    return one.step * min(max(math.floor(steps * (1 - share) + 0.5), 1), steps)


def _filled(parts: Sequence[Part], wanted: Sequence[float], target: float) -> dict[Part, int]:
    """The units left where about `wanted` go of each part, and `target` numbers together."""
    gone = [
        min(max(math.floor(want), 0), one.count - 1)
        for one, want in zip(parts, wanted, strict=True)
    ]
    short = target - sum(n * one.each for one, n in zip(parts, gone, strict=True))
    behind = [(gone[i] - wanted[i], i) for i in range(len(parts)) if gone[i] < parts[i].count - 1]
    heapq.heapify(behind)
    while short > 1e-6 and behind:
        _, i = heapq.heappop(behind)
        gone[i] += 1
        short -= parts[i].each
        if gone[i] < parts[i].count - 1:
            heapq.heappush(behind, (gone[i] - wanted[i], i))
    ahead = [(wanted[i] - gone[i], i) for i in range(len(parts)) if gone[i]]
    heapq.heapify(ahead)
    while ahead and short + parts[ahead[0][1]].each <= 1e-6:
        _, i = heapq.heappop(ahead)
        gone[i] -= 1
        short += parts[i].each
        if gone[i]:
            heapq.heappush(ahead, (wanted[i] - gone[i], i))
    return {one: one.count - n for one, n in zip(parts, gone, strict=True)}


def _by_layer(parts: Sequence[Part], what: str) -> dict[int, int]:
    found: dict[int, int] = {}
    for one in parts:
        found[one.layer] = found.get(one.layer, 0) + getattr(one, what)
    return found
