"""Stage 2c, what there is to choose from: the sizes that a part of the model can have, what each
costs and what it loses.

A component (a matrix, the channels of an MLP, a layer) offers options: sizes below the whole, or
itself as it is. Options cost something (parameters, bytes, time) and lose something (nats a token);
losses of different components add up. Some components are about the same numbers, so only one of
them can be made smaller: a `Choice` says which go together. What is taken: `grasp.stages.budget`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Cost = Callable[[tuple[int, int], int | None], float]
"""What a matrix (out, in) costs at a rank, or dense (None). Must not fall as the rank grows."""


class Costs(Protocol):
    """The costs of a model's parts, in one unit that does not change while the model is edited."""

    @property
    def whole(self) -> float:
        """Of the whole model."""

    def of(self, path: str, spread: bool = False) -> Cost:
        """Of the matrix at `path` at a shape and rank; `spread`: narrower, it keeps its width to
        the outside.
        """

    def layer(self, index: int, heads: float = 1.0, channels: float = 1.0) -> float:
        """Of a layer beside its matrices, where these shares of its heads and channels are left."""

    def beside(self, biases: int, places: int) -> float:
        """Of so many biases, and of places: which of its rows or columns a matrix with gaps has."""


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
    """What one component offers: `sizes` rising (ranks of a matrix, channels of an MLP), what each
    loses and costs, and the cost `dense` of staying as it is (loss 0), infinite where it cannot.

    `losses` are those to go by, on text that was not seen; `seen` those on the calibration text.
    """

    sizes: Int[Tensor, "options"]
    losses: Float[Tensor, "options"]
    costs: Float[Tensor, "options"]
    dense: float
    seen: Float[Tensor, "options"]


@dataclass(frozen=True)
class All:
    """Components, or choices of them, that are there at once."""

    parts: tuple[Choice, ...]


@dataclass(frozen=True)
class OneOf:
    """Ways to make the same numbers smaller: one of them is taken, and costs the same dense."""

    ways: tuple[Choice, ...]


Choice: TypeAlias = "str | All | OneOf"
"""A component's name, or several."""


def options(
    shape: tuple[int, int],
    tail: Tensor,
    cost: Cost = parameters,
    multiple: int = 1,
    seen: Tensor | None = None,
    saving: float = 0.0,
) -> Options:
    """The options of a matrix (out, in) that loses `tail[r]` (k + 1,) at rank r; on the calibration
    text `seen[r]`, the same if not given.

    Ranks are multiples of `multiple` that are cheaper than dense, by the share `saving` of it at
    least.
    """
    dense = cost(shape, None)
    ranks = list(range(0, len(tail), multiple))
    costs = torch.tensor([cost(shape, r) for r in ranks], dtype=torch.float64)
    keep = costs < dense * (1 - max(saving, 1e-9))
    keep[0] = True
    chosen = torch.tensor(ranks)[keep]
    seen = tail if seen is None else seen
    return Options(chosen, tail.double()[chosen], costs[keep], dense, seen.double()[chosen])


def fixed(cost: float) -> Options:
    """Of what only costs, and is never smaller."""
    none = torch.zeros(0, dtype=torch.float64)
    return Options(none.long(), none, none, cost, none)


def gone(loss: float, cost: float = 0.0) -> Options:
    """Of a way to leave something out altogether: it has one size, 0, and cannot stay."""
    one = torch.zeros(1, dtype=torch.float64)
    return Options(one.long(), one + loss, one + cost, math.inf, one + loss)


def only(offer: Options, size: int) -> Options:
    """The same component at one of its sizes and no other."""
    at = offer.sizes == size
    return Options(offer.sizes[at], offer.losses[at], offer.costs[at], math.inf, offer.seen[at])


def tails(losses: Float[Tensor, "k"]) -> Float[Tensor, "k_and_1"]:
    """What is lost at each size where the parts, best first, cost `losses` each when dropped: at
    size r all from r on, in float64.
    """
    losses = losses.double().clamp_min(0).cpu()
    return torch.cat([losses.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
