"""Optimal Brain Surgeon in units: which inputs of a matrix can go, the others standing in for
them, and what that costs (Hassibi and Stork, NIPS 1992; in the Kronecker metric as in LLM Surgeon,
van der Ouderaa et al., arXiv 2312.17244, which takes rows and columns away).

W (out, in) reads h, with H = E[hh'] and D = E[dd'] at its output. Without the inputs c, and with
the rest R adjusted to stand in, `W'_R = W_R - W_c (H^-1_cc)^-1 H^-1_cR`, the loss rises by

    1/2 tr(D W_c (H^-1_cc)^-1 W_c')         nats a token; for one input 1/2 (w'Dw) / (H^-1)_jj

A unit is one input (a channel) or several that go together (a value dimension in every query head
that reads it; a KV group). `removal` finds a good order, cheapest first, with H^-1 and W brought up
to date as it goes. `prices` says exactly what every part of an order costs, for the tokens that
chose it or for others. `refit` gives the matrix that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grasp.core.records import Curvature
from grasp.errors import NumericsError
from grasp.stages.basis import GRADIENT_DAMPING, suffix_sums

INPUT_DAMPING = 0.1
"""Added to the diagonal of H where it chooses and refits, as a share of its mean. So much that a
channel which the calibration text hardly uses, but other text may, is not free (docs/log.md).
"""
STEPS = 48
"""In so many steps all units go; H^-1 is brought up to date after each."""


@dataclass(frozen=True)
class Metric:
    """What a matrix W (out, in) and its tokens say: `inputs` H (in, in) and `gram` W'DW (in, in),
    means over tokens.
    """

    inputs: Float[Tensor, "n n"]
    gram: Float[Tensor, "n n"]

    @classmethod
    def of(cls, weight: Float[Tensor, "out n"], curvature: Curvature) -> Metric:
        """As the tokens have it, from sums over them, in float32."""
        weight = weight.float()
        tall = weight.shape[0] >= weight.shape[1]
        tokens, seen = max(curvature.gradient_tokens, 1), max(curvature.input_tokens, 1)
        inputs = curvature.near if tall else curvature.inputs
        assert inputs is not None, "a wide matrix needs its inputs collected"
        gram = curvature.far if tall else weight.mT @ curvature.near.to(weight) @ weight
        return cls(inputs.to(weight) / seen, gram.to(weight) / tokens)

    def damped(self, weight: Float[Tensor, "out n"], curvature: Curvature) -> Metric:
        """With shares of the means of H and D added to their diagonals: to choose by."""
        weight = weight.float()
        mean = curvature.gradient_square / max(curvature.gradient_tokens, 1) / weight.shape[0]
        gram = self.gram + GRADIENT_DAMPING * mean * (weight.mT @ weight)
        return Metric(lifted(self.inputs, INPUT_DAMPING), gram)

    def turned(self, turn: Float[Tensor, "n n"], back: Float[Tensor, "n n"]) -> Metric:
        """In other coordinates, in float64: the inputs become `turn` h, the matrix W `back`."""
        return Metric(turn @ self.inputs.double() @ turn.mT, back.mT @ self.gram.double() @ back)


def lifted(gram: Tensor, share: float) -> Tensor:
    """With a share of the mean of its diagonal added; the identity in the place of zeros."""
    mean = float(gram.diagonal().mean())
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return gram + share * mean * eye if mean > 0 else eye


def removal(
    metric: Metric, units: Int[Tensor, "count size"], together: int | None = None
) -> Int[Tensor, "count"]:
    """The units in the order in which they can go, the cheapest first; `together` at a time, a
    `STEPS`-th of all if not given.

    Cost: STEPS updates of an (in, in) matrix, each no more than 2 in^2 (in / STEPS) operations.
    """
    together = together or max(len(units) // STEPS, 1)
    # an order does not need more digits: on smollm2 it is the same as in float64
    inverse, gram = _inverse(metric.inputs).float(), metric.gram.float()
    left, order = torch.arange(len(units)), []
    places = units.clone()  # where the columns of each unit that is left are now
    while len(left):
        costs = _costs(inverse, gram, places)
        chosen = costs.argsort(stable=True)[:together]
        order.append(left[chosen])
        if len(chosen) == len(left):
            break
        away = places[chosen].flatten()
        stays = torch.ones(len(inverse), dtype=torch.bool).index_fill(0, away, False)
        inverse, gram = _without(inverse, gram, away, stays.nonzero()[:, 0])
        others = torch.ones(len(left), dtype=torch.bool).index_fill(0, chosen, False)
        moved = stays.cumsum(0) - 1
        left, places = left[others], moved[places[others]]
    return torch.cat(order)


def _costs(inverse: Tensor, gram: Tensor, units: Tensor) -> Tensor:
    """Twice what each unit costs by itself: tr(W_u'DW_u (H^-1_uu)^-1), (count,)."""
    if units.shape[1] == 1:
        columns = units[:, 0]
        return gram.diagonal()[columns] / inverse.diagonal()[columns]
    blocks = units[:, :, None], units[:, None, :]  # count, size, size
    solved = torch.linalg.solve(inverse[blocks], gram[blocks])
    return solved.diagonal(dim1=-2, dim2=-1).sum(-1)


def _without(inverse: Tensor, gram: Tensor, away: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """H^-1 and W'DW of the inputs that are left, these standing in for those `away`."""
    cross = inverse[away][:, rest]  # gone, left
    stand_in = torch.linalg.solve(inverse[away][:, away], cross)  # (H^-1_cc)^-1 H^-1_cR
    inverse = inverse[rest][:, rest] - cross.mT @ stand_in
    half = gram[rest][:, away] - 0.5 * (stand_in.mT @ gram[away][:, away])
    change = half @ stand_in
    return inverse, gram[rest][:, rest] - change - change.mT


def prices(
    chooser: Metric, order: Int[Tensor, "n"], judges: Sequence[Metric]
) -> list[Float[Tensor, "n_and_1"]]:
    """What it costs to keep only the first k inputs of `order`, for k = 0 to n, refitted by the
    chooser: for each judge (the chooser may be one); nats a token, float64.

    With H = L L' in that order, the error of W is `sum_{j >= k} (W L)_j (L^-1)_j`: columns of W L
    and rows of L^-1, whatever k is. So one factor serves every k, as suffix sums of (L'W'D W L) o
    (L^-1 H L^-T) with the D and H of the judge, and in its dtype.
    """
    factor, found = _cholesky(chooser.inputs[order][:, order]), []
    for judge in judges:
        lower, inputs = factor.to(judge.gram), judge.inputs[order][:, order]
        losses = lower.mT @ judge.gram[order][:, order] @ lower
        half = torch.linalg.solve_triangular(lower, inputs, upper=False)
        inputs = torch.linalg.solve_triangular(lower, half.mT, upper=False)
        found.append(suffix_sums((losses * inputs).double()) / 2)
    return found


def refit(
    weight: Float[Tensor, "out n"], inputs: Float[Tensor, "n n"], kept: Int[Tensor, "k"]
) -> Float[Tensor, "out k"]:
    """W' = W H[:, R] H[R, R]^-1: what reads the inputs `kept` and comes nearest to W, in any D."""
    inputs = inputs.double()
    return torch.linalg.solve(
        inputs[kept][:, kept], (weight.to(inputs) @ inputs[:, kept]).mT
    ).mT.contiguous()


def _cholesky(gram: Tensor) -> Tensor:
    """In float64."""
    lower, failed = torch.linalg.cholesky_ex(gram.double())
    if int(failed):
        raise NumericsError("the inputs' covariance is not positive definite; try --dtype float32")
    return lower


def _inverse(gram: Tensor) -> Tensor:
    return torch.cholesky_inverse(_cholesky(gram))
