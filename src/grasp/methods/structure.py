"""What makes a model smaller and faster at once: ranks of matrices beside fewer channels, value
dimensions and KV groups, and layers that are gone, under one budget. A method gives the metric and
the singular groups; this is the rest.

Everything is priced in nats a token, so everything competes. Of ways to make the same numbers
smaller (the ranks of gate, up and down, or fewer channels) the budget takes one. With two rounds,
what is narrower is made so first; fresh statistics of the narrower model then say the ranks.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Step
from grasp.core.fields import RankMultiple, flag
from grasp.core.layer import Linear
from grasp.core.records import Allocation, Statistics
from grasp.core.runner import Runner
from grasp.core.sharing import Tensors
from grasp.errors import RecipeError
from grasp.methods.base import Plan
from grasp.methods.components import Component, Problem
from grasp.methods.costs import Costs
from grasp.methods.dial import Dial
from grasp.methods.low_rank import carried_out, decomposing_bytes, staying
from grasp.methods.parts import (
    DEFAULT,
    DENSE,
    EXPERTS,
    LAYERS,
    PARTS,
    RANKS,
    beyond,
    experts_gone,
    leaving,
    most_gone,
    narrower_first,
    one_width,
    problem_of,
    settled,
)
from grasp.stages import operations
from grasp.stages.curvature import Curvatures
from grasp.stages.forecast import halves
from grasp.stages.narrowing import AXES, Narrowing, Place, cost_at, narrowed, narrowing, place
from grasp.stages.operations import Operations, total
from grasp.stages.routing import ExpertLosses
from grasp.stages.sensitivity import Sensitivities
from grasp.stages.statistics import Similarity
from grasp.stages.sublayers import LayerLosses

logger = logging.getLogger(__name__)

SPREAD = (RANKS, "values", EXPERTS)
"""Parts that leave pairs, or gaps."""
ALLOCATIONS = ("uniform", "per-layer", "global")
WIDTH_MULTIPLE = 32
LEAST_SAVING = 0.1
"""Of a pair, as a share of its matrix, where other parts compete with ranks: one that saves less
costs more time than it saves. smollm2 has a quarter fewer pairs so, for 0.003 nats.
"""


@dataclass(frozen=True, kw_only=True)
class Structure(Dial):
    """Base of the methods whose losses are nats, so that ranks compete with other parts."""

    parts: tuple[str, ...] | None = flag(
        None,
        "What may become smaller: ranks (of matrices), channels (of MLPs), values (dimensions of"
        " value heads), groups (key-value heads with their queries), layers, experts (whole ones,"
        " beside their ranks); default:"
        f" {','.join(DEFAULT)}, or {','.join(DENSE)} with --shape dense.",
        words=PARTS,
        metavar="PART,...",
    )
    shape: str = flag(
        "any",
        "dense: only smaller dense matrices and removed layers, no pairs anywhere.",
        words=("any", "dense"),
    )
    uniform: bool = flag(
        False,
        "One width for the MLPs of all layers, and no pairs: an ordinary checkpoint, which needs no"
        " plug-in.",
    )
    allocation: str = flag(
        "global",
        "Shares: uniform (one for all matrices or MLPs), per-layer (one a layer) or global (one"
        " budget).",
        words=ALLOCATIONS,
    )
    rounds: int = flag(
        2,
        "2: make the model narrower first, then find ranks from fresh statistics; 1 takes a little"
        " more than half the time.",
        words=(1, 2),
    )
    width_multiple: RankMultiple = flag(
        WIDTH_MULTIPLE,
        "Widths of MLPs are multiples of this; 128 suits tensor parallelism.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        said = f"--parts {','.join(self.parts or ())}"
        if self.parts is not None and (not self.parts or len(set(self.parts)) < len(self.parts)):
            raise RecipeError(f"{said}: name at least one of {', '.join(PARTS)}, and none twice")
        if self.rounds_weights and (self.uniform or not self.predicts):
            what = "--uniform" if self.uniform else "scores that are not losses in nats"
            raise RecipeError(
                f"{self.said_bits}: not together with {what}; compress first, then round with"
                " `grasp quantize`"
            )
        if self.for_servers and set(self.kinds) - {LAYERS}:
            way = "leave it out, or take layers"
            raise RecipeError(f"{said}: with --layout {self.layout} only layers may go; {way}")
        if self.is_dense and (odd := [part for part in self.kinds if part in SPREAD]):
            raise RecipeError(
                f"{said}: {' and '.join(odd)} leave no plain dense matrices; with"
                f" {'--uniform' if self.uniform else '--shape dense'} take some of"
                f" {', '.join(part for part in PARTS if part not in SPREAD)}"
            )
        if self.uniform and "channels" not in self.kinds:
            raise RecipeError(f"{said}: --uniform is about channels; name them")
        if EXPERTS in self.kinds and (RANKS not in self.kinds or LAYERS in self.kinds):
            raise RecipeError(
                f"{said}: a whole expert goes as matrices of rank 0, beside the ranks of the others"
                " and not with layers; name ranks, and leave layers out"
            )
        if self.more and not self.predicts:
            named = said if self.parts else f"--shape {self.shape}"
            raise RecipeError(
                f"{named}: {', '.join(self.more)} compete in nats of loss, which only --basis"
                " fisher --score magnitude give; take these, or --parts ranks"
            )

    @property
    def is_dense(self) -> bool:
        """Whether no pairs are wanted."""
        return self.shape == "dense" or self.uniform

    @property
    def kinds(self) -> tuple[str, ...]:
        """What may become smaller, in the order of `PARTS`."""
        if self.parts is not None:
            return tuple(part for part in PARTS if part in self.parts)
        if self.for_servers:
            return ()
        if self.is_dense:
            return DENSE
        return DEFAULT if self.predicts else (RANKS,)

    @property
    def more(self) -> tuple[str, ...]:
        """The parts beside ranks."""
        return tuple(part for part in self.kinds if part != RANKS)

    @property
    def curved(self) -> bool:
        """Whether ranks or widths are priced, and not bits and layers alone."""
        return bool(set(self.kinds) - {LAYERS}) or not self.rounds_weights

    @property
    def least_saving(self) -> float:
        """0 where shares are given out, and where times say what a pair is worth."""
        free = self.allocation == "global" and self.unit != "latency"
        return LEAST_SAVING if free and self.more else 0.0

    @property
    def over_experts(self) -> bool:
        # a layer that goes takes its experts along: they would be counted twice
        return super().over_experts and RANKS in self.kinds and LAYERS not in self.kinds

    @property
    def again(self) -> bool:
        """Whether ranks wait for a second round."""
        return self.rounds == 2 and RANKS in self.kinds and bool(self.more)

    def check(self, decoder: Decoder) -> None:
        super().check(decoder)
        linears = self.linears(decoder, self.possible_layers(decoder))
        places = self.places(decoder, linears, self.more)
        widest = max((one.count for one in places if one.part == "channels"), default=None)
        if widest is None or self.width_multiple < widest:
            return
        said = (
            f"--width-multiple {self.width_multiple}: the widest MLP has {widest} channels, so none"
            " can become narrower"
        )
        if self.width_multiple != WIDTH_MULTIPLE:
            raise RecipeError(f"{said}; take a smaller one, or name other --parts than channels")
        logger.warning("%s; take a smaller one for that", said)

    def plan(self, decoder: Decoder) -> Plan:
        plan, rounds = super().plan(decoder), 2 if self.again else 1
        linears = self.linears(decoder, self.planned_layers(decoder))
        places = self.places(decoder, linears, self.more)
        channels = [one.count for one in places]
        narrowing = decomposing_bytes([(count, count) for count in channels])
        again = [operations.sums(decoder, linears, backward=True)] if self.again else []
        again += [self.of_sensitivities(decoder, linears)] if self.again else []
        ranks = [plan.once] * rounds if RANKS in self.kinds else []
        narrower = [operations.narrowing(one.reader.shape) for one in places]
        refits = [operations.refit(one.reader.shape) for one in places]
        return dataclasses.replace(
            plan,
            backward_sweeps=plan.backward_sweeps * rounds,
            decompositions=plan.decompositions * rounds if RANKS in self.kinds else 0,
            workspace_bytes=max(plan.workspace_bytes, narrowing),
            a_token=total([plan.a_token, *again]),
            once=total([*ranks, *narrower, *refits, *([self.of_rounding(linears)] * rounds)]),
        )

    def operations_a_token(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        readers = [one.reader.path for one in self.places(decoder, linears, self.more)]
        found = operations.sums(decoder, linears, readers, backward=True) if self.curved else {}
        return total([found, self.of_sensitivities(decoder, linears)])

    def operations_once(self, linear: Linear) -> Operations:
        found = super().operations_once(linear)
        if not self.predicts:
            return found
        return total([found, operations.halves(linear.shape, collects_inputs=False)])

    # --- statistics

    def needs(self, decoder: Decoder) -> list[Collector]:
        linears = self.linears(decoder, self.possible_layers(decoder))
        return [Similarity(), *self.asked(decoder, linears, self.more)]

    def asked(
        self, decoder: Decoder, linears: Sequence[Linear], parts: Sequence[str]
    ) -> list[Collector]:
        """What the prices of these matrices' ranks and of `parts` are made of."""
        scratch, paths = self._scratch(decoder), [linear.path for linear in linears]
        if not paths:
            return []
        if not self.predicts:
            return self.metric(paths, scratch)
        readers = [one.reader.path for one in self.places(decoder, linears, parts)]
        whole: list[Collector] = [LayerLosses(decoder.family)] if LAYERS in parts else []
        whole += [ExpertLosses(decoder.family)] if EXPERTS in parts else []
        if self.rounds_weights:
            whole.append(Sensitivities(paths, scratch, self.rounds_activations))
        text = (0, 1) if self.curved else ()
        return [*(Curvatures(paths, scratch, readers, half) for half in text), *whole]

    def places(
        self, decoder: Decoder, linears: Sequence[Linear], parts: Sequence[str]
    ) -> list[Place]:
        """Where the model can be made narrower. Not in the MLP of the last layer, where every layer
        need not: it costs several times what a quadratic of means says there.
        """
        if self.is_dense and not decoder.family.heads_by_width:
            parts = [part for part in parts if part != "groups"]  # they would leave gaps
        chosen = {linear.path for linear in linears}
        layers = dict.fromkeys(linear.layer for linear in linears)
        wanted = [(layer, part) for layer in layers for part in AXES if part in parts]
        if self.allocation == "global" and not self.uniform:
            wanted = [one for one in wanted if one != (decoder.kept[-1], "channels")]
        found = (place(decoder, layer, part, chosen) for layer, part in wanted)
        return [one for one in found if one is not None]

    def sums_bytes(self, decoder: Decoder, linears: Sequence[Linear]) -> int:
        places = self.places(decoder, linears, self.more)
        wide = {one.reader.path: one.reader.shape for one in places if not one.reader.is_tall}
        inputs = sum(4 * columns**2 for _, columns in wide.values())
        halves = (2 if self.predicts else 1) if self.curved else 0
        of_bits = sum(4 * linear.shape[1] ** 2 for linear in linears) if self.rounds_weights else 0
        return halves * (super().sums_bytes(decoder, linears) + inputs) + of_bits

    def most_saved(self, decoder: Decoder, linears: Sequence[Linear], costs: Costs) -> float:
        """At most: where layers may go, all but one are taken for gone; where bits may go, all."""
        if self.rounds_weights:
            return costs.whole
        if RANKS in self.kinds:
            return super().most_saved(decoder, linears, costs)
        saved: dict[int, float] = {}
        for where in self.places(decoder, linears, self.more):
            least = min(self.multiple(where), where.count)
            now, then = (cost_at(decoder, where, size, costs) for size in (where.count, least))
            saved[where.layer] = saved.get(where.layer, 0.0) + now - then
        if LAYERS in self.kinds:
            saved |= most_gone(linears, costs)
        return sum(saved.values())

    # --- rounds

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        decoder, layers = runner.decoder, self.chosen_layers(runner.decoder, stats)
        costs, outside = self.costs(decoder), self.outside(runner)
        problem = self.posed(runner, stats, self.linears(decoder, layers), self.more, costs)
        offer = self.in_widths(decoder, stats, problem, outside)
        spend = self.target(costs, offer.problem)
        chosen = self.ranks(offer.problem, spend)
        sizes = offer.sizes(chosen)
        first = narrower_first(problem, sizes)
        if not self.again or first is None:
            yield from self.carried_out(runner, stats, offer, chosen)
            return
        yield from carried_out(runner, problem, first)
        linears = self.linears(decoder, [layer for layer in layers if layer in decoder.kept])
        spend -= settled(problem, Allocation({**sizes.sizes, **first.sizes}), linears)
        del problem, offer, stats
        parts = [part for part in self.more if part == EXPERTS]
        asked = self.asked(decoder, linears, parts)
        again = runner.sweep(asked, "statistics of the narrower model")
        problem = self.posed(runner, again, linears, parts, costs)
        offer = self.in_widths(decoder, again, problem, outside)
        yield from self.carried_out(runner, again, offer, self.ranks(offer.problem, spend))

    def pose(self, runner: Runner, stats: Statistics, costs: Costs) -> Problem:
        decoder = runner.decoder
        linears = self.linears(decoder, self.chosen_layers(decoder, stats))
        problem = self.posed(runner, stats, linears, self.more, costs)
        return self.in_widths(decoder, stats, problem, self.outside(runner)).problem

    def posed(
        self,
        runner: Runner,
        stats: Statistics,
        linears: Sequence[Linear],
        parts: Sequence[str],
        costs: Costs,
    ) -> Problem:
        """What the budget chooses from: ranks, and these parts."""
        decoder = runner.decoder
        for where in self.places(decoder, linears, parts):
            cost_at(decoder, where, 1, costs)  # time is measured while nothing else runs
        components: dict[str, Component] = {}
        for found in self.narrowings(runner, stats, linears, parts):
            offer = found.options(decoder, costs, self.multiple(found.where))
            make = partial(self.narrower, decoder, found, stats)
            if len(offer.sizes):
                paths = tuple(linear.path for linear in found.where.linears)
                components[found.where.name] = Component(
                    found.where.layer, offer, make, found.where.count, paths
                )
        if LAYERS in parts:
            components |= beyond(costs, linears)
            components |= leaving(decoder, stats, linears, costs, RANKS in self.kinds)
        if RANKS in self.kinds:
            components |= self.decomposed(runner, stats, linears, costs)
            components |= experts_gone(stats, linears, costs) if EXPERTS in parts else {}
        else:
            components |= {
                linear.path: staying(linear, costs.of(linear.path)(linear.shape, None))
                for linear in linears
            }
        return problem_of(decoder, linears, components)

    def multiple(self, where: Place) -> int:
        """Of the units of a part that stay."""
        return self.width_multiple if where.part == "channels" else max(where.count // 24, 1)

    def narrowings(
        self, runner: Runner, stats: Statistics, linears: Sequence[Linear], parts: Sequence[str]
    ) -> Iterator[Narrowing]:
        """What each place that can be narrower costs at every width."""
        decoder = runner.decoder

        def price(where: Place) -> Tensors:
            with runner.holding(where.layer):
                found = narrowing(decoder, where, halves(stats, where.reader.path))
                return found.order, found.losses, found.seen

        places = self.places(decoder, linears, parts)
        decoder.progress("narrowing", 0, len(places))
        made = runner.each(price, places)
        for done, (where, tensors) in enumerate(zip(places, made, strict=True), 1):
            yield Narrowing(where, *tensors)
            decoder.progress("narrowing", done, len(places))

    def narrower(self, decoder: Decoder, found: Narrowing, stats: Statistics, size: int) -> Step:
        """The edit that leaves `size` units of a part."""
        return narrowed(decoder, found, halves(stats, found.where.reader.path), size)

    def ranks(self, problem: Problem, spend: float) -> Allocation:
        if not self.uniform:
            return problem.solve(self.allocation, spend)
        found, free = one_width(problem, spend), problem.solve("global", spend)
        logger.info(
            "--uniform: expected to lose %.3f nats a token; with a width for every layer %.3f",
            problem.rises(found)[0],
            problem.rises(free)[0],
        )
        return found
