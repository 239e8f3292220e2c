"""Stage 2c, one budget for all that may become smaller: the sizes with the lowest total loss that
fit it.

A multiplier says what a unit of cost is worth; every component (`grasp.stages.options`) then takes
its best option by itself, and bisection finds the multiplier that meets the budget (Lagrange;
Everett 1963). What is left over goes to the best single steps.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch

from grasp.core.records import Allocation
from grasp.stages.options import All, Choice, OneOf, Options


def all_of(offers: Mapping[str, Options]) -> Choice:
    """Every component by itself."""
    return All(tuple(offers))


@singledispatch
def names(choice: Choice) -> Iterator[str]:
    """The components of a choice."""
    raise TypeError(choice)


@names.register
def _(choice: str) -> Iterator[str]:
    yield choice


@names.register
def _(choice: All) -> Iterator[str]:
    for part in choice.parts:
        yield from names(part)


@names.register
def _(choice: OneOf) -> Iterator[str]:
    for way in choice.ways:
        yield from names(way)


def cheapest(offers: Mapping[str, Options], choice: Choice | None = None) -> float:
    """The least the components can cost together."""
    return _best(all_of(offers) if choice is None else choice, offers, math.inf).cost


def dense(offers: Mapping[str, Options], choice: Choice | None = None) -> float:
    """What the components cost as they are."""
    return _best(all_of(offers) if choice is None else choice, offers, 0.0).cost


def allocate(
    offers: Mapping[str, Options], budget: float, choice: Choice | None = None
) -> Allocation:
    """Sizes of least total loss whose total cost is at most `budget`, which must be at least
    `cheapest(offers, choice)`. Components that were not chosen are left out.

    Exact where the budget is a vertex of the convex hull of what can be had; elsewhere at most one
    step of one component away.
    """
    choice = all_of(offers) if choice is None else choice
    whole = _best(choice, offers, 0.0)
    if whole.cost <= budget:
        return Allocation(whole.sizes)
    low, high = 0.0, 1.0
    while _best(choice, offers, high).cost > budget and high < 1e30:
        low, high = high, high * 10
    for _ in range(100):
        middle = (low + high) / 2 if low else high / 10
        if _best(choice, offers, middle).cost > budget:
            low = middle
        else:
            high = middle
        if high < 1e-30 or high - low <= 1e-12 * high:
            break
    best = _best(choice, offers, high)
    found = Allocation(_fill(offers, best.sizes, budget))
    # another way of the same numbers may have been a leap that leaves much of the budget
    leapt = best.sizes.keys() - _best(choice, offers, low).sizes.keys()
    rest = without(choice, leapt) if leapt else None
    if rest is None or _best(rest, offers, math.inf).cost > budget:
        return found
    other = allocate(offers, budget, rest)
    return min(found, other, key=lambda one: total_loss(offers, one))


def without(choice: Choice, names: Collection[str]) -> Choice | None:
    """A choice without the ways that need one of these components; None where nothing is left."""
    if isinstance(choice, str):
        return None if choice in names else choice
    if isinstance(choice, All):
        parts = tuple(without(part, names) for part in choice.parts)
        return None if None in parts else All(tuple(part for part in parts if part is not None))
    ways = (without(way, names) for way in choice.ways)
    left = tuple(way for way in ways if way is not None)
    return OneOf(left) if left else None


def in_shares(offers: Mapping[str, Options], parts: Sequence[Choice], budget: float) -> Allocation:
    """The same share of its dense cost for every part; within a part as in `allocate`. What is left
    over buys at most a step a component.
    """
    whole = [dense(offers, part) for part in parts]
    least = [cheapest(offers, part) for part in parts]

    def asked(share: float) -> list[float]:
        return [max(share * cost, floor) for cost, floor in zip(whole, least, strict=True)]

    low, high = 0.0, budget / max(sum(whole), 1e-30)
    # some parts cannot go down to their share: the others pay for them
    if sum(asked(high)) > budget:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(asked(middle)) <= budget else (low, middle)
        high = low
    sizes: dict[str, int | None] = {}
    for part, cost in zip(parts, asked(high), strict=True):
        sizes.update(allocate(offers, cost, part).sizes)
    return Allocation(_fill(offers, sizes, budget, most=1))


def rounded_down(offers: Mapping[str, Options], share: float) -> Allocation:
    """The largest rank of every matrix that costs at most `share` of what it costs dense: of
    numbers in a plain pair, `int(m n share / (m + n))`. None stays dense, since `share` is below 1,
    but what offers nothing.
    """
    fits = {
        path: int((offer.costs <= share * offer.dense * (1 + 1e-9)).sum())
        for path, offer in offers.items()
        if len(offer.sizes)
    }
    return Allocation(
        {path: int(offers[path].sizes[max(fit, 1) - 1]) for path, fit in fits.items()}
    )


def total_loss(offers: Mapping[str, Options], allocation: Allocation) -> float:
    """The loss to expect, in the unit of the options."""
    return _total(offers, allocation, "losses")


def total_seen(offers: Mapping[str, Options], allocation: Allocation) -> float:
    """The loss on the calibration text itself."""
    return _total(offers, allocation, "seen")


def _total(offers: Mapping[str, Options], allocation: Allocation, name: str) -> float:
    return sum(
        (
            float(getattr(offers[path], name)[_place(offers[path], size)])
            for path, size in allocation.sizes.items()
            if size is not None
        ),
        0.0,
    )


@dataclass(frozen=True)
class _Taken:
    """What was taken of a choice: size by component, and what it costs and loses together."""

    sizes: dict[str, int | None]
    cost: float
    loss: float

    def worth(self, multiplier: float) -> tuple[float, float]:
        """What it loses where a unit of cost is worth `multiplier`; of equals the cheaper."""
        if math.isinf(multiplier):
            return self.cost, self.loss
        return self.loss + multiplier * self.cost, self.cost


@singledispatch
def _best(choice: Choice, offers: Mapping[str, Options], multiplier: float) -> _Taken:
    """The best of a choice if a unit of cost is worth `multiplier`: 0 asks for the least loss, so
    for all as it is, infinity for the least cost.
    """
    raise TypeError(choice)


@_best.register
def _(choice: str, offers: Mapping[str, Options], multiplier: float) -> _Taken:
    offer = offers[choice]
    dense = _Taken({choice: None}, offer.dense, 0.0)
    if not len(offer.sizes) or (multiplier == 0 and math.isfinite(offer.dense)):
        return dense
    by = offer.costs if math.isinf(multiplier) else offer.losses + multiplier * offer.costs
    place = int(by.argmin())
    found = _Taken(
        {choice: int(offer.sizes[place])}, float(offer.costs[place]), float(offer.losses[place])
    )
    if math.isinf(offer.dense) or found.worth(multiplier)[0] <= dense.worth(multiplier)[0]:
        return found
    return dense


@_best.register
def _(choice: All, offers: Mapping[str, Options], multiplier: float) -> _Taken:
    found = [_best(part, offers, multiplier) for part in choice.parts]
    sizes = {name: size for one in found for name, size in one.sizes.items()}
    return _Taken(
        sizes, sum((one.cost for one in found), 0.0), sum((one.loss for one in found), 0.0)
    )


@_best.register
def _(choice: OneOf, offers: Mapping[str, Options], multiplier: float) -> _Taken:
    found = (_best(way, offers, multiplier) for way in choice.ways)
    return min(found, key=lambda one: one.worth(multiplier))


def _place(offer: Options, size: int | None) -> int:
    return int(torch.searchsorted(offer.sizes, size)) if size is not None else len(offer.sizes)


def _fill(
    offers: Mapping[str, Options],
    sizes: Mapping[str, int | None],
    budget: float,
    most: int | None = None,
) -> dict[str, int | None]:
    """Spend what is left on the steps that save the most loss for their cost, as long as one fits;
    at most `most` steps a component, if given.
    """
    places = {path: _place(offers[path], size) for path, size in sizes.items()}
    first = dict(places)
    queue: list[tuple[float, str, float]] = []

    def at(path: str, place: int) -> tuple[float, float]:
        """(cost, loss) of a component at a place."""
        offer = offers[path]
        if place == len(offer.sizes):
            return offer.dense, 0.0
        return float(offer.costs[place]), float(offer.losses[place])

    spare = budget - sum((at(path, place)[0] for path, place in places.items()), 0.0)

    def offer_step(path: str) -> None:
        place = places[path]
        if place < len(offers[path].sizes) and (most is None or place < first[path] + most):
            (cost, loss), (more, less) = at(path, place), at(path, place + 1)
            heapq.heappush(queue, (-(loss - less) / max(more - cost, 1e-30), path, more - cost))

    for path in places:
        offer_step(path)
    while queue:
        _, path, cost = heapq.heappop(queue)
        if cost <= spare:
            spare -= cost
            places[path] += 1
            offer_step(path)
    return {
        path: None if place == len(offers[path].sizes) else int(offers[path].sizes[place])
        for path, place in places.items()
    }
