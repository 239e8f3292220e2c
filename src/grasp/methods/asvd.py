"""ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models (Yuan
et al., arXiv 2312.05821).

1. Sweep the calibration set once, on the dense model: the mean of |x_j|, over all tokens, of every
   input feature j.
2. With `s_j = (mean |x_j|)^alpha + 1e-6`, the singular value decomposition `W diag(s) = U Sigma
   V'`: columns that meet large inputs are kept better.
3. Keep the first groups, as `U Sigma^½` and `Sigma^½ V' diag(s)^-1`. How many: the same share of
   every matrix (`uniform`), or by its sensitivity (`strs`, grasp.stages.truncation): try every
   matrix alone at kept shares of 0.9 to 0.4, measure the loss, and take the harmless truncations
   first. What is never taken stays dense.

What the published code does otherwise: it sums the means of the blocks where we take the mean, a
constant factor but for the 1e-6; it truncates the head too, which here stays as it is; it takes the
cut of the last step of its bisection, which need not be the one found; a decomposition that fails
leaves random numbers (earlier versions decompose by a random sketch). Here it is exact, and a
failure ends the run. Losses are measured on the first `--search-samples` blocks, not on all, in
nats, whose order is that of perplexities.

`--ratio` is a share of ALL parameters of the model; the paper's is of its linears. With `strs`
every matrix keeps 0.4 of itself, so about 0.6 of the matrices is the most that can go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from msgspec import Meta

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Edit, Step
from grasp.core.fields import NumSamples, flag
from grasp.core.layer import Linear
from grasp.core.records import Allocation, Statistics
from grasp.core.runner import Runner
from grasp.core.scratch import Scratch
from grasp.errors import RecipeError
from grasp.methods.base import Plan
from grasp.methods.components import Component, Problem
from grasp.methods.costs import Costs
from grasp.methods.low_rank import LowRank, carried_out
from grasp.stages.basis import Groups, scaled_groups
from grasp.stages.input_norms import InputMeans
from grasp.stages.options import options
from grasp.stages.truncation import KEPT, cut, to_try, truncatable

UNIFORM, STRS = "uniform", "strs"
SEARCH_SAMPLES = 4
"""Each costs six passes a matrix."""


@dataclass(frozen=True, kw_only=True)
class ASVD(LowRank):
    """Truncate every matrix with its columns scaled by how large their inputs are."""

    name: ClassVar[str] = "asvd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2312.05821"

    alpha: Annotated[float, Meta(ge=0, le=1)] = flag(
        0.5, "Power of the mean input size that columns are scaled by; 0 is plain truncation."
    )
    allocation: str = flag(
        UNIFORM,
        "Shares: uniform (one for all matrices) or strs (by what truncating each alone does to the"
        " loss; many forward passes).",
        words=(UNIFORM, STRS),
    )
    search_samples: NumSamples | None = flag(
        None,
        "Blocks of the calibration set on which --allocation strs measures each loss: the first so"
        f" many, or all there are (default {SEARCH_SAMPLES}).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search_samples is not None and not self.searches:
            raise RecipeError(
                f"--search-samples {self.search_samples}: only --allocation {STRS} searches; give"
                " both or neither"
            )
        if self.searches and self.unit == "latency":
            asked = "--budget latency" if self.speedup is None else f"--speedup {self.speedup}"
            raise RecipeError(
                f"{asked}: --allocation {STRS} tries shares of a matrix's numbers, not of its time;"
                f" take --budget params or bytes, or --allocation {UNIFORM}"
            )
        least = min(KEPT)
        if self.searches and self.retain_ratio is not None and self.retain_ratio < least:
            raise RecipeError(
                f"--retain-ratio {self.retain_ratio}: --allocation {STRS} keeps at least {least} of"
                f" every matrix; take that or more, or --allocation {UNIFORM}"
            )

    @property
    def searches(self) -> bool:
        """Whether ranks are searched."""
        return self.allocation == STRS

    def metric(self, paths: Sequence[str], scratch: Scratch) -> list[Collector]:
        return [InputMeans(paths)]

    def groups(self, linear: Linear, stats: Statistics, scratch: Scratch) -> Groups:
        means = stats[InputMeans.name][linear.path]
        return scaled_groups(linear.weight, means**self.alpha + 1e-6, scratch)

    def sums_bytes(self, decoder: Decoder, linears: Sequence[Linear]) -> int:
        return 8 * sum(linear.shape[1] for linear in linears)

    # --- sensitivity-based truncation rank search

    def plan(self, decoder: Decoder) -> Plan:
        plan = super().plan(decoder)
        if not self.searches or self.share == 0:
            return plan
        blocks = len(KEPT) * plan.num_edits * self._search_samples
        return dataclasses.replace(plan, forward_blocks=blocks)

    def planned_parameters(self, decoder: Decoder, linears: Sequence[Linear]) -> int | None:
        if self.searches:
            return self.most_parameters(decoder, linears)
        return super().planned_parameters(decoder, linears)

    def most_saved(self, decoder: Decoder, linears: Sequence[Linear], costs: Costs) -> float:
        if not self.searches:
            return super().most_saved(decoder, linears, costs)
        offers = []
        for linear in linears:
            nothing, cost = torch.zeros(min(linear.shape) + 1), costs.of(linear.path)
            offer = options(linear.shape, nothing, cost, self.rank_multiple)
            offers.append(truncatable(offer))
        return sum((offer.dense - float(offer.costs[0]) for offer in offers), 0.0)

    def unreachable(self, largest: float, hint: str) -> RecipeError:
        if self.searches:
            hint += f"; --allocation {STRS} keeps {min(KEPT)} of each, {UNIFORM} goes further"
        return super().unreachable(largest, hint)

    def pose(self, runner: Runner, stats: Statistics, costs: Costs) -> Problem:
        problem = super().pose(runner, stats, costs)
        if not self.searches:
            return problem
        components = {
            path: dataclasses.replace(one, offer=truncatable(one.offer))
            for path, one in problem.components.items()
        }
        return dataclasses.replace(problem, components=components)

    def replacements(self, runner: Runner, problem: Problem, spend: float) -> Iterator[Step]:
        if self.searches and spend < problem.dense:
            yield from carried_out(runner, problem, self.searched(runner, problem, spend))
        else:
            yield from super().replacements(runner, problem, spend)

    def searched(self, runner: Runner, problem: Problem, spend: float) -> Allocation:
        """The ranks that STRS finds."""
        wanted = to_try(problem.offers)
        edits = {
            f"{path} {rank}": partial(_edit, runner, problem.components[path], rank)
            for path, rank in wanted
        }
        found = runner.tried(edits, self._search_samples, "search")
        losses = {(path, rank): found[f"{path} {rank}"] for path, rank in wanted}
        return cut(problem.offers, losses, spend)

    @property
    def _search_samples(self) -> int:
        return SEARCH_SAMPLES if self.search_samples is None else self.search_samples


def _edit(runner: Runner, component: Component, rank: int) -> Edit:
    with runner.holding(component.layer):
        return component.make(rank).edit
