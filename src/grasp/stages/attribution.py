"""Stage 2a, attribution: how much the language-model loss depends on each singular group (paper,
section 3.2).

The paper scores group k = {u_k, sigma_k, v_k'} by `I_k = sigma dL/dsigma + sum_i u_i dL/du_i +
sum_j v_j dL/dv_j`. W is linear in each of u, sigma and v, so each of the three sums equals `sigma_k
u_k' G v_k` with `G = dL/dW`: the score is a function of (U, S, V, G), and one backward pass through
the ordinary model serves all matrices. The units are nats of loss; higher = keep, in all scores.

    taylor                     |sigma_k u_k' G v_k|, G summed over the set: what the published code
                               ranks by (default)
    taylor-signed              3 sigma_k u_k' G v_k: the formula as printed
    gradient                   |u_k' G v_k|
    taylor-per-sample          sum over blocks of |sigma_k u_k' G_s v_k|
    taylor-per-sample-squared  sum over blocks of (sigma_k u_k' G_s v_k)^2
    magnitude                  sigma_k: plain truncated SVD, a control
    random                     uniform random numbers, a control
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.core.records import Attribution

ScoreName = Literal[
    "taylor",
    "taylor-signed",
    "gradient",
    "taylor-per-sample",
    "taylor-per-sample-squared",
    "magnitude",
    "random",
]
SCORES: tuple[str, ...] = get_args(ScoreName)
NEEDS_WEIGHT_GRAD = frozenset({"taylor", "taylor-signed", "gradient"})
NEEDS_GROUP_GRAD = frozenset({"taylor-per-sample", "taylor-per-sample-squared"})


def group_gradient(
    u: Float[Tensor, "out k"], vh: Float[Tensor, "k in"], grad: Float[Tensor, "out in"]
) -> Float[Tensor, "k"]:
    """`u_k' G v_k` = dL/dsigma_k for every group."""
    return ((u.T @ grad.to(u.dtype)) * vh).sum(1)


def attribute(
    path: str,
    score: str,
    u: Float[Tensor, "out k"],
    s: Float[Tensor, "k"],
    vh: Float[Tensor, "k in"],
    *,
    grad: Float[Tensor, "out in"] | None = None,
    moments: Float[Tensor, "3 k"] | None = None,
    generator: torch.Generator | None = None,
) -> Attribution:
    """Score every singular group of one matrix; higher = keep.

    `grad` is G (scores taylor, taylor-signed, gradient), `moments` the table of `GroupGrad`
    (per-sample scores), `generator` the source of the random control. Raises `NumericsError` on
    non-finite scores.
    """
    if score in NEEDS_WEIGHT_GRAD:
        if grad is None:
            raise ValueError(f"score '{score}' needs the weight gradient")
        base = group_gradient(u, vh, grad)
        values = {
            "taylor": (s * base).abs(),
            "taylor-signed": 3 * s * base,
            "gradient": base.abs(),
        }[score]
    elif score in NEEDS_GROUP_GRAD:
        if moments is None:
            raise ValueError(f"score '{score}' needs the per-sample group gradients")
        values = moments[1 if score == "taylor-per-sample" else 2]
    elif score == "magnitude":
        values = s
    else:
        values = torch.rand(s.shape, generator=generator).to(s)
    return Attribution(path, score, values.cpu(), s.cpu())
