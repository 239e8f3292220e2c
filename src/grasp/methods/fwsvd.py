"""FWSVD: Language Model Compression with Weighted Low-Rank Factorization (Hsu et al., arXiv
2207.00112, ICLR 2022).

1. Sweep the calibration set once, with a backward pass. A sample is one block, and its loss is its
   own: `f_j = sum over samples, sum over outputs i of (dL/dW_ij)^2` says how much the loss depends
   on the weights that read input feature j (the diagonal of the empirical Fisher information, one
   weight a feature).
2. With D = diag(sqrt f), the singular value decomposition `W D = U Sigma V'`: dropping group k
   changes `sum_ij f_j (W - W')_ij^2` by sigma_k^2, and no matrix of that rank changes it less.
3. Every matrix keeps the same share of its parameters, `rank = int(m n r / (m + n))`, and becomes
   `U Sigma^½` and `Sigma^½ V' D^-1`.

The sum over samples stands for the paper's mean, and the loss summed over a block's tokens for
their mean: constant factors, which change no group (blocks have one length; of padded ones the
longer count for more). A common mistake, also in the published code of ASVD, is D = diag(f^¼), by a
root that is taken twice.

Where we deviate: f of an input that no gradient reaches is 0, and D has no inverse; it is lifted to
`FLOOR` of the mean, which is a millionth in D and far above rounding in float64, and touches no
other. The paper's samples are labelled examples of a task, and it trains again afterwards; here
they are blocks of text and their next tokens, and training is `grasp recover`. `--ratio` is a share
of ALL parameters of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.layer import Linear
from grasp.core.records import Statistics
from grasp.core.scratch import Scratch
from grasp.methods.low_rank import LowRank
from grasp.stages import operations
from grasp.stages.basis import Groups, scaled_groups
from grasp.stages.operations import Operations
from grasp.stages.statistics import FeatureFisher

FLOOR = 1e-12
"""The least of f, as a share of its mean."""


@dataclass(frozen=True, kw_only=True)
class FWSVD(LowRank):
    """Truncate every matrix with its input features weighted by the Fisher information of their
    weights, all at the same share.
    """

    name: ClassVar[str] = "fwsvd"
    paper: ClassVar[str] = "https://arxiv.org/abs/2207.00112"

    def metric(self, paths: Sequence[str], scratch: Scratch) -> list[Collector]:
        return [FeatureFisher(paths)]

    def groups(self, linear: Linear, stats: Statistics, scratch: Scratch) -> Groups:
        return scaled_groups(
            linear.weight, scale_of(stats[FeatureFisher.name][linear.path]), scratch
        )

    def operations_a_token(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        return operations.gradients(linears)

    def sums_bytes(self, decoder: Decoder, linears: Sequence[Linear]) -> int:
        return 8 * sum(linear.shape[1] for linear in linears)


def scale_of(fisher: Float[Tensor, "in"]) -> Float[Tensor, "in"]:
    """The diagonal of D, above 0. All ones where nothing depends on the matrix."""
    if not bool(fisher.any()):
        return torch.ones_like(fisher)
    return fisher.clamp_min(FLOOR * float(fisher.mean())).sqrt()
