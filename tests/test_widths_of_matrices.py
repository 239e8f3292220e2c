"""Rounding that knows what the loss depends on: against brute force, and its price."""

import itertools

import pytest
import torch
from safetensors.torch import save

from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.rounding import matrices_of, rounded, stored
from grasp.methods.costs import INDEX
from grasp.stages.rounding import (
    KEPT,
    Width,
    fed_back,
    fitted,
    pair_bytes,
    prices,
    to_width,
    values,
    widths,
)
from grasp.stages.sensitivity import Sensitivity


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(size: int, seed: int = 1) -> torch.Tensor:
    """Of inputs that have much in common."""
    basis = random(size, size, seed=seed) * torch.logspace(0, -2, size)
    return basis @ basis.mT


def back(matrix, found, width):
    numbers, scale, zero = found
    tensors = stored("weight", numbers, scale, zero, width.scheme)
    return values("weight", tensors, width, matrix.shape[1])


def nearest(matrix, width):
    tensors = rounded("weight", matrix, width.scheme, width.group_size, KEPT)
    return values("weight", tensors, width, matrix.shape[1])


@pytest.mark.parametrize("scheme", ["int3", "int4", "int4-symmetric", "int5", "int6"])
def test_fitted_scales_lose_less_than_the_range_does(scheme):
    matrix, weights = random(16, 96), random(96, seed=2).square()
    width = Width(scheme, 32)

    def lost(new):
        return float((weights * (new - matrix).square()).sum())

    assert lost(back(matrix, fitted(matrix, width, KEPT, weights), width)) < lost(
        nearest(matrix, width)
    )


def test_fitted_is_near_the_best_that_there_is():
    """One group of six numbers in 3 bits: every scale and zero on a fine grid."""
    width = Width("int3", 32)
    for seed in range(5):
        group, weights = random(1, 6, seed=seed), random(6, seed=seed + 9).square() + 0.1
        found = back(group, fitted(group, width, torch.float32, weights), width)
        lost = float((weights * (found - group).square()).sum())
        spread = float(group.max() - group.min())
        best = min(
            float((weights * (new - group).square()).sum())
            for scale, start in itertools.product(
                torch.linspace(0.3, 1.1, 81) * spread / 7,
                float(group.min()) + torch.linspace(-0.1, 0.3, 41) * spread,
            )
            for new in [((group - start) / scale).round().clamp(0, 7) * scale + start]
        )
        assert lost < 1.35 * best + 1e-9


def test_fitted_about_zero_is_near_the_best_that_there_is():
    """One group of 32 numbers in 4 bits: every scale of either sign on a fine grid."""
    width = Width("int4-symmetric", 32)
    for seed in range(5):
        group, weights = random(1, 32, seed=seed), random(32, seed=seed + 9).square() + 0.1
        found = back(group, fitted(group, width, torch.float32, weights), width)
        lost = float((weights * (found - group).square()).sum())
        most = float(group.abs().max())
        best = min(
            float((weights * (new - group).square()).sum())
            for scale in torch.linspace(0.08, 0.2, 601) * most
            for step in (scale, -scale)
            for new in [(group / step).round().clamp(-8, 7) * step]
        )
        assert lost < 1.02 * best


def test_a_group_of_zeros_has_a_scale():
    for scheme in ("int4", "int4-symmetric"):
        width = Width(scheme, 32)
        found = back(torch.zeros(2, 40), fitted(torch.zeros(2, 40), width, KEPT), width)
        assert torch.equal(found, torch.zeros(2, 40))


@pytest.mark.parametrize("scheme", ["int3", "int4-symmetric"])
@pytest.mark.parametrize("columns", [64, 70])
def test_columns_make_up_for_one_another(columns, scheme):
    matrix, inputs, width = random(24, columns), covariance(columns), Width(scheme, 32)
    alone = back(matrix, fitted(matrix, width, KEPT, inputs.diagonal()), width) - matrix
    together = back(matrix, fed_back(matrix, width, KEPT, inputs), width) - matrix

    def outputs(change):
        return float(((change @ inputs) * change).sum())

    assert outputs(together) < 0.6 * outputs(alone)


def test_with_nothing_in_common_they_do_not():
    matrix, width = random(8, 64), Width("int4", 32)
    own = random(64, seed=5).square() + 0.1
    alone, together = fitted(matrix, width, KEPT, own), fed_back(matrix, width, KEPT, own.diag())
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


EVERY = (
    *widths((8, 6, 5, 4, 3)),
    *widths((4,), symmetric=True),
    *widths((8,), activations=True),
)


@pytest.mark.parametrize("width", EVERY, ids=repr)
@pytest.mark.parametrize("columns", [1, 33, 64, 70])
def test_bytes_are_those_of_the_file(width, columns):
    tensors = to_width("weight", random(24, columns), width, KEPT)
    size = width.num_bytes(24, columns)
    assert sum(one.numel() * one.element_size() for one in tensors.values()) == size
    assert len(tensors) == width.tensors
    named = {f"model.layers.10.mlp.down_proj.{name}": one for name, one in tensors.items()}
    assert len(save(named)) == pytest.approx(size + width.tensors * INDEX, abs=100)


def test_only_8_bits_round_activations():
    some = widths((16, 8, 4), (64,), activations=True)
    assert [str(width) for width in some] == ["8 bits, activations too", "4 bits/64"]
    assert [width.rounds_activations for width in some] == [True, False]
    assert [str(width.in_pairs) for width in some] == ["8 bits", "4 bits/64"]


def test_bytes_of_pairs():
    ranks, width = torch.tensor([0, 3, 8]), Width("int4", 32)
    plain = [width.num_bytes(24, rank) + width.num_bytes(rank, 40) for rank in ranks.tolist()]
    assert pair_bytes(width, (24, 40), ranks, pivoted=True).tolist() == plain
    eight = Width("int8", 32)
    pivoted = [
        eight.num_bytes(24 - rank, rank) + eight.num_bytes(rank, 40) + 4 * 24
        for rank in ranks.tolist()
    ]
    assert pair_bytes(eight, (24, 40), ranks, pivoted=True).tolist() == pivoted


def sensitivity(rows: int, columns: int) -> Sensitivity:
    inputs = covariance(columns)
    share = random(rows, seed=7).square().double()
    whole = float(inputs.trace())
    return Sensitivity(share / share.sum() * whole, inputs, whole, 1)


def test_prices_are_the_quadratic_form_of_what_is_left():
    matrix, found = random(40, 64), sensitivity(40, 64)
    some = (Width("int8", 32), Width("int4", 64), Width("int3", 64))
    told = prices(matrix, found, some)
    eight = matrix - nearest(matrix, some[0])
    fisher = torch.outer(found.rows, found.columns) / found.whole
    assert float(told[0]) == pytest.approx(0.5 * float((fisher * eight.square()).sum()), rel=1e-6)
    four = matrix - values(
        "weight", to_width("weight", matrix, some[1], KEPT, found.inputs), some[1], 64
    )
    outputs = 0.5 * float((found.rows * ((four @ found.inputs) * four).sum(1)).sum() / found.whole)
    # as if all that is left were spread out, times what making up for one another gains
    assert float(told[1]) == pytest.approx(outputs, rel=0.35)
    assert told[0] < told[1] < told[2]


def test_every_so_manyth_row_is_enough():
    matrix, found = random(1000, 64), sensitivity(1000, 64)
    width = Width("int4", 32)
    tensors = to_width("weight", matrix, width, KEPT, found.inputs)
    all_of_them = found.loss_along(matrix - values("weight", tensors, width, 64))
    assert float(prices(matrix, found, [width])) == pytest.approx(all_of_them, rel=0.35)


def test_a_pair_of_rank_0_has_nothing_to_round():
    pair = LowRankLinear(8, 6, 0, bias=False)
    assert matrices_of(pair) == {}
