"""Stage 2b''', rounding: in which widths a matrix can be stored, how many bytes each takes, and
what it costs in nats, the currency of ranks and channels.

Rounding changes a matrix by E, which has no direction of its own: the price is that of
`grasp.stages.sensitivity`, `1/2 sum_ij F_ij E_ij^2`, with the E that is really left. Of a low-rank
pair both factors are rounded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grasp.core.layers.packing_grasp import (
    BITS,
    DYNAMIC,
    INTEGERS,
    SYMMETRIC,
    ZEROS,
    dequantized,
    has_zeros,
    is_grouped,
    num_bytes,
    num_groups,
)
from grasp.core.layers.quantized_grasp import SLICE
from grasp.core.rounding import (
    furthest,
    grouped,
    in_slices,
    meaning,
    nearest,
    not_zero,
    rounded,
    stored,
)
from grasp.stages.obs_columns import Replace, inverse_factor, replaced
from grasp.stages.sensitivity import Sensitivity

GROUPS = (32, 64, 128)
"""Columns that share a scale."""
KEPT = torch.bfloat16
"""What scales and zeros are kept in."""
SCALE = 2
"""Bytes of a scale, and of a zero: they are in 16 bits."""
PLACE = 4
"""Bytes of the place of a row."""
PAIR = 3.0
"""Times the price of a matrix that its plain pair costs, both factors rounded. On smollm2 it was
0.8 to 4.1 times in 6 bits and 1.3 to 6.1 in 4 (docs/log.md).
"""
COPIES = 16
"""Of the numbers that are fitted at once, about so many are there meanwhile."""
RANGES, REFITS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7), 2
"""Shares of a group's range that are tried, and how often each is fitted again."""
FEEDBACK_DAMPING = 0.03
"""Added to the diagonal of the inputs' covariance, as a share of its mean."""
ROWS = 128
"""Of a matrix, so many are enough for its price."""
PIVOTED, PIVOTED_BITS = 14.0, 8
"""The same for a pivoted pair, whose coefficients carry errors on; so only in that many bits, and
plain in fewer (docs/log.md).
"""


@dataclass(frozen=True)
class Width:
    """How the numbers of a matrix are stored: the scheme, as "int4", and how many columns share a
    scale.
    """

    scheme: str
    group_size: int

    @property
    def bits(self) -> int:
        """Of a number, without its share of the scales."""
        return BITS[self.scheme]

    def num_bytes(self, rows: Any, columns: Any) -> Any:
        """What a matrix (rows, columns) takes in the file, numbers alone."""
        scales = num_groups(self.scheme, columns, self.group_size) * SCALE
        zeros = scales if has_zeros(self.scheme) else 0
        return rows * (num_bytes(self.scheme, columns) + scales + zeros)

    def divides(self, columns: int) -> bool:
        """Whether no group of so many columns is shorter than others."""
        return not is_grouped(self.scheme) or columns % self.group_size == 0

    @property
    def rounds_activations(self) -> bool:
        """Whether what the matrix multiplies is rounded to 8 bits too."""
        return self.scheme == DYNAMIC

    @property
    def in_pairs(self) -> Width:
        """How the factors of a pair are stored: their activations are not rounded."""
        return dataclasses.replace(self, scheme="int8") if self.rounds_activations else self

    @property
    def tensors(self) -> int:
        """In how many a matrix is stored."""
        return 3 if has_zeros(self.scheme) else 2

    def __str__(self) -> str:
        group = f"/{self.group_size}" if is_grouped(self.scheme) else ""
        return f"{self.bits} bits{group}{', activations too' if self.rounds_activations else ''}"


def widths(
    bits: Sequence[int],
    groups: Sequence[int] = GROUPS,
    symmetric: bool = False,
    activations: bool = False,
) -> tuple[Width, ...]:
    """All ways to store a matrix in one of these numbers of bits, in groups of these sizes; 16 is
    no rounding. `symmetric`: 4 bits without a zero. `activations`: in 8 bits, what it multiplies is
    rounded too.
    """
    schemes = {8: DYNAMIC if activations else "int8", 4: SYMMETRIC if symmetric else "int4"}
    return tuple(
        Width(schemes.get(one, f"int{one}"), size)
        for one in bits
        if one < 16
        for size in (groups if one < 8 else groups[:1])
    )


def is_pivoted(width: Width, pivoted: bool) -> bool:
    """How a pair in this width is stored, where one in 16 bits is `pivoted`."""
    return pivoted and width.bits >= PIVOTED_BITS


def pair_bytes(
    width: Width, shape: tuple[int, int], ranks: Int[Tensor, "ranks"], pivoted: bool
) -> Float[Tensor, "ranks"]:
    """What the numbers of pairs of these ranks take in the file."""
    rows, columns = shape
    if is_pivoted(width, pivoted):
        second = width.num_bytes(rows - ranks, ranks) + PLACE * rows
    else:
        second = width.num_bytes(rows, ranks)
    return (width.num_bytes(ranks, columns) + second).double()


def pair_loss(
    width: Width, loss: float, ranks: Int[Tensor, "ranks"], pivoted: bool
) -> Float[Tensor, "ranks"]:
    """What rounding pairs of these ranks costs, where it costs the matrix `loss`; in nats a
    token.
    """
    times = PIVOTED if is_pivoted(width, pivoted) else PAIR
    return times * loss * (ranks > 0).double()


def to_width(
    name: str,
    matrix: Float[Tensor, "rows columns"],
    width: Width,
    dtype: torch.dtype,
    inputs: Float[Tensor, "columns columns"] | None = None,
) -> dict[str, Tensor]:
    """The stored tensors of the matrix `name` in a width, its scales in `dtype`.

    8 bits: to the nearest. Fewer: every group of a row takes the scale and zero of least squared
    error, a column counting as much as it does in `inputs`, the covariance of what the matrix reads
    (None: all alike), and the columns that follow make up for what rounding did (`fed_back`).
    """
    if not is_grouped(width.scheme):
        return rounded(name, matrix, width.scheme, width.group_size, dtype)
    if inputs is None:
        return in_slices(
            matrix,
            lambda rows: stored(name, *fitted(rows.float(), width, dtype), width.scheme),
            SLICE // COPIES,
        )
    found = fed_back(matrix.detach().float(), width, dtype, inputs.to(matrix.device))
    return stored(name, *found, width.scheme)


def fed_back(
    matrix: Float[Tensor, "rows columns"],
    width: Width,
    dtype: torch.dtype,
    inputs: Float[Tensor, "columns columns"],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`fitted`, group after group of columns, each as the rounding of those before it has left it:
    GPTQ (arXiv 2210.17323), with the scales of a group fitted when its turn comes.
    """
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    weights = inputs.diagonal()

    def choose(first: int, values: Tensor, _pivots: Tensor) -> Replace:
        own = weights[first : first + values.shape[1]]
        _, scale, zero = fitted(values.contiguous(), width, dtype, own)
        zero = torch.zeros_like(scale) if zero is None else zero
        scales.append(scale)
        zeros.append(zero)

        def replace(_column: int, now: Tensor) -> Tensor:
            q = nearest(now, scale[:, 0], zero[:, 0], width.bits)
            return meaning(q, scale[:, 0], zero[:, 0], width.bits)

        return replace

    factor = inverse_factor(inputs, FEEDBACK_DAMPING).float()
    found = grouped(replaced(matrix, factor, choose, width.group_size), width.group_size)
    scale, zero = torch.cat(scales, dim=1), torch.cat(zeros, dim=1)
    numbers = nearest(found, scale[..., None], zero[..., None], width.bits).to(torch.uint8)
    numbers = numbers.flatten(1)[:, : matrix.shape[1]]
    return numbers, scale, zero if has_zeros(width.scheme) else None


def values(
    name: str, found: Mapping[str, Tensor], width: Width, columns: int
) -> Float[Tensor, "rows columns"]:
    """The matrix that stored tensors stand for, in float32."""
    zero = found.get(name + ZEROS)
    whole, scale = found[name + INTEGERS], found[name]
    return dequantized(whole, scale, zero, width.scheme, columns, width.group_size).float()


def fitted(
    matrix: Float[Tensor, "rows columns"],
    width: Width,
    dtype: torch.dtype,
    columns: Float[Tensor, "columns"] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(whole numbers (rows, columns), scales (rows, groups), zeros (rows, groups) or None where the
    scheme has none).

    From ranges of several sizes about the middle of the group's own, each with its numbers rounded
    and scale and zero fitted to them by least squares, `REFITS` times; the best is taken, in the
    dtype in which it is stored. (Ranges as llama.cpp's k-quants try them.) Without zeros a range is
    about 0, the scale is fitted alone, and its sign says at which end there is one number more.
    """
    most, middle = 2**width.bits - 1, 2 ** (width.bits - 1)
    shifts = has_zeros(width.scheme)
    x = grouped(matrix, width.group_size)
    weights = torch.ones(matrix.shape[1]) if columns is None else columns.to(matrix).float()
    weights = grouped((weights / weights.mean().clamp_min(1e-30))[None], width.group_size, 0.0)
    # a group that nothing says anything of counts its columns alike
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)
    total = weights.sum(-1, keepdim=True)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    # what the line through q and x goes through: their means, or 0
    mean = (weights * x).sum(-1, keepdim=True) / total if shifts else torch.zeros_like(low)
    whole = (high - low) / most if shifts else furthest(x) / -middle
    best: list[Tensor] = []
    for share in RANGES:
        scale = not_zero(whole * share)
        start = (low + high) / 2 - scale * most / 2 if shifts else -scale * middle
        for _ in range(REFITS):
            q = ((x - start) / scale).round_().clamp_(0, most)
            middle_q = (weights * q).sum(-1, keepdim=True) / total if shifts else middle
            apart = q - middle_q
            spread = (weights * apart * apart).sum(-1, keepdim=True)
            slope = (weights * apart * (x - mean)).sum(-1, keepdim=True) / spread.clamp_min(1e-30)
            scale = not_zero(torch.where(slope.sign() == scale.sign(), slope, scale))
            start = mean - scale * middle_q
        scale, zero = not_zero(scale.to(dtype)), (start + scale * middle).to(dtype)
        q = nearest(x, scale, zero, width.bits)
        lost = meaning(q, scale, zero, width.bits) - x
        error = (weights * lost.square()).sum(-1, keepdim=True)
        found = [error, scale, zero, q]
        if best:
            better = error < best[0]
            found = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        best = found
    _, scale, zero, q = best
    numbers = q.to(torch.uint8).flatten(1)[:, : matrix.shape[1]]
    return numbers, scale[..., 0], zero[..., 0] if shifts else None


def prices(
    weight: Float[Tensor, "out in"], found: Sensitivity, offered: Sequence[Width]
) -> Float[Tensor, "widths"]:
    """What a matrix costs in each width, in nats a token, float64: from every so manyth row, by
    their share of the sensitivity. What the columns make up for is measured in one width.
    """
    rows = torch.arange(0, weight.shape[0], -(-weight.shape[0] // ROWS))
    some = dataclasses.replace(found, rows=found.rows[rows])
    share = float(found.rows.sum()) / max(float(some.rows.sum()), 1e-300)
    weight = weight.detach().cpu()[rows].float()
    losses = [share * some.loss(weight - _alone(weight, width, some)) for width in offered]
    gain = _gain(weight, some) if any(is_grouped(width.scheme) for width in offered) else 1.0
    gains = [gain if is_grouped(width.scheme) else 1.0 for width in offered]
    return torch.tensor(losses, dtype=torch.float64) * torch.tensor(gains, dtype=torch.float64)


def _alone(weight: Tensor, width: Width, found: Sensitivity) -> Tensor:
    """The matrix in a width, no column making up for another."""
    if is_grouped(width.scheme):
        tensors = stored("weight", *fitted(weight, width, KEPT, found.columns), width.scheme)
    else:
        tensors = to_width("weight", weight, width, KEPT)
    return values("weight", tensors, width, weight.shape[1])


def _gain(weight: Tensor, found: Sensitivity) -> float:
    """Of what rounding costs, the share that remains where columns make up for one another."""
    width = Width("int4", 64)
    alone = found.loss_along(weight - _alone(weight, width, found))
    tensors = to_width("weight", weight, width, KEPT, found.inputs)
    together = found.loss_along(weight - values("weight", tensors, width, weight.shape[1]))
    return min(together / alone, 1.0) if alone > 0 else 1.0
