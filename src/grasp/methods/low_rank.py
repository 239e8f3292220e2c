"""What all methods share that store matrices as low-rank pairs. A method gives the metric: what to
collect, and the singular groups of a matrix in it.

1. One sweep collects what the metric is made of (`metric`).
2. Every matrix in scope is decomposed into singular groups in that metric (`groups`), which cost
   `losses` when dropped.
3. The budget says the rank of every matrix, or "dense" (`ranks`).
4. The best groups are stored as a pair.

Scope: grasp.methods.scope. Size and storage: grasp.methods.size.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize, Step, noted
from grasp.core.fields import Place, flag
from grasp.core.layer import Linear
from grasp.core.linalg import balanced, pivoted
from grasp.core.records import Allocation, Attribution, Statistics
from grasp.core.runner import Runner
from grasp.core.scratch import Scratch
from grasp.methods.base import Plan, ratio_unreachable
from grasp.methods.scope import Scope
from grasp.methods.size import Size
from grasp.stages import budget as budgets
from grasp.stages.basis import Groups, over_cores
from grasp.stages.statistics import Similarity


@dataclass(frozen=True)
class Problem:
    """What the budget chooses from: for every matrix its groups, the losses (k,) they cost when
    dropped, and its options.
    """

    linears: list[Linear]
    groups: Mapping[str, Groups]
    losses: Mapping[str, Tensor]
    offers: Mapping[str, budgets.Options]

    @property
    def dense(self) -> float:
        """What the matrices cost as they are."""
        return sum((offer.dense for offer in self.offers.values()), 0.0)

    def solve(self, allocation: str, budget: float) -> Allocation:
        """Ranks within `budget`: "global", "per-layer" (the same share of every layer) or "uniform"
        (of every matrix).
        """
        if allocation == "global":
            return budgets.allocate(self.offers, budget)
        parts: dict[Any, dict[str, budgets.Options]] = {}
        for linear in self.linears:
            part = linear.layer if allocation == "per-layer" else linear.path
            parts.setdefault(part, {})[linear.path] = self.offers[linear.path]
        return budgets.in_shares(list(parts.values()), budget)


@dataclass(frozen=True, kw_only=True)
class LowRank(Scope, Size):
    """Base of the low-rank methods: subclasses give `metric` and `groups`."""

    scratch: Place | None = flag(
        None,
        "Keep the statistics in files in this folder, not in memory (for large models).",
        recipe=False,
    )

    # --- what a method gives

    @abstractmethod
    def metric(self, paths: Sequence[str], scratch: Scratch) -> list[Collector]:
        """What the metric of the matrices at `paths` is made of; large sums go into `scratch`."""

    @abstractmethod
    def groups(self, linear: Linear, stats: Statistics, scratch: Scratch) -> Groups:
        """The singular groups of a matrix in the metric, their vectors kept in `scratch`. Several
        threads ask at once.
        """

    # --- what it may change

    @property
    def score(self) -> str:
        """What `losses` are called."""
        return "magnitude"

    def losses(self, linear: Linear, found: Groups, stats: Statistics, seed: int) -> Tensor:
        """What dropping each group (k,) costs."""
        return found.squares / 2

    def ranks(self, problem: Problem, spend: float) -> Allocation:
        """The rank of every matrix: the same share for all.

        A --retain-ratio r is rounded down matrix by matrix, `int(m n r / (m + n))`, as papers have
        it; under --ratio what rounding leaves over buys single ranks, at most one a matrix.
        """
        if self.retain_ratio is not None:
            return budgets.rounded_down(problem.offers, self.retain_ratio)
        return problem.solve("uniform", spend)

    def planned_parameters(self, decoder: Decoder, linears: Sequence[Linear]) -> int | None:
        """What the model will hold, or the most where that is not known to the number."""
        if self.retain_ratio is None or self.budget == "latency":
            return self.most_parameters(decoder, linears)
        cost = self.cost(decoder)
        offers = {
            linear.path: budgets.options(
                linear.shape, torch.zeros(min(linear.shape)), cost, self.rank_multiple
            )
            for linear in linears
        }
        ranks = budgets.rounded_down(offers, self.retain_ratio).ranks
        saved = sum(
            self.numbers(linear.shape, None) - self.numbers(linear.shape, ranks[linear.path])
            for linear in linears
        )
        return decoder.num_parameters() - int(saved)

    def sums_bytes(self, linears: Sequence[Linear]) -> int:
        """What the sums of `metric` take at most."""
        return 2 * square_bytes(linears)

    # --- what is the same for all

    def check(self, decoder: Decoder) -> None:
        super().check(decoder)
        self.check_size(decoder, self.linears(decoder, self.planned_layers(decoder)))

    def plan(self, decoder: Decoder) -> Plan:
        layers = self.planned_layers(decoder)
        linears = self.linears(decoder, layers)
        paths = [linear.path for linear in linears]
        backward = bool(paths) and any(one.backward for one in self.metric(paths, Scratch()))
        return Plan(
            len(layers),
            len(linears),
            self.planned_parameters(decoder, linears),
            int(not backward),
            int(backward),
            self.sums_bytes(linears) + groups_bytes(linears),
            len(linears),
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        linears = self.linears(decoder, self.possible_layers(decoder))
        paths = [linear.path for linear in linears]
        return [Similarity(), *(self.metric(paths, self._scratch(decoder)) if paths else ())]

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        yield from self.replacements(runner, self.pose(runner, stats))

    def predict(
        self, runner: Runner, stats: Statistics, ratios: Sequence[float]
    ) -> dict[float, float]:
        problem, found = self.pose(runner, stats), {}
        for ratio in ratios:
            at = dataclasses.replace(self, ratio=ratio, retain_ratio=None)
            spend = at.spend(runner.decoder, problem.dense)
            if spend >= budgets.cheapest(problem.offers):
                found[ratio] = budgets.total_loss(problem.offers, at.ranks(problem, spend))
        return found

    def pose(self, runner: Runner, stats: Statistics) -> Problem:
        """Decompose every matrix that may be edited, and say what each of its ranks costs and
        loses.
        """
        decoder = runner.decoder
        linears = self.linears(decoder, self.chosen_layers(decoder, stats))
        scratch, cost = self._scratch(decoder), self.cost(decoder)
        for shape in {linear.shape for linear in linears}:
            cost(shape, None)  # a measured cost is measured now, while nothing else runs

        def decompose(linear: Linear) -> tuple[Groups, Tensor]:
            with runner.holding(linear.layer):
                found = self.groups(linear, stats, scratch)
                return found, self.losses(linear, found, stats, runner.data.seed)

        found, losses, offers = {}, {}, {}
        decoder.progress("decomposing", 0, len(linears))
        for linear, (one, lost) in zip(linears, over_cores(decompose, linears), strict=True):
            found[linear.path], losses[linear.path] = one, lost
            best_first = lost.sort(descending=True).values
            offers[linear.path] = budgets.options(
                linear.shape, best_first, cost, self.rank_multiple
            )
            decoder.progress("decomposing", len(found), len(linears))
        return Problem(linears, found, losses, offers)

    def replacements(self, runner: Runner, problem: Problem) -> Iterator[Step]:
        """The edits that meet the budget. A problem posed once serves any number of budgets."""
        spend = self.spend(runner.decoder, problem.dense)
        least = budgets.cheapest(problem.offers)
        if spend < least * (1 - 1e-9) and self.ratio is not None:
            largest = self.ratio * (problem.dense - least) / (problem.dense - spend)
            hint = f"--budget {self.budget}, all matrices at rank 0"
            raise ratio_unreachable(self.ratio, largest, hint)
        ranks = self.ranks(problem, spend).ranks
        for linear in problem.linears:
            rank = ranks[linear.path]
            if rank is not None:
                with runner.holding(linear.layer):
                    make = partial(self.replacement, linear, problem, rank)
                    made = runner.once(linear.path, make)
                yield made

    def replacement(self, linear: Linear, problem: Problem, rank: int) -> Step:
        """The pair that holds the best `rank` groups of a matrix."""
        found, losses = problem.groups[linear.path], problem.losses[linear.path]
        kept = losses.argsort(descending=True, stable=True)[:rank].sort().values
        left, right = found.pair(linear.weight, kept)
        dropped = torch.ones(len(losses), dtype=torch.bool).index_fill(0, kept, False)
        loss = float(losses[dropped].double().sum()) if self.predicts else None
        note = noted(Attribution(linear.path, self.score, losses, found.squares.sqrt()), kept, loss)
        factors = balanced(left, right) if self.storage == "pair" else pivoted(left, right)
        return Step(Factorize(linear.path, *factors), note)

    def _scratch(self, decoder: Decoder) -> Scratch:
        """A place for the sums, and later for the groups' vectors."""
        linears = self.linears(decoder, self.possible_layers(decoder))
        return Scratch.for_bytes(groups_bytes(linears), decoder.device, self.scratch)


def square_bytes(linears: Sequence[Linear]) -> int:
    """Of one float32 square matrix of the shorter side of every matrix."""
    return 4 * sum(min(linear.shape) ** 2 for linear in linears)


def groups_bytes(linears: Sequence[Linear]) -> int:
    """Of the vectors of all groups (`grasp.stages.basis.Groups`)."""
    return 2 * square_bytes(linears)
