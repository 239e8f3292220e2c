"""Sensitivity-based truncation rank search (STRS; ASVD, arXiv 2312.05821): which matrix
keeps how much, by what each truncation alone does to the loss.

1. Every matrix is truncated to each kept share of `KEPT`, alone, and the loss is measured.
2. All (matrix, rank) are put in order, least loss first. Whoever takes the first n of them gives
   every matrix the lowest of its ranks among them; a matrix with none stays dense.
3. The more are taken, the smaller the model: bisection finds the fewest that meet the target.
4. The last of them is taken only as far as is needed (ours): the size is met within one rank, not
   within a tenth of a matrix.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import torch

from grasp.core.records import Allocation
from grasp.stages.budget import rounded_down
from grasp.stages.options import Options

KEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Shares of what a matrix takes dense, in numbers or bytes."""

Losses = Mapping[tuple[str, int], float]
"""(matrix, rank) -> the loss of the model with that matrix alone at that rank."""


def truncatable(offer: Options) -> Options:
    """Of a matrix's options those from the least kept share on."""
    least = rounded_down({"": offer}, min(KEPT)).sizes[""]
    keep = offer.sizes >= (least or 0)
    return Options(
        offer.sizes[keep], offer.losses[keep], offer.costs[keep], offer.dense, offer.seen[keep]
    )


def to_try(offers: Mapping[str, Options]) -> list[tuple[str, int]]:
    """(matrix, rank) of every matrix at every kept share, largest first; of two shares that round
    down to one rank, one.
    """
    at = [rounded_down(offers, share).sizes for share in KEPT]
    return [
        (path, rank)
        for path in offers
        for rank in dict.fromkeys(sizes[path] for sizes in at)
        if rank is not None
    ]


def cut(offers: Mapping[str, Options], losses: Losses, budget: float) -> Allocation:
    """The rank of every matrix, None where it stays dense: together they cost at most `budget`,
    which must be at least what all at their lowest ranks cost. Of equal losses the first in
    `losses` goes first.
    """
    order = sorted(losses, key=lambda one: losses[one])
    most = budget * (1 + 1e-9)
    count = bisect_left(
        range(len(order) + 1), True, key=lambda n: _cost(offers, _taken(order[:n])) <= most
    )
    ranks = _taken(order[:count])
    if count:
        path, lowest = order[count - 1][0], ranks[order[count - 1][0]]
        highest = _taken(order[: count - 1]).get(path)
        others = _cost(offers, ranks) - _cost_at(offers[path], lowest)
        fits = offers[path].costs + others <= most
        if highest is not None:
            fits &= offers[path].sizes < highest
        ranks[path] = int(offers[path].sizes[fits].max())
    return Allocation({path: ranks.get(path) for path in offers})


def _taken(chosen: Sequence[tuple[str, int]]) -> dict[str, int]:
    """The lowest rank of every matrix among those chosen."""
    ranks: dict[str, int] = {}
    for path, rank in chosen:
        ranks[path] = min(rank, ranks.get(path, rank))
    return ranks


def _cost(offers: Mapping[str, Options], ranks: Mapping[str, int]) -> float:
    return sum((_cost_at(offer, ranks.get(path)) for path, offer in offers.items()), 0.0)


def _cost_at(offer: Options, rank: int | None) -> float:
    if rank is None:
        return offer.dense
    return float(offer.costs[int(torch.searchsorted(offer.sizes, rank))])
