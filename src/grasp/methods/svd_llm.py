"""SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression (Wang
et al., arXiv 2403.07378, ICLR 2025), by whitening alone: the paper's SVD-LLM (W), with no update of
the weights afterwards.

1. Sweep the calibration set once, on the dense model: X X', summed over the tokens that each matrix
   W reads.
2. With S S' = X X', the singular value decomposition `W S = U Sigma V'`: dropping group k changes
   the outputs by sigma_k^2, and no other matrix of that rank changes them less.
3. Every matrix keeps the same share of its parameters, `rank = int(m n r / (m + n))`, and becomes
   `U Sigma^½` and `Sigma^½ V' S^-1`.

The paper takes the Cholesky factor for S. Any S gives the same product, since two of them differ by
a rotation that goes into V; here it is the symmetric root, which also a singular X X' has. Where we
deviate: `grasp.stages.basis.INPUT_DAMPING` of the mean eigenvalue is always added to the diagonal
(the paper: a little more than the least eigenvalue, where Cholesky fails), and `--ratio` is a share
of ALL parameters of the model. The paper's ratio is of the decoder's matrices alone: 20 % there is
`--retain-ratio 0.8`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.layer import Linear
from grasp.core.records import Statistics
from grasp.core.scratch import Scratch
from grasp.methods.low_rank import LowRank, square_bytes
from grasp.stages.basis import Groups, groups
from grasp.stages.curvature import InputCurvatures


@dataclass(frozen=True, kw_only=True)
class SVDLLM(LowRank):
    """Truncate every matrix where its outputs change least, all at the same share (whitening, no
    update).
    """

    name: ClassVar[str] = "svd-llm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.07378"

    def metric(self, paths: Sequence[str], scratch: Scratch) -> list[Collector]:
        return [InputCurvatures(paths, scratch)]

    def groups(self, linear: Linear, stats: Statistics, scratch: Scratch) -> Groups:
        return groups(linear.weight, stats[InputCurvatures.name][linear.path], "input", scratch)

    def sums_bytes(self, decoder: Decoder, linears: Sequence[Linear]) -> int:
        return square_bytes(linears)
