"""GRASP in the Fisher basis, with one budget for the whole model (ours; starts from arXiv
2501.00339, section 3.2).

The paper scores a singular group by the first-order change of the loss, which is nearly zero at a
trained model, and drops the second-order term. Here that term is the score:

1. One sweep collects, for every matrix W, X = E[xx'] of its inputs and D = E[dd'] of the loss
   gradients at its outputs, in two halves of the text.
2. The singular value decomposition of D^½ W X^½ gives groups {D^-½ u_k, sigma_k, v_k' X^-½}.
   Dropping group k costs sigma_k^2 / 2 nats a token. So does, in its own way, dropping a channel of
   an MLP, the others standing in for it (Optimal Brain Surgeon): one unit for all, and the losses
   add up.
3. What was chosen on one half is judged on the other: that gives the loss to expect of unseen text.
4. One Lagrange multiplier picks the rank of every matrix and the width of every MLP, for the lowest
   expected loss within the budget. `ratio` is the only dial.
5. A narrower MLP is smaller dense matrices. The kept groups are stored as a pivoted pair, `rank^2`
   numbers smaller than two thin matrices and the same map (arXiv 2501.19090).

Every piece can be switched alone (`parts`, `basis`, `score`, `allocation`, `storage`), and
`layers="bi"` goes back to the paper's choice of layers.

Near it: OBD-LLM (arXiv 2604.00821) has the same basis, with one rank for all; IO-SVD (2605.15626)
and GFWSVD (2505.17974) are close to it; LLM Surgeon (2312.17244) prunes rows and columns in the
same metric; MoDeGPT (2408.09632) and A3 (2505.12942) decompose functional parts. Ours: one currency
and one budget for all of these, the forecast, and serving what comes of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.fields import flag
from grasp.core.layer import Linear
from grasp.core.records import Curvature, Statistics
from grasp.core.scratch import Scratch
from grasp.methods.size import STORAGES, STORED
from grasp.methods.structure import Structure
from grasp.stages import operations
from grasp.stages.basis import BASES, Groups, groups
from grasp.stages.curvature import Curvatures
from grasp.stages.forecast import forecast_ranks, halves
from grasp.stages.operations import Operations, total
from grasp.stages.statistics import WeightGrad

SCORES = ("magnitude", "taylor", "random")


@dataclass(frozen=True, kw_only=True)
class GraspFisher(Structure):
    """Keep the ranks and MLP channels that the loss's second-order term depends on, under one
    budget for the whole model.
    """

    name: ClassVar[str] = "grasp-fisher"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.00339"
    knows_experts: ClassVar[bool] = True

    storage: str = flag("pivoted", STORED, words=STORAGES)
    basis: str = flag("fisher", "Metric of the decomposition: plain, input or fisher.", words=BASES)
    score: str = flag(
        "magnitude",
        "Importance of a singular group: magnitude (its share of the loss in the Fisher basis),"
        " taylor or random.",
        words=SCORES,
    )

    def metric(self, paths: Sequence[str], scratch: Scratch) -> list[Collector]:
        curvatures = [Curvatures(paths, scratch)] if self.basis != "plain" else []
        return [*curvatures, *([WeightGrad(paths)] if self.score == "taylor" else [])]

    @property
    def over_experts(self) -> bool:
        return super().over_experts and self.score != "taylor"

    def curvature(self, linear: Linear, stats: Statistics) -> Curvature | None:
        return None if self.basis == "plain" else halves(stats, linear.path).whole

    def groups(self, linear: Linear, stats: Statistics, scratch: Scratch) -> Groups:
        return groups(linear.weight, self.curvature(linear, stats), self.basis, scratch)

    def expected(self, linear: Linear, seen: Tensor, stats: Statistics) -> Tensor:
        """Decomposed on each half of the blocks, and judged on both."""
        if not self.predicts:
            return seen
        parts = halves(stats, linear.path).parts
        return forecast_ranks(linear.weight, seen, parts, self.basis)

    def losses(self, linear: Linear, found: Groups, stats: Statistics, seed: int) -> Tensor:
        """In the Fisher basis by magnitude: nats a token."""
        if self.score == "magnitude":
            return found.squares / 2
        if self.score == "taylor":
            left, right = found.pair(linear.weight, torch.arange(len(found.squares)))
            grad = stats[WeightGrad.name][linear.path].to(left)
            return ((left.mT @ grad) * right).sum(1).abs().cpu()
        number = seed * 1_000_003 + zlib.crc32(linear.path.encode())
        generator = torch.Generator().manual_seed(number)
        return torch.rand(found.squares.shape, generator=generator)

    def planned_parameters(self, decoder: Decoder, linears: Sequence[Linear]) -> int | None:
        return self.most_parameters(decoder, linears)

    def operations_a_token(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        return total(
            [
                *([super().operations_a_token(decoder, linears)] if self.basis != "plain" else []),
                *([operations.gradients(linears)] if self.score == "taylor" else []),
            ]
        )

    def sums_bytes(self, decoder: Decoder, linears: Sequence[Linear]) -> int:
        squares = super().sums_bytes(decoder, linears) if self.basis != "plain" else 0
        gradients = sum(4 * linear.shape[0] * linear.shape[1] for linear in linears)
        return squares + (gradients if self.score == "taylor" else 0)

    @property
    def predicts(self) -> bool:
        return (self.basis, self.score) == ("fisher", "magnitude")
