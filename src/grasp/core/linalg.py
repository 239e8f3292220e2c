"""Linear algebra of singular groups: pure functions on tensors.

A weight is `W (out, in) = sum_k sigma_k u_k v_k'` with `U (out, k)`, `S (k,)` falling and `Vh (k, in)`. A pair of factors is
`A (rank, in)` and `B (out, rank)` with `W ~ B A`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grasp.errors import NumericsError

SigmaSplit = Literal["both", "left", "right"]


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider: the precision in which losses and decompositions are computed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def svd(
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k"], Float[Tensor, "k in"]]:
    """Thin singular value decomposition in float32 or wider. Raises `NumericsError` where it does not converge."""
    try:
        u, s, vh = torch.linalg.svd(wide(weight.detach()), full_matrices=False)
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise NumericsError(f"the singular value decomposition failed: {failure}") from failure
    return u, s, vh


def factors(
    u: Float[Tensor, "out k"],
    s: Float[Tensor, "k"],
    vh: Float[Tensor, "k in"],
    kept: Int[Tensor, "rank"],
    sigma_split: SigmaSplit = "both",
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """(A, B) holding the kept groups: sigma as a square root on both sides ("both"), all in B ("left") or all in A ("right")."""
    u, s, vh = u[:, kept], s[kept], vh[kept]
    if sigma_split == "both":
        root = s.clamp_min(0).sqrt()
        return root[:, None] * vh, u * root
    if sigma_split == "left":
        return vh.clone(), u * s
    return s[:, None] * vh, u.clone()


def rank_for_ratio(out_features: int, in_features: int, retain_ratio: float) -> int:
    """Groups that hold the share `retain_ratio` of a matrix's parameters: `int(m n r / (m + n))` (reproduces Table 6)."""
    return math.floor(out_features * in_features * retain_ratio / (out_features + in_features) + 1e-9)


def break_even_rank(out_features: int, in_features: int) -> float:
    """At this rank, `m n / (m + n)`, and above, the two factors hold at least as many numbers as the matrix."""
    return out_features * in_features / (out_features + in_features)
