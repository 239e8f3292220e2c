"""Magnitude SVD: plain truncated singular value decomposition of every matrix, a control (Eckart
and Young, 1936).

1. `W = U Sigma V'`: dropping group k changes `||W - W'||^2` by sigma_k^2, and no other matrix of
   that rank changes it less. Nothing is asked of the text.
2. Every matrix keeps the same share of its parameters, `rank = int(m n r / (m + n))`, and becomes
   `U Sigma^½` and `Sigma^½ V'`.

What a method that looks at inputs or gradients must beat. The calibration set is swept for block
influence alone, which the report shows and `--layers bi` goes by.
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
from grasp.methods.low_rank import LowRank
from grasp.stages.basis import Groups, groups


@dataclass(frozen=True, kw_only=True)
class MagnitudeSVD(LowRank):
    """Truncate every matrix by its singular values alone, all at the same share (a control)."""

    name: ClassVar[str] = "magnitude-svd"
    paper: ClassVar[str] = "https://doi.org/10.1007/BF02288367"

    def metric(self, paths: Sequence[str], scratch: Scratch) -> list[Collector]:
        return []

    def groups(self, linear: Linear, stats: Statistics, scratch: Scratch) -> Groups:
        return groups(linear.weight, None, "plain", scratch)

    def sums_bytes(self, decoder: Decoder, linears: Sequence[Linear]) -> int:
        return 0
