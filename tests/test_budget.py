"""One budget for all matrices, against every allocation there is."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp.stages.budget import allocate, cheapest, in_shares, total_loss
from grasp.stages.options import (
    All,
    OneOf,
    Options,
    fixed,
    gone,
    parameters,
    pivoted_parameters,
    tails,
)
from grasp.stages.options import options as options_of

SHAPES = [(5, 4), (3, 6), (4, 4), (2, 9), (7, 3)]
COSTS = {"pair": parameters, "pivoted": pivoted_parameters}

problems = given(seed=st.integers(0, 999), cost=st.sampled_from(list(COSTS)))
some = settings(max_examples=8, deadline=None)


def options(shape, losses, *rest):
    """The options of a matrix whose groups, best first, cost these losses when dropped."""
    return options_of(shape, tails(losses), *rest)


def problem(seed: int, cost: str = "pair", count: int = 3) -> dict[str, Options]:
    """A few small matrices with random groups."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [SHAPES[int(i)] for i in torch.randint(len(SHAPES), (count,), generator=generator)]
    groups = [
        torch.rand(min(shape), generator=generator).pow(3).sort(descending=True).values
        for shape in shapes
    ]
    return {
        f"m{i}": options(shape, losses, COSTS[cost])
        for i, (shape, losses) in enumerate(zip(shapes, groups, strict=True))
    }


def squares(count: int, size: int = 24, seed: int = 2) -> dict[str, Options]:
    """Matrices of one shape whose losses differ by up to a thousand times."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** (3 * torch.rand(count, generator=generator))
    groups = [
        scale * torch.rand(size, generator=generator).sort(descending=True).values
        for scale in scales
    ]
    return {f"m{i}": options((size, size), losses) for i, losses in enumerate(groups)}


def choices(offer: Options) -> list[tuple[float, float, int | None]]:
    """(cost, loss, rank) of all that a matrix offers, dense last."""
    ranked = zip(offer.costs.tolist(), offer.losses.tolist(), offer.sizes.tolist(), strict=True)
    return [*ranked, (offer.dense, 0.0, None)]


def measured(offers: dict[str, Options], ranks: dict[str, int | None]) -> tuple[float, float]:
    """(cost, loss) of an allocation."""
    chosen = [
        next(choice for choice in choices(offers[path]) if choice[2] == rank)
        for path, rank in ranks.items()
    ]
    return sum(cost for cost, _, _ in chosen), sum(loss for _, loss, _ in chosen)


def everything(offers: dict[str, Options]) -> list[tuple[float, float]]:
    """(cost, loss) of every allocation there is."""
    return [
        (sum(c for c, _, _ in each), sum(lost for _, lost, _ in each))
        for each in itertools.product(*map(choices, offers.values()))
    ]


def optimum(points: list[tuple[float, float]], budget: float) -> float:
    """The least loss within a budget."""
    return min(loss for cost, loss in points if cost <= budget)


def hull(offer: Options) -> list[tuple[float, float]]:
    """The lower left convex hull of a matrix's (cost, loss), cheapest first."""
    found: list[tuple[float, float]] = []
    for x, y in sorted((cost, loss) for cost, loss, _ in choices(offer)):
        if found and y >= found[-1][1]:
            continue
        while len(found) > 1 and (found[-1][1] - found[-2][1]) * (x - found[-2][0]) >= (
            y - found[-2][1]
        ) * (found[-1][0] - found[-2][0]):
            found.pop()
        found.append((x, y))
    return found


def segments(offers: dict[str, Options]) -> list[tuple[float, float]]:
    """(cost, slope) of every edge of the hulls of all matrices, steepest first."""
    edges = [
        (b[0] - a[0], (b[1] - a[1]) / (b[0] - a[0]))
        for offer in offers.values()
        for a, b in itertools.pairwise(hull(offer))
    ]
    return sorted(edges, key=lambda edge: edge[1])


def dense(offers: dict[str, Options]) -> float:
    return sum(offer.dense for offer in offers.values())


def last_step(offer: Options, rank: int | None) -> float:
    """What the last rank (or the step to dense) cost."""
    costs = [cost for cost, _, _ in choices(offer)]
    place = [found for _, _, found in choices(offer)].index(rank)
    return costs[place] - costs[max(place - 1, 0)]


@some
@problems
def test_exact_at_the_vertices_of_the_hull(seed, cost):
    """Where the budget is what the steepest hull edges cost together, brute force finds nothing
    better.
    """
    offers = problem(seed, cost)
    points = everything(offers)
    for budget in itertools.accumulate((length for length, _ in segments(offers)), initial=0.0):
        assert measured(offers, allocate(offers, budget).sizes)[1] == pytest.approx(
            optimum(points, budget), abs=1e-12
        )


@some
@problems
def test_near_the_best_at_every_budget(seed, cost):
    """Never dearer than the budget; no worse than the best for one hull edge less; a larger budget
    never loses more.
    """
    offers = problem(seed, cost)
    points = everything(offers)
    edge = max(length for length, _ in segments(offers))
    before = float("inf")
    for budget in map(float, range(0, int(dense(offers)) + 3, 3)):
        price, loss = measured(offers, allocate(offers, budget).sizes)
        assert price <= budget
        assert (
            optimum(points, budget) - 1e-12
            <= loss
            <= optimum(points, max(budget - edge, 0)) + 1e-12
        )
        assert loss <= before + 1e-12
        before = loss


@some
@problems
def test_what_is_left_over_buys_no_further_step(seed, cost):
    offers = problem(seed, cost, count=6)
    for budget in torch.linspace(0, dense(offers), 7).tolist():
        ranks = allocate(offers, budget).sizes
        spare = budget - measured(offers, ranks)[0]
        for path, offer in offers.items():
            costs = [price for price, _, _ in choices(offer)]
            place = [rank for _, _, rank in choices(offer)].index(ranks[path])
            assert ranks[path] is None or costs[place + 1] - costs[place] > spare


def test_ranks_cross_between_matrices():
    """Two groups of one matrix may be worth more than any of another: the budget follows the
    losses, not the shapes.
    """
    rich = options((20, 20), torch.full((20,), 9.0))
    poor = options((20, 20), torch.full((20,), 1.0))
    assert allocate({"rich": rich, "poor": poor}, 400.0).sizes == {"rich": None, "poor": 0}


def test_matrices_of_no_consequence_are_paid_last():
    offers = {"dead": options((6, 6), torch.zeros(6)), "alive": options((6, 6), torch.ones(6))}
    assert allocate(offers, 36.0).sizes == {"dead": 0, "alive": None}


@pytest.mark.parametrize("share", [1.0, 1.5])
def test_everything_stays_dense_where_the_budget_allows_it(share):
    offers = problem(3)
    assert allocate(offers, share * dense(offers)).sizes == dict.fromkeys(offers)
    assert in_shares(offers, [All(tuple(offers))], share * dense(offers)).sizes == dict.fromkeys(
        offers
    )


def test_the_cheapest_allocation():
    """Rank 0 everywhere; a cost that even rank 0 has counts."""
    offers = {
        name: options(
            (6, 5), torch.ones(5), lambda _shape, rank: 40.0 if rank is None else 7.0 + 5 * rank
        )
        for name in "ab"
    }
    assert cheapest(offers) == 14.0
    assert allocate(offers, 14.0).sizes == {"a": 0, "b": 0}


def test_a_dense_matrix_cheaper_than_rank_0_is_the_cheapest():
    """On a machine where even an empty pair is slower than the matrix."""
    offers = {
        "m": options(
            (2, 2), torch.ones(2), lambda _shape, rank: 1.0 if rank is None else 3.0 + rank
        )
    }
    assert cheapest(offers) == 1.0
    assert allocate(offers, 1.0).sizes == {"m": None}


@pytest.mark.parametrize("cost", COSTS)
def test_options_are_the_ranks_cheaper_than_dense(cost):
    groups = torch.tensor([5.0, 3.0, 2.0, 1.0])
    found = options((6, 4), groups, COSTS[cost])
    assert found.sizes.tolist() == {"pair": [0, 1, 2], "pivoted": [0, 1, 2, 3]}[cost]
    assert found.losses.tolist() == [11.0, 6.0, 3.0, 1.0][: len(found.sizes)]
    assert (
        found.costs.tolist() == {"pair": [0.0, 10.0, 20.0], "pivoted": [0.0, 9.0, 16.0, 21.0]}[cost]
    )


def test_losses_below_zero_by_rounding_count_as_none():
    assert options((4, 4), torch.tensor([1.0, -1e-9, -1e-9, -1e-9])).losses.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_rank_multiple(multiple):
    offers = {
        f"m{i}": options((24, 30), 0.8 ** torch.arange(24) / (1 + i), parameters, multiple)
        for i in range(4)
    }
    ranks = allocate(offers, dense(offers) / 2).sizes.values()
    assert all(rank is None or rank % multiple == 0 for rank in ranks) and any(ranks)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_units_do_not_matter(scale):
    """Seconds, bytes, nats or bits: the same ranks."""
    offers = squares(4)
    scaled = {
        path: Options(o.sizes, o.losses * scale, o.costs / scale, o.dense / scale, o.seen * scale)
        for path, o in offers.items()
    }
    assert (
        allocate(scaled, 0.4 * dense(scaled)).sizes == allocate(offers, 0.4 * dense(offers)).sizes
    )


def test_total_loss_is_what_the_dropped_groups_cost():
    offers = {
        "a": options((6, 4), torch.tensor([5.0, 3.0, 2.0, 1.0])),
        "b": options((6, 4), torch.tensor([4.0, 0.5, 0.25, 0.0])),
    }
    assert total_loss(offers, allocate(offers, 20.0)) == 6.0 + 0.75


def test_nothing_dropped_loses_nothing():
    offers = problem(0)
    assert total_loss(offers, allocate(offers, dense(offers))) == 0.0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.77])
@pytest.mark.parametrize("size", [1, 4])
def test_shares_stay_within_the_budget(share, size):
    offers = squares(8)
    parts = [All(tuple(list(offers)[i : i + size])) for i in range(0, 8, size)]
    found = in_shares(offers, parts, share * dense(offers))
    assert measured(offers, found.sizes)[0] <= share * dense(offers)


@pytest.mark.parametrize(("share", "size"), [(0.3, 1), (0.77, 1), (0.77, 4)])
def test_shares_are_equal_to_within_one_step(share, size):
    """Every part spends its share, give or take one step of one of its matrices."""
    offers = squares(20)
    parts = [dict(list(offers.items())[i : i + size]) for i in range(0, 20, size)]
    choices = [All(tuple(part)) for part in parts]
    ranks = in_shares(offers, choices, share * dense(offers)).sizes
    for part in parts:
        price = measured(part, {path: ranks[path] for path in part})[0]
        assert abs(price - share * dense(part)) <= max(
            last_step(part[path], ranks[path]) for path in part
        )


def test_shares_stay_within_the_budget_where_rank_0_costs_something():
    """A pivoted pair's places, 4 bytes a row, are more of a narrow matrix than of a wide one."""
    tall = options(
        (64, 4), torch.ones(4), lambda _shape, rank: 1024.0 if rank is None else 256.0 + 200 * rank
    )
    wide = options(
        (4, 64), torch.ones(4), lambda _shape, rank: 1024.0 if rank is None else 16.0 + 112 * rank
    )
    offers = {"tall": tall, "wide": wide}
    assert measured(offers, in_shares(offers, ["tall", "wide"], 480.0).sizes)[0] <= 480.0


# --- choices


def ways(offers, choice):
    """Every way to fill a choice: size by component."""
    if isinstance(choice, str):
        sizes = [size for cost, _, size in choices(offers[choice]) if cost < float("inf")]
        return [{choice: size} for size in sizes]
    if isinstance(choice, OneOf):
        return [one for way in choice.ways for one in ways(offers, way)]
    parts = itertools.product(*(ways(offers, part) for part in choice.parts))
    return [{name: size for one in each for name, size in one.items()} for each in parts]


@some
@problems
def test_one_of_two_ways_to_make_the_same_numbers_smaller(seed, cost):
    """Against every allocation there is: within the budget, and at the best of all where that is a
    corner of what can be had; nearly so elsewhere.
    """
    offers = problem(seed, cost, count=3)
    whole = offers["m0"].dense + offers["m1"].dense
    sizes = torch.arange(1, 4)
    losses = torch.tensor([3.0, 2.0, 1.0]).double() / (1 + seed % 5)
    offers["narrow"] = Options(sizes, losses, sizes * whole / 4, whole, losses)
    offers["gone"] = gone(2.5)
    one = OneOf(("gone", OneOf(("narrow", All(("m0", "m1"))))))
    choice = All((one, "m2"))
    points = [measured(offers, each) for each in ways(offers, choice)]
    assert cheapest(offers, choice) == min(price for price, _ in points)
    before = float("inf")
    for share in torch.linspace(0, 1, 9).tolist():
        budget = share * (whole + offers["m2"].dense)
        found = allocate(offers, budget, choice)
        assert found.sizes.keys() in [each.keys() for each in ways(offers, choice)]
        price, loss = measured(offers, found.sizes)
        assert price <= budget + 1e-9 and loss >= optimum(points, budget + 1e-9) - 1e-9
        assert total_loss(offers, found) == pytest.approx(loss)
        assert loss <= before + 1e-9
        before = loss
    assert allocate(offers, whole + offers["m2"].dense, choice).sizes["m2"] is None


def test_a_leap_does_not_waste_the_budget():
    """A layer that goes frees far more than is asked for: its matrices at low ranks lose less."""
    offers = {"gone": gone(1.6), "m": options((20, 20), torch.full((20,), 0.1))}
    offers["other"] = options((20, 20), torch.full((20,), 10.0))
    found = allocate(offers, 700.0, All((OneOf(("gone", "m")), "other")))
    assert "gone" not in found.sizes and found.sizes["other"] is None and found.sizes["m"] > 0


def test_what_cannot_be_smaller_only_costs():
    offers = {"m": options((4, 4), torch.ones(4)), "rest": fixed(5.0)}
    assert cheapest(offers) == 5.0
    assert allocate(offers, 9.0).sizes == {"m": 0, "rest": None}
