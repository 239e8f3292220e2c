"""LLM-Pruner: On the Structural Pruning of Large Language Models (Ma et al., arXiv 2305.11627,
NeurIPS 2023), without the LoRA training that follows in the paper (`grasp recover`).

1. What hangs together goes together (section 3.1): a channel is a row of gate, a row of up and a
   column of down; a KV group is a key-value head with the query heads that read it, their rows of
   q, k and v, their columns of o.
2. One sweep with gradients: of a few samples, g = dL/dW of the mean loss (the paper: 10 samples of
   64 tokens, `--num-samples 10 --seq-len 64`).
3. The importance of a group is the sum over its weights (section 3.2), `--importance`

       param_first    |w g|
       param_second   |w g - w^2 h / 2|,  h = mean over samples s of g_s^2   (eq. 5)
       vectorize      |sum of w g over a vector|, a vector being a row or a column   (eq. 3)

4. Every layer that may be narrower loses the same share of its groups, the least important ones.
   The first and the last layers stay whole: the model needs them most (section 4.1).

The sums that the scores need: for `param_first` g of every weight, since |.| stands around a sum
over samples; for `param_second` the squares beside it; for `vectorize`, which is linear in g, one
number a row and a column.

The published code: its `param_second` is the term w^2 h alone, and eq. 5 is called `param_mix`; a
head counts by itself, so only models without grouped queries fit; and its `--pruning_ratio 0.25` is
a share of layers 4 to 29 of 32, about 20 % of the model. Here `--ratio` is of ALL parameters. Which
layers stay whole goes by depth: of n the first n / 8, at most 4, and the last n / 16, at most 2, so
4 and 2 of 32, and none of 7 or fewer (`--layers`). A KV group is a large part of a layer; groups go
by the nearest whole number, and channels make up the rest, so the size is met to within a channel.
Where no KV group can go (OLMo 2: norms run over all heads), channels alone go, with a notice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Narrow, Step
from grasp.core.edits.cuts import CHANNELS, KV_GROUPS
from grasp.core.fields import flag
from grasp.core.layer import Linear
from grasp.core.linalg import wide
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.methods.base import Plan
from grasp.methods.widths import INNER, LAYERS, Widths, gone
from grasp.stages import operations
from grasp.stages.coupled import first_order, importance, paths, second_order, vectors
from grasp.stages.shares import Part, part, spread, widths
from grasp.stages.statistics import Similarity, SquaredGrad, VectorGrad, WeightGrad

logger = logging.getLogger(__name__)

IMPORTANCE = {
    "param_first": (WeightGrad,),
    "param_second": (WeightGrad, SquaredGrad),
    "vectorize": (VectorGrad,),
}
"""How important a group is -> what that is made of."""


@dataclass(frozen=True, kw_only=True)
class LLMPruner(Widths):
    """Remove whole KV groups and MLP channels, those whose weights matter least to the loss (Taylor
    importance), the same share in every layer but the first and last ones.
    """

    name: ClassVar[str] = "llm-pruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.11627"

    layers: tuple[str, ...] = flag((INNER,), LAYERS)
    importance: str = flag(
        "param_first",
        "Of a group: param_first (sum of |weight x gradient|), param_second (to second order), or"
        " vectorize (|sum| over each row and column).",
        words=tuple(IMPORTANCE),
    )

    def parts(self, decoder: Decoder) -> list[Part]:
        layers = self.chosen_layers(decoder)
        found = (part(decoder, layer, axis) for layer in layers for axis in (KV_GROUPS, CHANNELS))
        return [one for one in found if one is not None]

    def left(self, decoder: Decoder) -> dict[Part, int]:
        """How many units of each part stay."""
        parts, target = self.parts(decoder), self.target(decoder)
        return widths(parts, spread(parts, target), target)

    def linears(self, decoder: Decoder) -> list[Linear]:
        """All matrices that may lose rows or columns."""
        return [
            decoder.layer(one.layer).linears[path]
            for one in self.parts(decoder)
            for path in paths(decoder, one.axis)
        ]

    def plan(self, decoder: Decoder) -> Plan:
        left, linears = self.left(decoder), self.linears(decoder)
        narrower = [one for one, n in left.items() if n < one.count]
        numbers = (
            sum(2 * sum(linear.shape) for linear in linears)  # in float64
            if self.importance == "vectorize"
            else len(IMPORTANCE[self.importance]) * sum(one.weight.numel() for one in linears)
        )
        return Plan(
            len({one.layer for one in narrower}),
            len(narrower),
            decoder.num_parameters() - gone(list(left), left),
            0,
            1,
            4 * numbers,
            a_token=operations.gradients(linears),
            a_block=operations.kept_gradients(linears),
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        names = [linear.path for linear in self.linears(decoder)]
        return [Similarity(), *(kind(names) for kind in IMPORTANCE[self.importance])]

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        decoder, left = runner.decoder, self.left(runner.decoder)
        layers = {one.layer for one in left}
        if alone := layers - {one.layer for one in left if one.axis == KV_GROUPS}:
            logger.warning(
                "no KV group of %d of %d layers can go (there is one only, norms run over all"
                " heads, or a matrix is not dense); their channels go for them",
                len(alone),
                len(layers),
            )
        for one in sorted(left, key=lambda one: one.layer):
            if left[one] == one.count:
                continue
            with runner.holding(one.layer):
                linears = decoder.layer(one.layer).linears
                scores = {
                    path: self.scores(linears[path], stats, runner.data.num_blocks)
                    for path in paths(decoder, one.axis)
                }
                found = importance(decoder, one.layer, one.axis, scores)
            best = found.argsort(descending=True, stable=True)[: left[one]].sort().values
            yield Step(Narrow(one.layer, one.axis, best.cpu(), of=one.count))

    def scores(self, linear: Linear, stats: Statistics, samples: int) -> Float[Tensor, "both"]:
        """The importance of every row and then every column of a matrix, (out + in,), in nats a
        token.
        """
        tokens = max(stats.num_tokens, 1)
        if self.importance == "vectorize":
            return stats[VectorGrad.name][linear.path].abs() / tokens
        weight, grad = wide(linear.weight), stats[WeightGrad.name][linear.path] / tokens
        if self.importance == "param_first":
            return vectors(first_order(weight, grad))
        # samples of one length: g_s = G_s samples / tokens, so their mean square is this
        squares = stats[SquaredGrad.name][linear.path] * (samples / tokens**2)
        return vectors(second_order(weight, grad, squares))
