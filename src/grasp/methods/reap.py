"""REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression (Lasby et al., arXiv
2510.13999).

1. Sweep the calibration set once, on the whole model.
2. Score every expert by what it adds to the tokens that the router sends to it (section 4):

       reap        S_j = mean over the tokens routed to j of g_j(x) |f_j(x)|
       frequency   the number of those tokens (a control)

   g_j: the router's weight as the model uses it; f_j: what the expert makes of the token.
3. Every layer loses the same number of experts, those of the lowest score. The router loses their
   rows, and each token goes to as many experts as before, of those that are left.

The number is the smallest that reaches `--ratio`, a share of ALL parameters. DeepSeek's experts are
in groups of which a token takes a few: each group loses equally many, or the groups would no longer
be of one size. The result is an ordinary model of fewer experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import DropExperts, Step
from grasp.core.experts import Mixture, mixtures
from grasp.core.fields import Count, Share, flag
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.methods.base import Method, Plan, check_one_size, ratio_unreachable
from grasp.stages.routing import ExpertUse, Use
from grasp.stages.statistics import Similarity

SCORES = ("reap", "frequency")


@dataclass(frozen=True, kw_only=True)
class Reap(Method):
    """Remove whole experts, those that add least to the tokens they get, the same number from every
    layer.
    """

    name: ClassVar[str] = "reap"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.13999"
    changes_experts: ClassVar[bool] = True

    ratio: Share | None = flag(
        None, "Share of ALL parameters to remove; the number of experts follows."
    )
    num_experts: Count | None = flag(None, "Keep this many experts in every layer.")
    score: str = flag(
        "reap",
        "Of an expert: reap (mean weight x norm of what it gives its tokens) or frequency (how many"
        " tokens it gets).",
        words=SCORES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_size(self.name, {"--ratio": self.ratio, "--num-experts": self.num_experts})

    def check(self, decoder: Decoder) -> None:
        found = mixtures(decoder)
        if not found:
            raise RecipeError(
                f"--method {self.name}: {decoder.family.name} has no experts to remove; take a"
                " method that edits matrices or layers"
            )
        if len({(one.count, one.groups, one.per_token) for one in found}) > 1:
            raise RecipeError(
                f"--method {self.name}: the layers of this model differ in their number of experts"
            )
        self._left(decoder)

    def plan(self, decoder: Decoder) -> Plan:
        found, left = mixtures(decoder), self._left(decoder)
        gone = sum((one.count - left) * one.numbers for one in found)
        edits = 1 if gone else 0
        return Plan(len(found) * edits, edits, decoder.num_parameters() - gone, 1, 0)

    def needs(self, decoder: Decoder) -> list[Collector]:
        return [Similarity(), ExpertUse(decoder.family)]

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        found, left = mixtures(runner.decoder), self._left(runner.decoder)
        if left == found[0].count:
            return
        keep = {
            one.layer: kept(one, self._scores(stats[ExpertUse.name][one.layer]), left)
            for one in found
        }
        yield Step(DropExperts(keep, found[0].count))

    def _scores(self, use: Use) -> Float[Tensor, "experts"]:
        """Higher = keep."""
        return use.saliency if self.score == "reap" else use.tokens.double()

    def _left(self, decoder: Decoder) -> int:
        """How many experts every layer keeps. Raises `RecipeError` where they would be too few, or
        more than there are.
        """
        found = mixtures(decoder)
        count, groups, least = found[0].count, found[0].groups, found[0].least
        if self.num_experts is not None:
            if not least <= self.num_experts <= count or self.num_experts % groups:
                multiple = "" if groups == 1 else f", in multiples of its {groups} groups"
                raise RecipeError(
                    f"--num-experts {self.num_experts}: the layers have {count} experts and need"
                    f" {least}; allowed: {least} to {count}{multiple}"
                )
            return self.num_experts
        assert self.ratio is not None
        total, each = decoder.num_parameters(), groups * sum(one.numbers for one in found)
        left = count - groups * math.ceil((self.ratio * total - 1e-6) / each)
        if left < least:
            largest = (count - least) // groups * each / total
            hint = f"{least} of {count} experts left in every layer"
            raise ratio_unreachable(self.ratio, largest, hint)
        return left


def kept(one: Mixture, scores: Float[Tensor, "experts"], left: int) -> tuple[int, ...]:
    """The `left` experts of the highest scores, equally many of every group."""
    size = one.count // one.groups
    order = scores.view(one.groups, size).argsort(dim=1, descending=True, stable=True)
    chosen = order[:, : left // one.groups].sort(dim=1).values
    return tuple(group * size + place for group, row in enumerate(chosen.tolist()) for place in row)
