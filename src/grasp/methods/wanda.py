"""Wanda: A Simple and Effective Pruning Approach for Large Language Models (Sun et al., arXiv
2306.11695): pruning by weights and activations.

1. Go through the layers, first to last, with the inputs that the pruned layers before give
   (`grasp.methods.sparse`).
2. The score of a weight is `|W_ij| ||x_j||_2`, with x_j its input over all tokens.
3. In every row (one output), zero the `sparsity` share with the lowest scores; or the lowest N of
   every M weights next to each other (N:M). What is left is not updated.

Zeros are numbers too: the matrices keep their shapes, so nothing becomes smaller, and nothing
faster without kernels for sparse matrices. The matrices of one layer are scored together, and the
states in front of a layer are handed on to the next, as in the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.layer import Linear
from grasp.core.linalg import wide
from grasp.core.records import Statistics
from grasp.methods.sparse import Prune, Sparse, lowest
from grasp.stages import operations
from grasp.stages.input_norms import InputNorms
from grasp.stages.operations import Operations


@dataclass(frozen=True, kw_only=True)
class Wanda(Sparse):
    """Zero the weights of every row with the least |weight| times norm of its input. The model
    keeps its size: zeros are stored.
    """

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"

    def statistic(self, linears: Sequence[Linear], decoder: Decoder) -> Collector:
        return InputNorms(linear.path for linear in linears)

    def statistic_bytes(self, linears: Sequence[Linear]) -> int:
        return 8 * sum(linear.shape[1] for linear in linears)

    def operations_a_token(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        return {"touch": 2.0 * sum(linear.shape[1] for linear in linears)}

    def operations_once(self, linear: Linear) -> Operations:
        return operations.sorting(linear.shape)

    def pruner(self, stats: Statistics) -> Prune:
        norms = stats[InputNorms.name]
        return lambda linear: linear.weight * self.mask(linear.weight, norms[linear.path])

    def mask(
        self, weight: Float[Tensor, "out in"], norms: Float[Tensor, "in"]
    ) -> Bool[Tensor, "out in"]:
        """True where a weight stays. Of equal scores the first goes."""
        scores = wide(weight).abs() * norms.to(weight.device, torch.float32)
        rows = scores.unflatten(1, (-1, self.group or scores.shape[1]))
        return ~lowest(rows, self.share).view_as(scores)
