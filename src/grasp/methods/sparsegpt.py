"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar and Alistarh,
arXiv 2301.00774).

1. Go through the layers, first to last, with the inputs that the pruned layers before give
   (`grasp.methods.sparse`), and sum H = 2/n sum xx' over the n tokens that each matrix W reads.
2. Columns that are never read (H_jj = 0) become zero. `damping` of the mean of H's diagonal is
   added to it. `H^-1 = U'U`, with U upper triangular.
3. Go through the columns, first to last, in blocks of `block_size`. The score of a weight, as it is
   after all columns before, is `w^2 / U_jj^2`: by how much the outputs change without it.
   - A share: when a block begins, that share of its weights goes, the lowest in all rows together.
     (One block as wide as the matrix would choose before anything is updated, and do no better
     than by weights and activations.)
   - N:M: at every M-th column, the lowest N of the next M weights of every row go.
4. When a weight goes, those behind it in its row are updated to make up for it
   (`grasp.stages.obs_columns`): inside the block at once, beyond it when the block is done.

As in the published code the matrices of one layer are pruned by what they read before any of them
was, and the hidden states are handed on from layer to layer. Where we deviate: exactly the share
goes (the published code compares with a threshold, which takes one weight more in every block, and
all that equal it); columns that are never read do not count in the mean (there they count as 1, in
whatever units H is); U comes of one Cholesky factor in float64, not of two and an inverse in
float32, and the columns in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.fields import Count, Place, Share, flag
from grasp.core.layer import Linear
from grasp.core.linalg import wide
from grasp.core.records import Statistics
from grasp.errors import NumericsError, RecipeError
from grasp.methods.sparse import Prune, Sparse, lowest
from grasp.stages import operations
from grasp.stages.curvature import InputCurvatures
from grasp.stages.obs_columns import Replace, inverse_factor, replaced
from grasp.stages.operations import Operations


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Sparse):
    """Zero the weights that change the outputs least, and update those behind them in the row to
    make up for it. The model keeps its size: zeros are stored.
    """

    name: ClassVar[str] = "sparsegpt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2301.00774"

    damping: Share = flag(
        0.01, "Added to the diagonal of every matrix's H, as a share of its mean."
    )
    block_size: Count = flag(
        128,
        "Columns that are pruned before the update reaches those beyond; a share is met in each"
        " block.",
    )
    scratch: Place | None = flag(
        None,
        "Keep the statistics in files in this folder, not in memory (for large models).",
        recipe=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size % (self.group or 1):
            raise RecipeError(
                f"--block-size {self.block_size}: must be a multiple of {self.group} with"
                f" --sparsity {self.sparsity}"
            )

    def statistic(self, linears: Sequence[Linear], decoder: Decoder) -> Collector:
        size = 4 * sum(linear.shape[1] ** 2 for linear in linears)
        scratch = decoder.scratch(size, self.scratch)
        paths = [linear.path for linear in linears]
        return InputCurvatures(paths, scratch, inputs=paths)

    def statistic_bytes(self, linears: Sequence[Linear]) -> int:
        squares = [linear.shape[1] ** 2 for linear in linears]
        return 4 * sum(squares) + 24 * max(squares, default=0)  # H, and three in float64 for U

    def operations_a_token(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        return operations.sums(decoder, linears, [linear.path for linear in linears])

    def operations_once(self, linear: Linear) -> Operations:
        return operations.columns(linear.shape, self.block_size)

    def pruner(self, stats: Statistics) -> Prune:
        found = stats[InputCurvatures.name]

        @lru_cache(maxsize=1)  # matrices that read one input share the sum, which is the key
        def factor(gram: Tensor, tokens: int, on: torch.device, dtype: torch.dtype) -> Tensor:
            return inverse_factor(gram.to(on) * (2 / tokens), self.damping).to(dtype)

        def prune(linear: Linear) -> Tensor:
            seen, weight = found[linear.path], wide(linear.weight)
            gram = seen.near if linear.is_tall else seen.inputs
            assert gram is not None
            try:
                root = factor(gram, max(seen.input_tokens, 1), weight.device, weight.dtype)
            except NumericsError as failure:
                raise NumericsError(
                    f"'{linear.path}': {failure}; give more --damping than {self.damping}, or more"
                    " calibration text"
                ) from None
            unread = gram.diagonal().to(weight.device) == 0
            return self.pruned(weight.masked_fill(unread, 0), root)

        return prune

    def pruned(
        self, weight: Float[Tensor, "out n"], factor: Float[Tensor, "n n"]
    ) -> Float[Tensor, "out n"]:
        """W pruned and updated, with `factor` = U."""

        def choose(_first: int, values: Tensor, pivots: Tensor) -> Replace:
            scores = (values / pivots).square()
            together = scores if self.group else scores.reshape(1, -1)
            gone = lowest(together, self.share).view_as(scores)
            return lambda i, column: column.masked_fill(gone[:, i], 0)

        return replaced(weight, factor, choose, self.group or self.block_size, self.block_size)
