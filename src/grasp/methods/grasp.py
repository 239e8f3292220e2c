"""GRASP: Replace Redundant Layers with Adaptive Singular Parameters (Liu et al., arXiv
2501.00339v4, Algorithm 1).

1. Sweep the calibration set; block influence says which layers barely change their input (section
   3.1).
2. Write every matrix of those layers as a sum of singular groups `Phi_k = {u_k, sigma_k, v_k'}`.
3. Score the groups by how much the language-model loss depends on them (section 3.2;
   `grasp.stages.attribution`).
4. Keep the best ones and store them as two thin matrices (section 3.3).

One-shot scores all matrices from one forward and backward pass. Iterative goes from the last layer
to the first and, after each layer's MLP and again after its attention, sweeps the partly compressed
model (what the published code does; section 5 finds both equal). Where we deviate from the
published code: labels are shifted once, biases take part, the last layer is scored before the final
norm, and a sample is a block of tokens, not a line of text.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, get_args

import torch
from msgspec import Meta
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize, Step, noted
from grasp.core.fields import RankMultiple, Share, flag
from grasp.core.layer import Linear
from grasp.core.linalg import SigmaSplit, break_even_rank, factors, svd
from grasp.core.records import Allocation, Redundancy, Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.methods.base import LayerMethod, Plan, check_rank_multiple, ratio_unreachable
from grasp.stages import operations
from grasp.stages.allocation import for_budget, keep, saved, threshold, uniform
from grasp.stages.attribution import NEEDS_GROUP_GRAD, NEEDS_WEIGHT_GRAD, SCORES, attribute
from grasp.stages.statistics import GroupGrad, WeightGrad

logger = logging.getLogger(__name__)

DEFAULT_RETAIN_RATIO = 0.1
"""Where the paper's gains level off (Table 6)."""


@dataclass(frozen=True, kw_only=True)
class Grasp(LayerMethod):
    """Replace the matrices of redundant layers by the singular groups the loss depends on."""

    name: ClassVar[str] = "grasp"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.00339"

    retain_ratio: Share | None = flag(
        None, "Share of each replaced matrix's parameters to keep (default 0.1)."
    )
    threshold_ratio: Annotated[float, Meta(gt=0, le=1)] | None = flag(
        None, "Instead: keep the smallest set of groups that holds this share of a matrix's score."
    )
    score: str = flag(
        "taylor", "Importance of a singular group: " + ", ".join(SCORES) + ".", words=SCORES
    )
    iterative: bool = flag(
        False, "Sweep again after each layer's MLP and attention, last layer first."
    )
    projections: tuple[str, ...] = flag(
        ("all",), "Matrices to replace: all, attention, mlp, or roles such as q,k,v,o,gate,up,down."
    )
    rank_multiple: RankMultiple = flag(
        1, "Round ranks down to a multiple of this, e.g. 8 for hardware."
    )
    sigma_split: str = flag(
        "both",
        "Which factor holds the singular values: both (square roots), left (out) or right (in).",
        words=get_args(SigmaSplit),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain_ratio is not None and self.threshold_ratio is not None:
            raise RecipeError(
                "--retain-ratio and --threshold-ratio both say how many groups to keep; give one"
            )
        if self.ratio is not None and self.threshold_ratio is not None:
            raise RecipeError(
                "--ratio fixes the size, --threshold-ratio lets it follow from the scores; give one"
            )

    @property
    def _retain_ratio(self) -> float:
        return DEFAULT_RETAIN_RATIO if self.retain_ratio is None else self.retain_ratio

    def check(self, decoder: Decoder) -> None:
        self.check_layers(decoder, most=decoder.num_layers)
        check_rank_multiple(self.rank_multiple, decoder.linears(0, self.projections))
        if self.ratio is not None:
            self._for_ratio(decoder, range(decoder.num_layers))

    def plan(self, decoder: Decoder) -> Plan:
        layers: Sequence[int]
        allocation: Allocation | None = None
        if self.layers is not None:
            layers = self.layers
        elif self.num_layers is not None:
            layers = tuple(range(self.num_layers))
        else:
            layers, allocation = self._for_ratio(decoder, range(decoder.num_layers))
        linears = [
            linear for index in layers for linear in decoder.linears(index, self.projections)
        ]
        sweeps = (
            0
            if self.score in ("magnitude", "random")
            else 2 * len(layers)
            if self.iterative
            else min(len(layers), 1)
        )
        gradients = 4 * sum(math.prod(linear.shape) for linear in linears) if sweeps else 0
        parameters, num_edits = None, len(linears)
        if self.threshold_ratio is None:
            ranks = (allocation or self._uniform(linears)).sizes
            num_edits = sum(ranks[linear.path] is not None for linear in linears)
            parameters = decoder.num_parameters() - sum(
                saved(linear.shape, ranks[linear.path]) for linear in linears
            )
        fused = self.layers is not None and sweeps == 1 and self.score in NEEDS_WEIGHT_GRAD
        forward = 0 if fused else 1
        # the matrix, its groups and the score's product, and what a decomposition takes; in float32
        each = [4 * (3 * m * n + 8 * min(m, n) ** 2) for m, n in (one.shape for one in linears)]
        return Plan(
            len(layers),
            num_edits,
            parameters,
            forward,
            sweeps,
            gradients,
            num_edits,
            workspace_bytes=max(each, default=0),
            a_token=operations.gradients(linears) if sweeps else {},
            a_block=operations.kept_gradients(linears) if sweeps else {},
            once=operations.total(operations.svd(linear.shape) for linear in linears),
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        collectors = super().needs(decoder)
        if self.layers is not None and self.score in NEEDS_WEIGHT_GRAD and not self.iterative:
            linears = [
                linear
                for index in self.layers
                for linear in decoder.linears(index, self.projections)
            ]
            collectors += [WeightGrad(linear.path for linear in linears)] if linears else []
        return collectors

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        decoder = runner.decoder
        layers, allocation = self._choose(decoder, stats)
        order = sorted(layers, reverse=True)
        for index in order:
            if low_rank := len(decoder.replaced(index, self.projections)):
                logger.warning(
                    "layer %d: %d of its matrices are low-rank pairs already and stay as they are",
                    index,
                    low_rank,
                )
        if not self.iterative:
            linears = [
                linear for index in order for linear in self._processing_order(decoder, index)
            ]
            yield from self._replace(runner, linears, allocation, stats)
            return
        for index in order:
            for part in ("mlp", "attention"):
                names = {path for _, path in getattr(decoder.family, part)}
                linears = [
                    linear
                    for linear in decoder.linears(index, self.projections)
                    if linear.name in names
                ]
                yield from self._replace(
                    runner, linears, allocation, task=f"attribution, layer {index} {part}"
                )

    def _processing_order(self, decoder: Decoder, index: int) -> list[Linear]:
        """The layer's matrices, MLP before attention."""
        mlp = {path for _, path in decoder.family.mlp}
        return sorted(
            decoder.linears(index, self.projections), key=lambda linear: linear.name not in mlp
        )

    def _choose(
        self, decoder: Decoder, stats: Statistics
    ) -> tuple[Sequence[int], Allocation | None]:
        """The layers to replace, and the ranks where the budget fixes them."""
        if self.layers is not None:
            return self.layers, None
        redundancy = self.redundancy(stats)
        if self.num_layers is not None:
            return redundancy.lowest(self.num_layers), None
        return self._for_ratio(
            decoder, _most_redundant_first(redundancy), redundancy if self.angular else None
        )

    def _for_ratio(
        self, decoder: Decoder, order: Sequence[int], spans: Redundancy | None = None
    ) -> tuple[Sequence[int], Allocation]:
        """Layers and ranks that remove the asked-for share of all parameters. Raises `RecipeError`
        naming the largest share.
        """
        assert self.ratio is not None
        total = decoder.num_parameters()
        target = math.ceil(self.ratio * total - 1e-6)
        shapes = {
            index: {
                linear.path: linear.shape for linear in decoder.linears(index, self.projections)
            }
            for index in order
        }
        found = for_budget(order, shapes, target, self._retain_ratio, self.rank_multiple)
        for count in range(1, len(order) + 1) if spans is not None else ():
            order = sorted(spans.lowest(count), key=lambda index: spans.scores[index])  # type: ignore[union-attr]
            found = for_budget(order, shapes, target, self._retain_ratio, self.rank_multiple)
            if found.reached:
                break
        if not found.reached:
            hint = (
                f"all {decoder.num_layers} layers at --retain-ratio {self._retain_ratio}; lower it,"
                " or take more --projections"
            )
            raise ratio_unreachable(self.ratio, found.removed / total, hint)
        return order[: found.num_layers], found.allocation

    def _uniform(self, linears: Sequence[Linear]) -> Allocation:
        return uniform(
            {linear.path: linear.shape for linear in linears},
            self._retain_ratio,
            self.rank_multiple,
        )

    def _replace(
        self,
        runner: Runner,
        linears: Sequence[Linear],
        allocation: Allocation | None,
        stats: Statistics | None = None,
        task: str = "attribution",
    ) -> Iterator[Step]:
        """Score the groups of `linears` on the model as it is now, and yield their replacements one
        by one.
        """
        if allocation is None and self.threshold_ratio is None:
            allocation = self._uniform(linears)
        if allocation is not None:
            for linear in linears:
                if allocation.sizes[linear.path] is None:
                    _stays_dense(linear)
            linears = [linear for linear in linears if allocation.sizes[linear.path] is not None]
        if not linears:
            return
        groups: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        grads: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        if self.score in NEEDS_WEIGHT_GRAD:
            ready = stats is not None and WeightGrad.name in stats.tables
            found = (
                stats
                if stats is not None and ready
                else runner.sweep([WeightGrad(linear.path for linear in linears)], task)
            )
            grads = dict(found[WeightGrad.name])
        elif self.score in NEEDS_GROUP_GRAD:
            groups = {linear.path: _decompose(runner, linear) for linear in linears}
            moments = dict(runner.sweep([GroupGrad(groups)], task)[GroupGrad.name])
        for linear in linears:
            known, grad = groups.pop(linear.path, None), grads.pop(linear.path, None)
            rank = None if allocation is None else allocation.sizes[linear.path]
            make = partial(
                self._replacement, runner, linear, rank, known, grad, moments.get(linear.path)
            )
            if step := runner.once(linear.path, make):
                yield step
            else:
                _stays_dense(linear)

    def _replacement(
        self,
        runner: Runner,
        linear: Linear,
        rank: int | None,
        known: tuple[Tensor, Tensor, Tensor] | None,
        grad: Tensor | None,
        moments: Tensor | None,
    ) -> Step | None:
        """The pair that holds the best groups of a matrix, `rank` of them or, where that is None,
        as many as the threshold says; None where a pair would not be smaller. `known`: its
        decomposition, if it is known already.
        """
        u, s, vh = _decompose(runner, linear) if known is None else known
        generator = torch.Generator().manual_seed(
            runner.data.seed * 1_000_003 + zlib.crc32(linear.path.encode())
        )
        scored = attribute(
            linear.path, self.score, u, s, vh, grad=grad, moments=moments, generator=generator
        )
        if rank is None:
            rank = threshold(linear.shape, scored, self.threshold_ratio or 0.0, self.rank_multiple)
        if rank is None:
            return None
        kept = keep(scored, rank)
        a, b = factors(u, s, vh, kept.to(u.device), self.sigma_split)  # type: ignore[arg-type]
        return Step(Factorize(linear.path, a, b), noted(scored, kept))


def _decompose(runner: Runner, linear: Linear) -> tuple[Tensor, Tensor, Tensor]:
    with runner.holding(linear.layer):
        return svd(linear.weight)


def _stays_dense(linear: Linear) -> None:
    logger.warning(
        "%s stays dense: a pair of the rank asked for is not smaller than the %d x %d matrix"
        " (break-even rank %.1f)",
        linear.path,
        *linear.shape,
        break_even_rank(*linear.shape),
    )


def _most_redundant_first(redundancy: Redundancy) -> list[int]:
    return sorted(redundancy.scores, key=lambda index: (redundancy.scores[index], index))
