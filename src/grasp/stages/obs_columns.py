"""The columns of a matrix get other numbers, one column after another, and those that still come
make up for it: Optimal Brain Surgeon with one order for all rows (Frantar and Alistarh, SparseGPT,
arXiv 2301.00774, section 3; the same for rounding: GPTQ, arXiv 2210.17323).

W (out, n) reads x, with H = sum xx' (any multiple of it). The outputs change by `tr(E H E')` for a
change E of W. When column j becomes w', the best that the columns behind it can do, those before it
being settled, is (all rows alike)

    w_k += -(w_j - w') [H^-1]_jk / [H^-1]_jj    for k > j, of H without the rows and columns < j

All these inverses are in one factor: with `H^-1 = U'U`, U upper triangular, it is `w_k -= e U_jk`,
where `e = (w_j - w') / U_jj`; and `e^2` is by how much the outputs change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.errors import NumericsError

Replace = Callable[[int, Tensor], Tensor]
"""`replace(i, values)`: the new numbers (out,) of column i of a group, from what they are now."""
Choose = Callable[[int, Tensor, Tensor], Replace]
"""`choose(first, values, pivots)`: how the columns of the group that begins at `first` are
replaced; values (out, width) as they are after all columns before, pivots (width,) their U_jj.
"""


def inverse_factor(gram: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """U, upper triangular, in float64, with `(H + damping mean(H_jj) I)^-1 = U'U`.

    A column that is never read (H_jj = 0) gets H_jj = 1, so that it leaves the others alone; it
    does not count in the mean. U is the inverse of the Cholesky factor taken from the last column
    to the first, `H = U^-1 U^-T`: the same as a Cholesky factor of H^-1, without H^-1.

    Raises `NumericsError` where H is singular, which any damping but the least prevents.
    """
    turned = gram.flip(0, 1).double()
    diagonal = turned.diagonal()
    read = diagonal != 0
    mean = diagonal.sum() / read.sum().clamp_min(1)
    diagonal.add_(torch.where(read, damping * mean, 1.0))
    lower, failed = torch.linalg.cholesky_ex(turned)
    if int(failed):
        raise NumericsError("the sum over its inputs is singular")
    del turned  # no more than three matrices of this size at a time
    return _inverse(lower).flip(0, 1)


def _inverse(lower: Tensor) -> Tensor:
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False)


def replaced(
    weight: Float[Tensor, "out n"],
    factor: Float[Tensor, "n n"],
    choose: Choose,
    width: int = 1,
    block: int = 128,
) -> Float[Tensor, "out n"]:
    """W with its columns replaced, first to last, in the dtype of W. `factor`: U, in that dtype.

    `choose` is asked anew for every group of `width` columns. Inside a block an error reaches the
    columns behind it at once, those beyond when the block is done, in one product: the same numbers
    with less traffic. Groups lie in one block, so `block` is a multiple of `width`.
    """
    if block % width:
        raise ValueError(f"block {block}: not a multiple of width {width}")
    columns = weight.mT.contiguous().clone()  # n, out: a column is contiguous
    pivots, count = factor.diagonal(), len(columns)
    for begin in range(0, count, block):
        end = min(begin + block, count)
        errors = torch.empty_like(columns[begin:end])
        for j in range(begin, end):
            if j % width == 0:
                group = slice(j, min(j + width, end))
                replace = choose(j, columns[group].mT, pivots[group])
            new = replace(j % width, columns[j])
            errors[j - begin] = (columns[j] - new) / pivots[j]
            columns[j] = new
            columns[j + 1 : end].addr_(factor[j, j + 1 : end], errors[j - begin], alpha=-1)
        columns[end:].addmm_(factor[begin:end, end:].mT, errors, alpha=-1)
    return columns.mT.contiguous()
