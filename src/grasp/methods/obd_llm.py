"""OBD-LLM: Optimal Brain Decomposition for Accurate LLM Low-Rank Approximation (Li et al., arXiv
2604.00821).

1. Sweep the calibration set once, with a backward pass: X = E[xx'] of every matrix's inputs and D =
   E[dd'] of the loss gradients at its outputs. Their Kronecker product stands for the Hessian.
2. The singular value decomposition of D^½ W X^½ (whitened on both sides) gives groups {D^-½ u_k,
   sigma_k, v_k' X^-½}: dropping group k raises the loss by about sigma_k^2 / 2 nats a token, and no
   other matrix of that rank raises it less.
3. Every matrix keeps the same share of its parameters, `rank = int(m n r / (m + n))`, in two thin
   matrices.

It is the basis of `grasp-fisher` without all else: no budget over the model, nothing but ranks, one
round, plain pairs. Any roots of X and D give the same product. Where we deviate: D and X are damped
as there (`grasp.stages.basis`); they are summed up in two halves of the text, so that the loss to
expect of unseen text is told (`grasp.stages.forecast`), which changes no rank and no group;
`--ratio` is a share of ALL parameters of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.layer import Linear
from grasp.core.records import Curvature, Statistics
from grasp.core.scratch import Scratch
from grasp.methods.low_rank import LowRank
from grasp.stages import operations
from grasp.stages.basis import Groups, groups
from grasp.stages.curvature import Curvatures
from grasp.stages.forecast import forecast_ranks, halves
from grasp.stages.operations import Operations, total


@dataclass(frozen=True, kw_only=True)
class OBDLLM(LowRank):
    """Truncate every matrix where the loss's second-order term changes least, all at the same
    share.
    """

    name: ClassVar[str] = "obd-llm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2604.00821"
    knows_experts: ClassVar[bool] = True

    def metric(self, paths: Sequence[str], scratch: Scratch) -> list[Collector]:
        return [Curvatures(paths, scratch, half=half) for half in (0, 1)]

    def curvature(self, linear: Linear, stats: Statistics) -> Curvature:
        return halves(stats, linear.path).whole

    def groups(self, linear: Linear, stats: Statistics, scratch: Scratch) -> Groups:
        return groups(linear.weight, self.curvature(linear, stats), "fisher", scratch)

    def expected(self, linear: Linear, seen: Tensor, stats: Statistics) -> Tensor:
        parts = halves(stats, linear.path).parts
        return forecast_ranks(linear.weight, seen, parts, "fisher")

    def operations_a_token(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        return operations.sums(decoder, linears, backward=True)

    def operations_once(self, linear: Linear) -> Operations:
        of_halves = operations.halves(linear.shape, collects_inputs=False)
        return total([super().operations_once(linear), of_halves])

    def sums_bytes(self, decoder: Decoder, linears: Sequence[Linear]) -> int:
        return 2 * super().sums_bytes(decoder, linears)

    @property
    def predicts(self) -> bool:
        return True
