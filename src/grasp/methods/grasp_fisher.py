"""GRASP in the Fisher basis, with one budget for the whole model (ours; starts from arXiv
2501.00339, section 3.2).

The paper scores a singular group by the first-order change of the loss, which is nearly zero at a
trained model, and drops the second-order term. Here that term is the score:

1. One sweep collects, for every matrix W, X = E[xx'] of its inputs and D = E[dd'] of the loss
   gradients at its outputs.
2. The singular value decomposition of D^½ W X^½ gives groups {D^-½ u_k, sigma_k, v_k' X^-½}.
   Dropping group k costs sigma_k^2 / 2 nats a token: one unit for all matrices, and the losses add
   up.
3. One Lagrange multiplier picks the rank of every matrix, or "dense", for the lowest total loss
   within the budget. `ratio` is the only dial.
4. The kept groups are stored as a pivoted pair, `rank^2` numbers smaller than two thin matrices and
   the same map (arXiv 2501.19090).

Every piece can be switched alone (`basis`, `score`, `allocation`, `storage`), and `layers="bi"`
goes back to the paper's choice of layers.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize, Step, noted
from grasp.core.families import select
from grasp.core.fields import NumLayers, Place, RankMultiple, Share, flag, shortened
from grasp.core.layer import Linear
from grasp.core.linalg import balanced, pivoted
from grasp.core.records import Allocation, Attribution, Curvature, Statistics
from grasp.core.runner import Runner
from grasp.core.scratch import Scratch
from grasp.errors import RecipeError
from grasp.methods.base import Method, Plan, check_rank_multiple, ratio_unreachable
from grasp.stages import budget as budgets
from grasp.stages.basis import BASES, Groups, groups, over_cores
from grasp.stages.curvature import Curvatures
from grasp.stages.latency import Latency
from grasp.stages.redundancy import block_influence
from grasp.stages.statistics import Similarity, WeightGrad

logger = logging.getLogger(__name__)

SCORES, ALLOCATIONS = ("magnitude", "taylor", "random"), ("uniform", "per-layer", "global")
BUDGETS, STORAGES = ("params", "bytes", "latency"), ("pivoted", "pair")


@dataclass(frozen=True)
class Problem:
    """What the allocation chooses from: for every matrix its groups, the losses (k,) they cost when
    dropped, and its options.
    """

    linears: list[Linear]
    groups: Mapping[str, Groups]
    losses: Mapping[str, Tensor]
    offers: Mapping[str, budgets.Options]

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
class GraspFisher(Method):
    """Keep the singular groups that the loss's second-order term depends on, under one budget for
    all matrices.
    """

    name: ClassVar[str] = "grasp-fisher"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.00339"

    ratio: Share | None = flag(None, "Share of ALL parameters to remove.")
    layers: tuple[str, ...] = flag(
        ("all",),
        "Layers to edit: all, bi (the --num-layers most redundant ones), or indices such as"
        " 21,22,25.",
    )
    num_layers: NumLayers | None = flag(None, "Edit this many layers, the most redundant ones.")
    retain_ratio: Share | None = flag(
        None, "Instead of --ratio: share of the chosen matrices' parameters to keep."
    )
    basis: str = flag("fisher", "Metric of the decomposition: plain, input or fisher.", words=BASES)
    score: str = flag(
        "magnitude",
        "Importance of a singular group: magnitude (its share of the loss in the Fisher basis),"
        " taylor or random.",
        words=SCORES,
    )
    allocation: str = flag(
        "global",
        "Ranks: uniform (one share for all), per-layer (one share a layer) or global (one budget).",
        words=ALLOCATIONS,
    )
    budget: str = flag(
        "params",
        "What the share is of: params, bytes, or latency (decode time measured here, of the chosen"
        " matrices).",
        words=BUDGETS,
    )
    storage: str = flag(
        "pivoted",
        "How a product is stored: pivoted (rank² fewer numbers) or pair (two thin matrices).",
        words=STORAGES,
    )
    projections: tuple[str, ...] = flag(
        ("all",), "Matrices to replace: all, attention, mlp, or roles such as q,k,v,o,gate,up,down."
    )
    exclude: tuple[str, ...] = flag((), "Matrices to leave alone, by role or name, e.g. k,v.")
    rank_multiple: RankMultiple = flag(
        1, "Round ranks down to a multiple of this, e.g. 8 for hardware."
    )
    scratch: Place | None = flag(
        None,
        "Keep the statistics in files in this folder, not in memory (for large models).",
        recipe=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [
            name
            for name, value in (("--ratio", self.ratio), ("--retain-ratio", self.retain_ratio))
            if value is not None
        ]
        if len(given) != 1:
            said = "got both" if given else "none was given"
            raise RecipeError(
                f"--method {self.name}: say how much to compress with one of --ratio,"
                f" --retain-ratio; {said}"
            )
        indices = all(
            layer.isascii() and layer.isdecimal() and len(layer) < 10 for layer in self.layers
        )
        if indices:
            object.__setattr__(self, "layers", tuple(str(int(layer)) for layer in self.layers))
        elif self.layers not in (("all",), ("bi",)):
            raise RecipeError(
                f"--layers {shortened(','.join(self.layers))}: allowed: all, bi, or indices such as"
                " 21,22,25"
            )
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise RecipeError(
                f"--layers {','.join(self.layers)}: name at least one layer, and none twice"
            )
        if (self.num_layers is not None) != (self.layers == ("bi",)):
            raise RecipeError(
                "--num-layers and --layers bi go together (for the paper's method: --method grasp"
                " --num-layers ...)"
            )

    def check(self, decoder: Decoder) -> None:
        for layer in self.layers:
            if layer.isdigit() and int(layer) not in decoder.kept:
                raise RecipeError(
                    f"--layers {layer}: the model has layers 0 to {decoder.num_layers - 1}"
                )
        if self.num_layers is not None and self.num_layers > len(decoder.kept):
            raise RecipeError(
                f"--num-layers {self.num_layers}: the model has {len(decoder.kept)} layers"
            )
        check_rank_multiple(self.rank_multiple, self._linears(decoder, decoder.kept[:1]))
        if self.ratio is None or self.budget == "latency":
            return
        cost, linears = self._cost(decoder), self._linears(decoder, self._any_layers(decoder))
        saved = sum(cost(linear.shape, None) - cost(linear.shape, 0) for linear in linears)
        largest = saved / (
            decoder.num_parameters() if self.budget == "params" else decoder.num_bytes()
        )
        if self.ratio > largest:
            raise ratio_unreachable(
                self.ratio,
                largest,
                "all chosen matrices at rank 0; take more --layers or --projections",
            )

    def plan(self, decoder: Decoder) -> Plan:
        layers = self._any_layers(decoder)
        linears = self._linears(decoder, layers)
        total, sizes = decoder.num_parameters(), sum(math.prod(linear.shape) for linear in linears)
        gone = (
            self.ratio
            if self.ratio is not None
            else (1 - (self.retain_ratio or 0.0)) * sizes / total
        )
        parameters = None if self.budget == "latency" else math.floor((1 - gone) * total)
        sums = 2 * sum(min(linear.shape) ** 2 for linear in linears)
        backward = bool(linears) and (self.basis != "plain" or self.score == "taylor")
        return Plan(
            len(layers),
            len(linears),
            parameters,
            int(not backward),
            int(backward),
            sums * (2 if backward else 1),
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        paths = [linear.path for linear in self._linears(decoder, self._possible_layers(decoder))]
        collectors: list[Collector] = [Similarity()]
        if paths and self.basis != "plain":
            collectors.append(Curvatures(paths, self._scratch(decoder)))
        if paths and self.score == "taylor":
            collectors.append(WeightGrad(paths))
        return collectors

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        yield from self.replacements(runner, self.pose(runner, stats))

    def replacements(self, runner: Runner, problem: Problem) -> Iterator[Step]:
        """The edits that meet the budget. A problem posed once serves any number of budgets."""
        spend, least = self._spend(runner.decoder, problem), budgets.cheapest(problem.offers)
        if spend < least * (1 - 1e-9) and self.ratio is not None:
            dense = sum(offer.dense for offer in problem.offers.values())
            raise ratio_unreachable(
                self.ratio,
                self.ratio * (dense - least) / (dense - spend),
                f"--budget {self.budget}, all matrices at rank 0",
            )
        allocation = problem.solve(self.allocation, spend)
        for linear in problem.linears:
            rank = allocation.ranks[linear.path]
            if rank is not None:
                with runner.holding(linear.layer):
                    made = self.replacement(linear, problem, rank)
                yield made

    @property
    def predicts(self) -> bool:
        return (self.basis, self.score) == ("fisher", "magnitude")

    def predict(
        self, runner: Runner, stats: Statistics, ratios: Sequence[float]
    ) -> dict[float, float]:
        problem, found = self.pose(runner, stats), {}
        for ratio in ratios:
            at = dataclasses.replace(self, ratio=ratio, retain_ratio=None)
            spend = at._spend(runner.decoder, problem)
            if spend >= budgets.cheapest(problem.offers):
                found[ratio] = budgets.total_loss(
                    problem.offers, problem.solve(self.allocation, spend)
                )
        return found

    def pose(self, runner: Runner, stats: Statistics) -> Problem:
        """Decompose every matrix that may be edited, and say what each of its ranks costs and
        loses.
        """
        decoder = runner.decoder
        layers = self._choose(decoder, stats)
        for index in layers:
            if low_rank := len(decoder.replaced(index, self.projections)):
                logger.warning(
                    "layer %d: %d of its matrices are low-rank pairs already and stay as they are",
                    index,
                    low_rank,
                )
        linears = self._linears(decoder, layers)
        scratch = self._scratch(decoder)
        cost = self._cost(decoder)
        table: Mapping[str, Curvature] = stats.tables.get(Curvatures.name, {})
        grads: Mapping[str, Tensor] = stats.tables.get(WeightGrad.name, {})

        for shape in {linear.shape for linear in linears}:
            cost(shape, None)  # a measured cost is measured now, while nothing else runs

        def decompose(linear: Linear) -> tuple[Groups, Tensor]:
            with runner.holding(linear.layer):
                found = groups(linear.weight, table.get(linear.path), self.basis, scratch)
                lost = self._losses(linear, found, grads.get(linear.path), runner.data.seed)
            return found, lost

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

    def _losses(self, linear: Linear, found: Groups, grad: Tensor | None, seed: int) -> Tensor:
        """What dropping each group (k,) costs by the chosen score; in the Fisher basis by
        magnitude: nats a token.
        """
        if self.score == "magnitude":
            return found.squares / 2
        if self.score == "taylor":
            left, right = found.pair(linear.weight, torch.arange(len(found.squares)))
            return ((left.mT @ grad.to(left)) * right).sum(1).abs().cpu()  # type: ignore[union-attr]
        number = seed * 1_000_003 + zlib.crc32(linear.path.encode())
        generator = torch.Generator().manual_seed(number)
        return torch.rand(found.squares.shape, generator=generator)

    def replacement(self, linear: Linear, problem: Problem, rank: int) -> Step:
        """The pair that holds the best `rank` groups of a matrix."""
        found, losses = problem.groups[linear.path], problem.losses[linear.path]
        kept = losses.argsort(descending=True, stable=True)[:rank].sort().values
        left, right = found.pair(linear.weight, kept)
        dropped = torch.ones(len(losses), dtype=torch.bool).index_fill(0, kept, False)
        loss = float(losses[dropped].double().sum()) if self.predicts else None
        scored = Attribution(linear.path, self.score, losses, found.squares.sqrt())
        if self.storage == "pair":
            weight_in, weight = balanced(left, right)
            return Step(Factorize(linear.path, weight_in, weight), noted(scored, kept, loss))
        weight_in, weight, places = pivoted(left, right)
        return Step(Factorize(linear.path, weight_in, weight, places), noted(scored, kept, loss))

    def _choose(self, decoder: Decoder, stats: Statistics) -> list[int]:
        if self.num_layers is not None:
            return list(block_influence(stats).lowest(self.num_layers))
        return self._possible_layers(decoder)

    def _possible_layers(self, decoder: Decoder) -> list[int]:
        """The layers that may be edited, as far as is known before the sweep."""
        return (
            [int(layer) for layer in self.layers]
            if self.layers[0].isdigit()
            else list(decoder.kept)
        )

    def _any_layers(self, decoder: Decoder) -> list[int]:
        """As many layers as will be edited; before the sweep has said which, those with the most
        left to edit.
        """
        layers = self._possible_layers(decoder)
        if self.num_layers is None:
            return layers
        left = {
            layer: sum(math.prod(linear.shape) for linear in self._linears(decoder, [layer]))
            for layer in layers
        }
        return sorted(layers, key=lambda layer: -left[layer])[: self.num_layers]

    def _linears(self, decoder: Decoder, layers: Iterable[int]) -> list[Linear]:
        left_out = select(decoder.family, self.exclude, "--exclude") if self.exclude else ()
        return [
            linear
            for index in layers
            for linear in decoder.linears(index, self.projections)
            if linear.name not in left_out
        ]

    def _scratch(self, decoder: Decoder) -> Scratch:
        """A place for two square matrices of the shorter side of every matrix: the sums, and later
        the groups' vectors.
        """
        sides = sum(
            min(linear.shape) ** 2
            for linear in self._linears(decoder, self._possible_layers(decoder))
        )
        return Scratch.for_bytes(2 * 4 * sides, decoder.device, self.scratch)

    def _cost(self, decoder: Decoder) -> budgets.Cost:
        if self.budget == "latency":
            return Latency(decoder.device, decoder.dtype, self.storage == "pivoted")
        size = budgets.pivoted_parameters if self.storage == "pivoted" else budgets.parameters
        if self.budget == "params":
            return size
        width = decoder.dtype.itemsize
        places = 4 if self.storage == "pivoted" else 0
        return lambda shape, rank: (
            width * size(shape, rank) + (0 if rank is None else places * shape[0])
        )

    def _spend(self, decoder: Decoder, problem: Problem) -> float:
        """What the chosen matrices may cost together."""
        dense = sum(offer.dense for offer in problem.offers.values())
        if self.retain_ratio is not None:
            return self.retain_ratio * dense
        assert self.ratio is not None
        whole = {
            "params": decoder.num_parameters(),
            "bytes": decoder.num_bytes(),
            "latency": dense,
        }[self.budget]
        return dense - self.ratio * whole
