"""The output factor of a low-rank pair, by least squares: the one that gives a matrix's outputs
best on inputs that were seen, the input factor being what it is.

With W (out, in), the pair B A in its place and X = sum xx' over the inputs x,

    B* = argmin sum |Wx - BAx|^2 = B + (W - BA) X A' (A X A' + E)^-1

The first form is what is wanted, the second is how it is solved: for the change of B, in float64.
E is `DAMPING` of the diagonal of A X A', so it does not depend on how the pair shares its norm.
Directions that the inputs hardly use stay as they are, and since the change 0 is among those that
are weighed, the error never rises.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.core.linalg import roots

DAMPING = 1e-5
"""Above what rounding leaves of sums in float32, below what changes a solution that there is."""


def refitted(
    weight: Float[Tensor, "out in"],
    left: Float[Tensor, "out rank"],
    right: Float[Tensor, "rank in"],
    inputs: Float[Tensor, "in in"],
) -> Float[Tensor, "out rank"]:
    """The best left factor for the product with `right`, where `inputs` is the sum of xx'; in the
    dtype and on the device of `left`, which is where the search begins.
    """
    if not left.shape[1]:
        return left
    device = torch.device("cpu") if left.device.type == "mps" else left.device  # has no float64
    dense, start, inner, gram = (one.to(device).double() for one in (weight, left, right, inputs))
    read = gram @ inner.mT  # in, rank: sum x z' with z = Ax
    square = inner @ read
    square = (square + square.mT) / 2
    size = square.diagonal().clamp_min(0).sqrt()
    scale = torch.where(size > 0, 1 / size, 0.0)
    unit = scale[:, None] * square * scale
    _, inverse = roots(unit + DAMPING * torch.eye(len(unit), dtype=unit.dtype, device=device))
    missing = (dense @ read - start @ square) * scale  # out, rank: sum (Wx - Bz) z'
    change = (missing @ inverse.mT @ inverse) * scale
    return (start + change).to(left)
