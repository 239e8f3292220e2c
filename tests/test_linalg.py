"""Properties of singular groups, checked on random matrices."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp.core.linalg import break_even_rank, factors, rank_for_ratio, svd

sizes = st.integers(2, 24)
splits = st.sampled_from(["both", "left", "right"])


def matrix(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, seed=st.integers(0, 99), split=splits)
def test_full_rank_is_exact(m: int, n: int, seed: int, split: str) -> None:
    weight = matrix(m, n, seed)
    u, s, vh = svd(weight)
    a, b = factors(u, s, vh, torch.arange(min(m, n)), split)
    assert torch.allclose(b @ a, weight, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, seed=st.integers(0, 99), split=splits, data=st.data())
def test_eckart_young(m: int, n: int, seed: int, split: str, data: st.DataObject) -> None:
    """The leading groups give the best approximation: the squared error is the sum of the squared
    singular values left out.
    """
    weight = matrix(m, n, seed)
    rank = data.draw(st.integers(0, min(m, n)))
    u, s, vh = svd(weight)
    a, b = factors(u, s, vh, torch.arange(rank), split)
    assert a.shape == (rank, n) and b.shape == (m, rank)
    assert float((weight - b @ a).square().sum()) == pytest.approx(
        float(s[rank:].square().sum()), abs=1e-9
    )


def test_any_subset_of_groups_costs_what_it_leaves_out() -> None:
    weight = matrix(9, 7, 3)
    u, s, vh = svd(weight)
    kept = torch.tensor([0, 2, 5])
    a, b = factors(u, s, vh, kept)
    left_out = torch.tensor([1, 3, 4, 6])
    assert float((weight - b @ a).square().sum()) == pytest.approx(
        float(s[left_out].square().sum())
    )


def test_narrow_weights_are_decomposed_in_float32() -> None:
    u, s, vh = svd(matrix(6, 5, 0).bfloat16())
    assert u.dtype == s.dtype == vh.dtype == torch.float32


def test_ranks_of_the_paper() -> None:
    """smollm2 at r = 10 %: 28, 14 and 41 (design: `int(m n r / (m + n))`)."""
    assert [
        rank_for_ratio(m, n, 0.1) for m, n in ((576, 576), (192, 576), (1536, 576), (576, 1536))
    ] == [28, 14, 41, 41]


def test_rounding_does_not_lose_a_rank_to_floating_point() -> None:
    assert rank_for_ratio(600, 600, 0.1) == 30  # 600 * 600 * 0.1 / 1200 is 30 exactly


@given(m=st.integers(1, 4096), n=st.integers(1, 4096), r=st.floats(0, 1))
def test_a_pair_never_exceeds_its_share(m: int, n: int, r: float) -> None:
    assert rank_for_ratio(m, n, r) * (m + n) <= m * n * r + (m + n) * 1e-6
    assert rank_for_ratio(m, n, r) <= break_even_rank(m, n) + 1e-6


@pytest.mark.skipif("GRASP_CHECK_SHAPES" not in os.environ, reason="make test-shapes asks for it")
def test_shapes_are_checked_at_run_time() -> None:
    """The shape annotations are live: a matrix where a vector belongs is refused."""
    u, s, vh = svd(matrix(4, 4, 0))
    with pytest.raises(Exception, match="type"):
        factors(u, s[:, None], vh, torch.arange(2))
