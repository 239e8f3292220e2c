"""Stage 2c, one budget for all matrices: the ranks with the lowest total loss that fit it.

Every matrix offers options: a rank below break-even, or dense. Options cost something (parameters,
bytes, seconds) and lose something (nats of loss); losses of different matrices add up. A multiplier
says what a unit of cost is worth; each matrix then takes its best option by itself, and bisection
finds the multiplier that meets the budget (Lagrange; Everett 1963). What is left over goes to the
best single ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grasp.core.records import Allocation

Cost = Callable[[tuple[int, int], int | None], float]
"""What a matrix (out, in) costs at a rank, or dense (None). Must not fall as the rank grows."""


def parameters(shape: tuple[int, int], rank: int | None) -> float:
    """Numbers stored."""
    m, n = shape
    return float(m * n if rank is None else rank * (m + n))


def pivoted_parameters(shape: tuple[int, int], rank: int | None) -> float:
    """Numbers stored by a pivoted pair."""
    m, n = shape
    return float(m * n if rank is None else rank * (m + n - rank))


@dataclass(frozen=True)
class Options:
    """What one matrix offers: `ranks` rising, the `losses` and `costs` of each, and the cost of
    staying dense (loss 0).
    """

    ranks: Int[Tensor, "options"]
    losses: Float[Tensor, "options"]
    costs: Float[Tensor, "options"]
    dense: float


def options(
    shape: tuple[int, int], group_losses: Tensor, cost: Cost = parameters, multiple: int = 1
) -> Options:
    """The options of a matrix whose groups, best first, cost `group_losses` (k,) each when dropped.

    Ranks are multiples of `multiple` that are cheaper than dense.
    """
    losses = group_losses.double().clamp_min(0).cpu()
    # tail[r]: loss at rank r
    tail = torch.cat([losses.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    dense = cost(shape, None)
    ranks = list(range(0, len(tail), multiple))
    costs = torch.tensor([cost(shape, r) for r in ranks], dtype=torch.float64)
    keep = costs < dense * (1 - 1e-9)
    keep[0] = True
    chosen = torch.tensor(ranks)[keep]
    return Options(chosen, tail[chosen], costs[keep], dense)


def cheapest(offers: Mapping[str, Options]) -> float:
    """The least the matrices can cost together."""
    return sum((min(float(offer.costs[0]), offer.dense) for offer in offers.values()), 0.0)


def allocate(offers: Mapping[str, Options], budget: float) -> Allocation:
    """Ranks of least total loss whose total cost is at most `budget`, which must be at least
    `cheapest(offers)`.

    Exact where the budget is a vertex of the convex hull of what can be had; elsewhere at most one
    step of one matrix away.
    """
    if sum(offer.dense for offer in offers.values()) <= budget:
        return Allocation(dict.fromkeys(offers))
    low, high = 0.0, 1.0
    while _spent(offers, _best(offers, high)) > budget and high < 1e30:
        low, high = high, high * 10
    for _ in range(100):
        middle = (low + high) / 2 if low else high / 10
        if _spent(offers, _best(offers, middle)) > budget:
            low = middle
        else:
            high = middle
        if high < 1e-30 or high - low <= 1e-12 * high:
            break
    return Allocation(_fill(offers, _best(offers, high), budget))


def in_shares(parts: Sequence[Mapping[str, Options]], budget: float) -> Allocation:
    """The same share of its dense cost for every part; within a part as in `allocate`. What is left
    over buys at most a rank a matrix.
    """
    dense = [sum(offer.dense for offer in part.values()) for part in parts]
    least = [cheapest(part) for part in parts]

    def asked(share: float) -> list[float]:
        return [max(share * cost, floor) for cost, floor in zip(dense, least, strict=True)]

    low, high = 0.0, budget / max(sum(dense), 1e-30)
    # some parts cannot go down to their share: the others pay for them
    if sum(asked(high)) > budget:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(asked(middle)) <= budget else (low, middle)
        high = low
    ranks: dict[str, int | None] = {}
    for part, cost in zip(parts, asked(high), strict=True):
        ranks.update(allocate(part, cost).ranks)
    whole = {path: offer for part in parts for path, offer in part.items()}
    return Allocation(_fill(whole, ranks, budget, most=1))


def rounded_down(offers: Mapping[str, Options], share: float) -> Allocation:
    """The largest rank of every matrix that costs at most `share` of what it costs dense: of
    numbers in a plain pair, `int(m n share / (m + n))`. None stays dense, since `share` is below 1.
    """
    fits = {
        path: int((offer.costs <= share * offer.dense * (1 + 1e-9)).sum())
        for path, offer in offers.items()
    }
    return Allocation(
        {path: int(offers[path].ranks[max(fit, 1) - 1]) for path, fit in fits.items()}
    )


def total_loss(offers: Mapping[str, Options], allocation: Allocation) -> float:
    """The predicted loss, in the unit of the options."""
    ranks = allocation.ranks
    return sum(
        (
            float(offer.losses[_place(offer, ranks[path])])
            for path, offer in offers.items()
            if ranks[path] is not None
        ),
        0.0,
    )


def _best(offers: Mapping[str, Options], multiplier: float) -> dict[str, int | None]:
    """Every matrix's own choice if a unit of cost is worth `multiplier`; of equals the cheaper."""
    chosen: dict[str, int | None] = {}
    for path, offer in offers.items():
        values = offer.losses + multiplier * offer.costs
        place = int(values.argmin())
        chosen[path] = (
            None if float(values[place]) > multiplier * offer.dense else int(offer.ranks[place])
        )
    return chosen


def _spent(offers: Mapping[str, Options], ranks: Mapping[str, int | None]) -> float:
    return sum(
        offer.dense if ranks[path] is None else float(offer.costs[_place(offer, ranks[path])])
        for path, offer in offers.items()
    )


def _place(offer: Options, rank: int | None) -> int:
    return int(torch.searchsorted(offer.ranks, rank)) if rank is not None else len(offer.ranks)


def _fill(
    offers: Mapping[str, Options],
    ranks: dict[str, int | None],
    budget: float,
    most: int | None = None,
) -> dict[str, int | None]:
    """Spend what is left on the steps that save the most loss for their cost, as long as one fits;
    at most `most` steps a matrix, if given.
    """
    spare = budget - _spent(offers, ranks)
    places = {path: _place(offers[path], rank) for path, rank in ranks.items()}
    first = dict(places)
    queue: list[tuple[float, str, float]] = []

    def offer_step(path: str) -> None:
        offer, place = offers[path], places[path]
        if place < len(offer.ranks) and (most is None or place < first[path] + most):
            last = place + 1 == len(offer.ranks)
            cost = (offer.dense if last else float(offer.costs[place + 1])) - float(
                offer.costs[place]
            )
            gain = float(offer.losses[place]) - (0.0 if last else float(offer.losses[place + 1]))
            heapq.heappush(queue, (-gain / max(cost, 1e-30), path, cost))

    for path in offers:
        offer_step(path)
    while queue:
        _, path, cost = heapq.heappop(queue)
        if cost <= spare:
            spare -= cost
            places[path] += 1
            offer_step(path)
    return {
        path: None if places[path] == len(offer.ranks) else int(offer.ranks[places[path]])
        for path, offer in offers.items()
    }
