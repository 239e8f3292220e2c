"""Linear algebra of singular groups: pure functions on tensors.

A weight is `W (out, in) = sum_k sigma_k u_k v_k'` with `U (out, k)`, `S (k,)` falling and `Vh (k,
in)`. A pair of factors is `A (rank, in)` and `B (out, rank)` with `W ~ B A`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grasp.errors import NumericsError

SigmaSplit = Literal["both", "left", "right"]


def count_non_finite(values: Tensor, at_once: int = 1 << 22) -> int:
    """How many of a tensor's numbers are NaN or infinite, looked at in parts: what is asked of all
    makes several copies.
    """
    parts = values.flatten().split(at_once)
    return sum(int((~torch.isfinite(part)).sum()) for part in parts)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider: the precision in which losses and decompositions are
    computed.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def svd(
    weight: Float[Tensor, "out in"],
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k"], Float[Tensor, "k in"]]:
    """Thin singular value decomposition in float32 or wider. Raises `NumericsError` where it does
    not converge.
    """
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
    """(A, B) holding the kept groups: sigma as a square root on both sides ("both"), all in B
    ("left") or all in A ("right").
    """
    u, s, vh = u[:, kept], s[kept], vh[kept]
    if sigma_split == "both":
        root = s.clamp_min(0).sqrt()
        return root[:, None] * vh, u * root
    if sigma_split == "left":
        return vh.clone(), u * s
    return s[:, None] * vh, u.clone()


def rank_for_ratio(out_features: int, in_features: int, retain_ratio: float) -> int:
    """Groups that hold the share `retain_ratio` of a matrix's parameters: `int(m n r / (m + n))`
    (reproduces Table 6).
    """
    return math.floor(
        out_features * in_features * retain_ratio / (out_features + in_features) + 1e-9
    )


def break_even_rank(out_features: int, in_features: int) -> float:
    """At this rank, `m n / (m + n)`, and above, the two factors hold at least as many numbers as
    the matrix.
    """
    return out_features * in_features / (out_features + in_features)


def symmetric_roots(
    gram: Float[Tensor, "n n"],
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """(S, S^-1) with S symmetric and S S = `gram`, in float64 by eigendecomposition.

    Works for every gram, singular or slightly indefinite by rounding too: eigenvalues below 1e-14
    of the largest are lifted to that; a gram of zeros counts as the identity. A Cholesky factor
    would fail there.
    """
    try:
        values, vectors = torch.linalg.eigh(gram.double())
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise NumericsError(f"the eigenvalue decomposition failed: {failure}") from failure
    top = values[-1]
    values = values.clamp_min(top * 1e-14) if float(top) > 0 else torch.ones_like(values)
    root = values.sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def roots(gram: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """(R, R^-1) with R R' = `gram`, in float64: its Cholesky factor, or, where that fails or its
    smallest pivot is lost in rounding, `symmetric_roots`, which take many times as long.
    """
    lower, failed = torch.linalg.cholesky_ex(gram.double())
    pivots = lower.diagonal()
    if int(failed) or float(pivots.min()) < 1e-6 * float(pivots.max()):
        return symmetric_roots(gram)
    eye = torch.eye(len(gram), dtype=lower.dtype, device=lower.device)
    return lower, torch.linalg.solve_triangular(lower, eye, upper=False)


def metric_groups(
    near: Float[Tensor, "short short"],
    far: Float[Tensor, "short short"],
) -> tuple[Float[Tensor, "short k"], Float[Tensor, "k"], Float[Tensor, "k short"]]:
    """Singular groups of a matrix W (tall, short) in a metric, from statistics of its shorter side
    only: (expand, squares, contract).

    Let `near` = X = R R', `far` = W' D W. With K = R' W' D W R = V diag(squares) V', the singular
    value decomposition D^½ W R = U diag(sqrt(squares)) V' gives W = sum_k (W R v_k)(v_k' R^-1): the
    longer side is never decomposed. Roots R differ by a rotation, which V undoes: the groups are
    those of D^½ W X^½, whatever R is. Returns expand = R V, `squares` falling (>= 0) and contract =
    V' R^-1, so that W = (W expand) contract, group by group.
    """
    root, inverse = roots(near)
    inner = root.mT @ far.double() @ root
    try:
        squares, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise NumericsError(f"the eigenvalue decomposition failed: {failure}") from failure
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    if not bool(near.any()):  # nothing depends on this matrix; its roots only stand in
        squares = torch.zeros_like(squares)
    return root @ vectors, squares, vectors.mT @ inverse


def balanced(
    left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """(A, B) with B A = left right, every group's norm shared evenly by its two vectors, so that
    neither overflows in a narrow dtype.
    """
    tiny = torch.finfo(left.dtype).tiny
    scale = (left.norm(dim=0).clamp_min(tiny) / right.norm(dim=1).clamp_min(tiny)).sqrt()
    return right * scale[:, None], left / scale


def pivoted(
    left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"]
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "rest rank"], Int[Tensor, "out"]]:
    """The product left right in `rank^2` fewer numbers: (its pivot rows, the other rows as
    combinations of those, where each row went).

    (Pivoting Factorization, arXiv 2501.19090.) With P the pivot rows, `left = (left left_P^-1)
    left_P`, and `left_P right` are rows of the product. Rows are pivoted by LU, in float64, then
    exchanged until no coefficient exceeds 2 (a maximal volume: Goreinov et al. 2010), so rounding
    in a narrow dtype is not amplified.
    """
    wide_left = left.double()
    out, rank = left.shape
    lower, swaps, _ = torch.linalg.lu_factor_ex(wide_left)
    order = torch.arange(out, device=left.device)  # row `order[i]` of left is row i of lower upper
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1].clone(), order[i].clone()
    coefficients = torch.linalg.solve_triangular(
        lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True
    )
    for _ in range(4 * rank):
        if coefficients.numel() == 0 or float(coefficients.abs().max()) <= 2:
            break
        i, j = divmod(int(coefficients.abs().argmax()), rank)
        pivot = coefficients[i, j].clone()
        row, column = coefficients[i].clone(), coefficients[:, j].clone()
        row[j] -= 1
        column[i] += 1
        coefficients -= torch.outer(column, row) / pivot
        order[j], order[rank + i] = order[rank + i].clone(), order[j].clone()
    places = torch.empty_like(order)
    places[order] = torch.arange(out, device=order.device)
    head = wide_left[order[:rank]] @ right.double()
    return head.to(left.dtype), coefficients.to(left.dtype), places.int()
