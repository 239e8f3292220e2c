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
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize, Note, SplitExperts, Step, noted
from grasp.core.experts import expert_linears, fused_at, is_of_expert, mixture
from grasp.core.families import EXPERTS
from grasp.core.fields import Place, flag
from grasp.core.layer import Linear
from grasp.core.linalg import balanced, pivoted
from grasp.core.records import Allocation, Attribution, Curvature, Statistics
from grasp.core.runner import Runner
from grasp.core.scratch import Scratch
from grasp.core.sharing import Tensors
from grasp.errors import RecipeError
from grasp.methods.base import Plan
from grasp.methods.components import Component, Problem, never
from grasp.methods.costs import Costs, numbers_of
from grasp.methods.scope import Scope
from grasp.methods.size import Size
from grasp.stages import operations
from grasp.stages.basis import Groups
from grasp.stages.budget import rounded_down
from grasp.stages.forecast import stated
from grasp.stages.operations import Operations, total
from grasp.stages.options import All, fixed, options, tails
from grasp.stages.statistics import Similarity

logger = logging.getLogger(__name__)

SQUARES = 8
"""Matrices of the shorter side that a decomposition holds at once."""


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

    knows_experts: ClassVar[bool] = False
    """Whether `metric` measures the matrices of experts (`grasp.stages.routed`)."""

    def curvature(self, linear: Linear, stats: Statistics) -> Curvature | None:
        """What the metric is made of, where that is a curvature."""
        return None

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

    @property
    def least_saving(self) -> float:
        """What a pair must save, as a share of its matrix, to be worth its second product."""
        return 0.0

    def losses(self, linear: Linear, found: Groups, stats: Statistics, seed: int) -> Tensor:
        """What dropping each group (k,) costs."""
        return found.squares / 2

    def expected(self, linear: Linear, seen: Tensor, stats: Statistics) -> Tensor:
        """What to expect at every rank (k + 1,) on text that was not seen, where the groups cost
        `seen` on the calibration text.
        """
        return seen

    def ranks(self, problem: Problem, spend: float) -> Allocation:
        """The rank of every matrix: the same share for all.

        A --retain-ratio r is rounded down matrix by matrix, `int(m n r / (m + n))`, as papers have
        it; under --ratio what rounding leaves over buys single ranks, at most one a matrix.
        """
        if self.retain_ratio is not None:
            return rounded_down(problem.offers, self.retain_ratio)
        return problem.solve("uniform", spend)

    def planned_parameters(self, decoder: Decoder, linears: Sequence[Linear]) -> int | None:
        """What the model will hold, or the most where that is not known to the number."""
        if self.retain_ratio is None or self.unit == "latency":
            return self.most_parameters(decoder, linears)
        costs, numbers = self.costs(decoder), numbers_of(self.storage == "pivoted")
        offers = {
            linear.path: options(
                linear.shape,
                torch.zeros(min(linear.shape) + 1),
                costs.of(linear.path),
                self.rank_multiple,
            )
            for linear in linears
        }
        ranks = rounded_down(offers, self.retain_ratio).sizes
        saved = sum(
            numbers(linear.shape, None) - numbers(linear.shape, ranks[linear.path])
            for linear in linears
        )
        return decoder.num_parameters() - int(saved)

    def sums_bytes(self, decoder: Decoder, linears: Sequence[Linear]) -> int:
        """What the sums of `metric` take at most."""
        return 2 * square_bytes(linears)

    def operations_a_token(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        """Of what `metric` adds up, a token of a sweep."""
        return {}

    def operations_once(self, linear: Linear) -> Operations:
        """Of the groups of a matrix, and of what they are expected to cost."""
        return operations.groups(linear.shape)

    # --- experts

    @property
    def over_experts(self) -> bool:
        words = {"all", "mlp", EXPERTS}
        asked = bool(words & set(self.projections)) and not words & set(self.exclude)
        return self.knows_experts and asked and self.unit != "latency"

    def linears(self, decoder: Decoder, layers: Iterable[int]) -> list[Linear]:
        layers = list(layers)
        found = super().linears(decoder, layers)
        if self.over_experts:
            for index in layers:
                experts = mixture(decoder, index)
                found += expert_linears(experts) if experts is not None else ()
        return found

    def well_seen(self, linears: Sequence[Linear], stats: Statistics) -> list[Linear]:
        """Those that enough tokens reached for their statistics: at least as many as these are
        wide. Which are others, of experts, are named in a warning and not decomposed.
        """
        few = [one.path for one in linears if is_of_expert(one) and self._is_seldom(one, stats)]
        if few:
            logger.warning(
                "%d matrices of experts saw fewer tokens than they have rows or columns, the first"
                " is '%s'; they are not decomposed (more --num-samples reach them)",
                len(few),
                few[0],
            )
        return [one for one in linears if one.path not in set(few)]

    def _is_seldom(self, linear: Linear, stats: Statistics) -> bool:
        found = self.curvature(linear, stats)
        return found is not None and found.input_tokens < min(linear.shape)

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
            self.sums_bytes(decoder, linears) + groups_bytes(linears),
            len(linears),
            workspace_bytes=decomposing_bytes([linear.shape for linear in linears]),
            at_once=max(len(linears), 1),
            made_bytes=groups_bytes(linears),
            a_token=self.operations_a_token(decoder, linears),
            once=total(self.operations_once(linear) for linear in linears),
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        linears = self.linears(decoder, self.possible_layers(decoder))
        paths = [linear.path for linear in linears]
        return [Similarity(), *(self.metric(paths, self._scratch(decoder)) if paths else ())]

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        costs = self.costs(runner.decoder)
        problem = self.pose(runner, stats, costs)
        yield from self.replacements(runner, problem, self.target(costs, problem))

    def predict(
        self, runner: Runner, stats: Statistics, ratios: Sequence[float]
    ) -> dict[float, tuple[float, float]]:
        costs, found = self.costs(runner.decoder), {}
        problem = self.pose(runner, stats, costs)
        for ratio in ratios:
            at = self.at_ratio(ratio)
            spend = at.spend(costs, problem.dense)
            if spend >= problem.least:
                found[ratio] = problem.rises(at.ranks(problem, spend))
        return found

    def at_ratio(self, ratio: float) -> Self:
        """The same method for another size, in the same unit."""
        return dataclasses.replace(
            self, ratio=ratio, retain_ratio=None, speedup=None, budget=self.unit
        )

    def pose(self, runner: Runner, stats: Statistics, costs: Costs) -> Problem:
        """What the budget chooses from: of every matrix that may be edited, its ranks."""
        linears = self.linears(runner.decoder, self.chosen_layers(runner.decoder, stats))
        ranks = self.decomposed(runner, stats, linears, costs)
        layers: dict[int, list[str]] = {}
        for linear in linears:
            layers.setdefault(linear.layer, []).append(linear.path)
        per_layer = tuple(All(tuple(paths)) for paths in layers.values())
        return Problem(ranks, All(per_layer), per_layer, tuple(ranks))

    def decomposed(
        self, runner: Runner, stats: Statistics, linears: Sequence[Linear], costs: Costs
    ) -> dict[str, Component]:
        """Decompose matrices, and say what each of their ranks costs and loses."""
        decoder = runner.decoder
        scratch = self._scratch(decoder)
        for linear in linears:
            for rank in (None, 0):  # time is measured now, while nothing else runs
                costs.of(linear.path)(linear.shape, rank)

        def decompose(linear: Linear) -> Tensors:
            with runner.holding(linear.layer):
                found = self.groups(linear, stats, scratch)
                lost = self.losses(linear, found, stats, runner.data.seed)
                seen = tails(lost.sort(descending=True).values)
                expected = self.expected(linear, seen, stats)
                return found.squares, found.expand, found.contract, lost, expected

        def keep(made: Tensor) -> Tensor:
            return made if made.dim() < 2 else scratch.hold(made)

        components = {
            linear.path: staying(linear, costs.of(linear.path)(linear.shape, None))
            for linear in linears
        }
        linears = self.well_seen(linears, stats)
        decoder.progress("decomposing", 0, len(linears))
        made = runner.each(decompose, linears, keep)
        for done, (linear, tensors) in enumerate(zip(linears, made, strict=True), 1):
            found, (lost, expected) = Groups(*tensors[:3]), tensors[3:]
            seen = tails(lost.sort(descending=True).values)
            cost = costs.of(linear.path)
            offer = options(
                linear.shape, expected, cost, self.rank_multiple, seen, self.least_saving
            )
            replace = partial(self.replacement, linear, found, lost, expected)
            components[linear.path] = Component(
                linear.layer, offer, replace, matrices=(linear.path,)
            )
            decoder.progress("decomposing", done, len(linears))
        return components

    def target(self, costs: Costs, problem: Problem) -> float:
        """What the components may cost together. Raises `RecipeError` where they cannot."""
        spend, least = self.spend(costs, problem.dense), problem.least
        if spend < least * (1 - 1e-9) and self.share is not None:
            largest = self.share * (problem.dense - least) / (problem.dense - spend)
            raise self.unreachable(largest, f"--budget {self.unit}, all as small as can be")
        if spend < least * (1 - 1e-9):
            most = math.ceil(1e4 * least / problem.dense) / 1e4
            raise RecipeError(
                f"--retain-ratio {self.retain_ratio}: cannot be reached; the least reachable is"
                f" {most} (all as small as can be)"
            )
        return spend

    def replacements(self, runner: Runner, problem: Problem, spend: float) -> Iterator[Step]:
        """The edits that meet the budget. A problem posed once serves any number of budgets."""
        yield from carried_out(runner, problem, self.ranks(problem, spend))

    def replacement(
        self,
        linear: Linear,
        found: Groups,
        losses: Tensor,
        expected: Tensor,
        rank: int,
        refit: Callable[[Tensor, Tensor], Tensor] | None = None,
        storage: str | None = None,
    ) -> Step:
        """The pair that holds the best `rank` groups of a matrix. `refit(left, right)`: another
        left factor for the same right one. `storage`: another one than that of the method.
        """
        kept = losses.argsort(descending=True, stable=True)[:rank].sort().values
        left, right = found.pair(linear.weight, kept)
        left = left if refit is None else refit(left, right)
        dropped = torch.ones(len(losses), dtype=torch.bool).index_fill(0, kept, False)
        seen = float(losses[dropped].double().sum()) if self.predicts else None
        loss = stated(float(expected[rank]), seen) if seen is not None else None
        scored = Attribution(linear.path, self.score, losses, found.squares.sqrt())
        is_plain = (storage or self.storage) == "pair"
        factors = balanced(left, right) if is_plain else pivoted(left, right)
        return Step(Factorize(linear.path, *factors), noted(scored, kept, loss, seen))

    def _scratch(self, decoder: Decoder) -> Scratch:
        """A place for the sums, and later for the groups' vectors."""
        linears = self.linears(decoder, self.possible_layers(decoder))
        return decoder.scratch(groups_bytes(linears), self.scratch)


def staying(linear: Linear, cost: float) -> Component:
    """A matrix that stays as it is."""
    return Component(linear.layer, fixed(cost), never, matrices=(linear.path,))


def carried_out(
    runner: Runner, problem: Problem, sizes: Allocation, plain: Collection[str] = ()
) -> Iterator[Step]:
    """The edits of all that becomes smaller; experts are taken apart before the first of them.
    `plain`: matrices whose pairs are not pivoted, however others are stored.
    """
    for name, component, size in problem.taken(sizes):
        yield from apart(runner.decoder, name)
        make = partial(component.make, storage="pair") if name in plain else component.make
        with runner.holding(component.layer):
            made = runner.once(name, partial(make, size))
        yield made


def apart(decoder: Decoder, path: str) -> Iterator[Step]:
    """What must be done before the matrix at `path` is edited: if it is an expert's, and those of
    its layer are in one tensor, they are taken apart.
    """
    layer = fused_at(decoder, path)
    if layer is not None:
        yield Step(SplitExperts(layer), Note(predicted_loss=0.0, seen_loss=0.0))


def square_bytes(linears: Sequence[Linear]) -> int:
    """Of one float32 square matrix of the shorter side of every matrix."""
    return 4 * sum(min(linear.shape) ** 2 for linear in linears)


def decomposing_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """Of the most that the decomposition of one of these matrices holds at once: the matrix and its
    product with the metric, and some squares of its shorter side; in float64.
    """
    return max((8 * (2 * m * n + SQUARES * min(m, n) ** 2) for m, n in shapes), default=0)


def groups_bytes(linears: Sequence[Linear]) -> int:
    """Of the vectors of all groups (`grasp.stages.basis.Groups`)."""
    return 2 * square_bytes(linears)
