"""Least weighted errors of a low-rank matrix by means that know no singular value decomposition in
a metric: what the tests of methods by scaled inputs compare with.
"""

import torch

from grasp.core.decoder import Decoder


def dense_weights(model):
    """path -> W (out, in) of every matrix, in float64."""
    return {
        linear.path: linear.weight.double()
        for layer in Decoder(model).layers()
        for linear in layer.linears.values()
    }


def weighted_error(change, scale):
    """sum_ij s_j^2 change_ij^2."""
    return float(((change**2) * scale**2).sum())


def truncated(matrix, rank):
    """The nearest matrix of that rank, unweighted."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def alternated(weight, scale, rank, rounds=60):
    """The least error that alternating least squares finds of `A B` from a random start: B given A
    is least squares column by column, whatever their weights; A given B weighs the columns.
    """
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(len(weight), rank, generator=generator, dtype=torch.float64)
    for _ in range(rounds):
        right = torch.linalg.lstsq(left, weight).solution
        left = torch.linalg.lstsq((right * scale).T, (weight * scale).T).solution.T
    return weighted_error(weight - left @ right, scale)


def nudged(weight, scale, product, rank):
    """The least error among matrices of that rank near `product`."""
    u, s, vh = torch.linalg.svd(product, full_matrices=False)
    left, right = u[:, :rank] * s[:rank], vh[:rank]
    generator, errors = torch.Generator().manual_seed(6), []
    for step in (1e-1, 1e-2, 1e-3):
        for _ in range(10):
            a, b = (
                torch.randn(side.shape, generator=generator, dtype=torch.float64)
                for side in (left, right)
            )
            near = (left + step * left.abs().mean() * a) @ (right + step * right.abs().mean() * b)
            errors.append(weighted_error(weight - near, scale))
    return min(errors)
