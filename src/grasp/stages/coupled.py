"""Coupled groups: what of a layer stands or falls together, and how important it is (LLM-Pruner,
arXiv 2305.11627, sections 3.1 and 3.2).

Take a channel of an MLP away, and a row of gate and of up goes with a column of down. Take a
key-value head away, and its rows of k and v go with those of the query heads that read it and with
their columns of o. A group's importance is the sum of its vectors', its rows and columns; a
vector's is that of its weights together or one by one. Weights count, biases do not.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.core.decoder import Decoder
from grasp.core.edits.cuts import CHANNELS, KV_GROUPS, length_of, sizes_of

GIVERS = {CHANNELS: ("gate", "up"), KV_GROUPS: ("q", "k", "v")}
"""Axis -> roles whose rows are its units'."""
READER = {CHANNELS: "down", KV_GROUPS: "o"}
"""Axis -> role whose columns are."""


def first_order(
    weight: Float[Tensor, "out in"], grad: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """|w g|: by how much the loss changes, to first order, where a weight becomes 0."""
    return (weight * grad).abs()


def second_order(
    weight: Float[Tensor, "out in"],
    grad: Float[Tensor, "out in"],
    squares: Float[Tensor, "out in"],
) -> Float[Tensor, "out in"]:
    """|w g - w^2 h / 2|: the same to second order, the Hessian's diagonal h taken for the mean over
    samples of their squared gradients (the Fisher information).
    """
    return (weight * grad - weight.square() * squares / 2).abs()


def vectors(scores: Float[Tensor, "out in"]) -> Float[Tensor, "both"]:
    """The scores of weights summed over every row, then over every column: (out + in,)."""
    return torch.cat([scores.sum(1), scores.sum(0)])


def importance(
    decoder: Decoder, layer: int, axis: str, scores: dict[str, Tensor]
) -> Float[Tensor, "units"]:
    """The importance of every unit of an axis. `scores`: of the rows and then the columns (out +
    in,) of its matrices, by path inside the layer.
    """
    family, sizes = decoder.family, sizes_of(decoder, layer)
    count = length_of(decoder, layer, axis)
    path, columns = family.path(READER[axis]), family.columns(READER[axis], sizes)
    behind = scores[path][-len(columns) :]  # behind its rows
    found = behind[columns.to(behind.device)].view(count, -1).sum(1)
    for role in GIVERS[axis]:
        for path in family.holding(role):
            rows = family.rows(role, sizes).to(scores[path].device)
            found = found + scores[path][rows].view(count, -1).sum(1)
    return found


def paths(decoder: Decoder, axis: str) -> tuple[str, ...]:
    """The matrices that share an axis, as paths inside the layer."""
    roles = (*GIVERS[axis], READER[axis])
    return tuple(dict.fromkeys(path for role in roles for path in decoder.family.holding(role)))
