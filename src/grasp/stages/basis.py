"""Stage 2b', the basis: a matrix and what the loss says about it in, singular groups in that metric
out.

    plain    W itself: what dropping a group does to the weights
    scaled   W diag(s): the same, with one weight a column (`scaled_groups`)
    input    W X^½: what it does to the outputs (SVD-LLM, arXiv 2403.07378)
    fisher   D^½ W X^½: what it does to the loss, in nats a token: half the squared singular value

X and D come damped: the sample's eigenvalues of rare directions are too small, never too large.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grasp.core.linalg import metric_groups
from grasp.core.records import Curvature
from grasp.core.scratch import Scratch

BasisName = Literal["plain", "input", "fisher"]
BASES: tuple[str, ...] = get_args(BasisName)
INPUT_DAMPING, GRADIENT_DAMPING = 1e-4, 1e-2
"""Added to the diagonals of X and D, as shares of their mean eigenvalues. Figures hardly move
between a tenth and a hundred times this.
"""


@dataclass(frozen=True)
class Groups:
    """The singular groups of one matrix W (out, in) in a metric, best first: W = sum_k left_k
    right_k'.

    `squares` (k): the squared singular values; `expand` (short, k) and `contract` (k, short) as in
    `grasp.core.linalg.metric_groups`. W itself is not kept.
    """

    squares: Float[Tensor, "k"]
    expand: Float[Tensor, "short k"]
    contract: Float[Tensor, "k short"]

    def pair(
        self, weight: Float[Tensor, "out in"], kept: Int[Tensor, "rank"]
    ) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """(left, right) of the groups `kept` of W: their product is what remains of it."""
        weight = weight.float()
        expand, contract = self.expand[:, kept].to(weight), self.contract[kept].to(weight)
        if weight.shape[0] >= weight.shape[1]:
            return weight @ expand, contract
        return contract.mT, expand.mT @ weight


def groups(
    weight: Float[Tensor, "out in"], curvature: Curvature | None, basis: str, scratch: Scratch
) -> Groups:
    """The singular groups of a matrix in `basis`, their vectors kept in `scratch`. The plain one
    needs no curvature.
    """
    weight = _double(weight)
    is_tall = weight.shape[0] >= weight.shape[1]
    if not is_tall:
        weight = weight.mT
    tall, short = weight.shape
    gram = weight.mT @ weight
    near = torch.eye(short, dtype=torch.float64, device=weight.device)
    far = gram
    if basis != "plain":
        assert curvature is not None
        inputs = (max(curvature.input_tokens, 1), INPUT_DAMPING, curvature.input_square)
        gradients = (max(curvature.gradient_tokens, 1), GRADIENT_DAMPING, curvature.gradient_square)
        of_near, of_far = (inputs, gradients) if is_tall else (gradients, inputs)
        if basis == "fisher" or of_near is inputs:
            tokens, damping, _ = of_near
            near = _damped(curvature.near, tokens, damping, near)
        if basis == "fisher" or of_far is inputs:
            tokens, damping, square = of_far
            far = far_of(curvature, weight if is_tall else weight.mT).to(weight) / tokens
            far = far + damping * square / tokens / tall * gram
    expand, squares, contract = metric_groups(near, far)
    return Groups(squares.float().cpu(), scratch.hold(expand), scratch.hold(contract))


def scaled_groups(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, "in"], scratch: Scratch
) -> Groups:
    """The singular groups of W diag(scale), the scale (positive) undone; their vectors are kept in
    `scratch`. Exact: from all eigenvectors of the float64 Gram matrix of the shorter side.
    """
    weight = _double(weight)
    scale = scale.to(weight)
    scaled = weight * scale
    is_tall = weight.shape[0] >= weight.shape[1]
    gram = scaled.mT @ scaled if is_tall else scaled @ scaled.mT
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    expand, squares, contract = metric_groups(eye, gram)
    if is_tall:  # a wide W is projected onto its outputs, where there is no scale to undo
        expand, contract = scale[:, None] * expand, contract / scale
    return Groups(squares.float().cpu(), scratch.hold(expand), scratch.hold(contract))


def far_of(curvature: Curvature, weight: Float[Tensor, "out in"]) -> Float[Tensor, "short short"]:
    """`curvature.far`, also where X itself was collected in its stead: W X W' of a wide matrix."""
    if curvature.inputs is None:
        return curvature.far
    return weight @ curvature.inputs.to(weight) @ weight.mT


def on_the_shorter_side(curvature: Curvature, weight: Float[Tensor, "out in"]) -> Curvature:
    """The same with `far` in the place of `inputs`, for those who ask for it more than once."""
    return dataclasses.replace(curvature, far=far_of(curvature, weight.double()), inputs=None)


def judged(
    found: Groups, weight: Float[Tensor, "out in"], judge: Curvature
) -> Float[Tensor, "k_and_1"]:
    """What the groups cost where other tokens judge: `tail[r] = 1/2 tr(D M X M')` with the X and D
    of `judge`, undamped, and M = sum of the groups from r on; nats a token, float64.

    With M = L R this is the sum of (L'DL) o (R X R') from row and column r on, of which the longer
    side of W is in L'DL = expand' (W'DW) expand alone.
    """
    inputs, gradients = max(judge.input_tokens, 1), max(judge.gradient_tokens, 1)
    expand, contract = found.expand.double(), found.contract.double()
    weight = weight.to(expand)
    near, far = judge.near.to(expand), far_of(judge, weight).to(expand)
    products = (expand.mT @ far @ expand) * (contract @ near @ contract.mT)
    return suffix_sums(products) / (2 * inputs * gradients)


def suffix_sums(products: Float[Tensor, "k k"]) -> Float[Tensor, "k_and_1"]:
    """The sum of a symmetric matrix from row and column r on, for r = 0 to k."""
    rows = 2 * products.triu(1).sum(1) + products.diagonal()
    return torch.cat([rows.flip(0).cumsum(0).flip(0), rows.new_zeros(1)])


def _double(weight: Tensor) -> Tensor:
    """In float64, which Apple's devices lack."""
    return (weight.cpu() if weight.device.type == "mps" else weight).double()


def _damped(total: Tensor, tokens: int, damping: float, identity: Tensor) -> Tensor:
    gram = total.to(identity) / tokens
    return gram + damping * gram.diagonal().mean() * identity
