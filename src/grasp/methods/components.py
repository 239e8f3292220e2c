"""What a budget chooses from, and the edits that carry a choice out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from grasp.core.edits import Step
from grasp.core.records import Allocation
from grasp.stages import budget as budgets
from grasp.stages.forecast import stated
from grasp.stages.options import Choice, Options


@dataclass(frozen=True)
class Component:
    """Something that can become smaller: what it offers, and the edit that gives it a size.

    `layer`: whose weights the edit needs. `whole`: its size as it is, where that is no rank.
    `matrices`: paths of those that it is about.
    """

    layer: int
    offer: Options
    make: Callable[..., Step]
    whole: int = 0
    matrices: tuple[str, ...] = ()

    def cost(self, size: int | None) -> float:
        """What it costs at one of its sizes, or as it is (None)."""
        offer = self.offer
        return offer.dense if size is None else float(offer.costs[offer.sizes == size])


@dataclass(frozen=True)
class Problem:
    """Components by name, and which of them go together. `parts`: the choice of every layer, and
    of every matrix or part of a layer, for those who give each the same share. `whole`: what all of
    it costs as it is, where no choice leaves it so.
    """

    components: Mapping[str, Component]
    choice: Choice
    per_layer: tuple[Choice, ...]
    uniform: tuple[Choice, ...]
    whole: float | None = None

    @cached_property
    def offers(self) -> dict[str, Options]:
        return {name: one.offer for name, one in self.components.items()}

    @property
    def dense(self) -> float:
        """What all of it costs as it is."""
        return budgets.dense(self.offers, self.choice) if self.whole is None else self.whole

    @property
    def least(self) -> float:
        """The least that it can cost."""
        return budgets.cheapest(self.offers, self.choice)

    def solve(self, allocation: str, budget: float) -> Allocation:
        """Sizes within `budget`: "global", "per-layer" (the same share of every layer) or "uniform"
        (of every matrix).
        """
        if allocation == "global":
            return budgets.allocate(self.offers, budget, self.choice)
        parts = self.per_layer if allocation == "per-layer" else self.uniform
        return budgets.in_shares(self.offers, parts, budget)

    def rises(self, allocation: Allocation) -> tuple[float, float]:
        """By how much the loss rises with these sizes, on text that was not seen and on the
        calibration text; nats a token.
        """
        seen = budgets.total_seen(self.offers, allocation)
        return stated(budgets.total_loss(self.offers, allocation), seen), seen

    def taken(self, allocation: Allocation) -> Iterator[tuple[str, Component, int]]:
        """(name, component, size) of all that becomes smaller, in the model's order."""
        for name, component in self.components.items():
            size = allocation.sizes.get(name)
            if size is not None:
                yield name, component, size


def never(_size: int) -> Step:
    """Of a component that is never smaller."""
    raise AssertionError("a fixed component has no sizes")
