"""Sizes and widths under one budget: against all that there is, written out."""

import itertools

import pytest
import torch

from grasp.core.records import Allocation
from grasp.methods.bits import Offered, in_file, in_widths, of_alike, of_matrix, of_part
from grasp.methods.components import Component, Problem, never
from grasp.methods.costs import INDEX
from grasp.stages.budget import allocate, total_loss
from grasp.stages.options import All, OneOf, Options, fixed, options
from grasp.stages.rounding import Width, pair_bytes, pair_loss

WIDTHS = (None, Width("int8", 32), Width("int4", 64), Width("int3", 32))
LOSSES = torch.tensor([0.0, 0.001, 0.05, 0.3], dtype=torch.float64)
SHAPE = (40, 24)


def matrix(seed: int = 0) -> Options:
    """The ranks of a plain pair, in bytes of 16 bits."""
    lost = torch.rand(24, generator=torch.Generator().manual_seed(seed)).double().sort().values
    tail = torch.cat([lost.flip(0).cumsum(0).flip(0), torch.zeros(1).double()])
    return options(SHAPE, tail, in_16_bits)


def in_16_bits(shape, rank):
    if rank is None:
        return in_file(shape, None)
    return 2.0 * rank * sum(shape) + 2 * INDEX


def offered(scale: float = 1.0) -> Offered:
    return Offered(SHAPE, WIDTHS, LOSSES * scale)


def everything(offer: Options, scale: float) -> list[tuple[float, float]]:
    """(bytes, loss) of every rank in every width, one by one."""
    found = []
    for width, loss in zip(WIDTHS, (LOSSES * scale).tolist(), strict=True):
        for place, rank in enumerate(offer.sizes.tolist()):
            cost, extra = float(offer.costs[place]), 0.0
            if width is not None:
                at = torch.tensor([rank])
                cost = (
                    float(pair_bytes(width, SHAPE, at, pivoted=False)) + 2 * width.tensors * INDEX
                )
                extra = float(pair_loss(width, loss, at, pivoted=False))
            found.append((cost, float(offer.losses[place]) + extra))
        found.append((offer.dense if width is None else in_file(SHAPE, width), loss))
    return found


def test_only_what_another_beats_in_both_is_left_out():
    offer = matrix()
    variants, found = of_matrix("a", offer, offered(), pivoted=False)
    all_of_them = everything(offer, 1.0)
    best = [
        one
        for one in all_of_them
        if not any(o[0] <= one[0] and o[1] <= one[1] and o != one for o in all_of_them)
    ]
    kept = list(zip(found.costs.tolist(), found.losses.tolist(), strict=True))
    assert torch.allclose(torch.tensor(sorted(set(best))), torch.tensor(kept))
    assert len(variants) == len(kept) == len(set(kept))
    assert (found.costs.diff() > 0).all() and (found.losses.diff() < 0).all()
    assert variants[-1].size is None and not variants[-1].rounded  # as it is


def problem(parts: dict[str, Options]) -> Problem:
    names = tuple(parts)
    components = {
        name: Component(0, offer, never, matrices=(name,)) for name, offer in parts.items()
    }
    return Problem(components, All(names), names, names)


@pytest.mark.parametrize("share", [0.25, 0.35, 0.45, 0.7, 0.9])
def test_the_choice_is_the_best_of_all(share):
    """Two matrices and an embedding: every combination of variants within the budget."""
    scales = {"a": 1.0, "b": 0.2}
    plain = problem({name: matrix(seed) for seed, name in enumerate(scales)})
    table = Offered((50, 16), WIDTHS[:3], LOSSES[:3] * 0.5)
    wide = in_widths(
        plain, {name: offered(scale) for name, scale in scales.items()}, {}, False, {"table": table}
    )
    assert wide.problem.dense == 2 * in_file(SHAPE, None) + in_file((50, 16), None)
    budget = share * wide.problem.dense
    chosen = allocate(wide.problem.offers, budget, wide.problem.choice)
    lost = total_loss(wide.problem.offers, chosen)
    offers = list(wide.problem.offers.values())
    best = min(
        sum(float(o.losses[i]) for o, i in zip(offers, places, strict=True))
        for places in itertools.product(*(range(len(o.costs)) for o in offers))
        if sum(float(o.costs[i]) for o, i in zip(offers, places, strict=True)) <= budget
    )
    assert best <= lost * (1 + 1e-9)
    assert lost <= best + max(float(-o.losses.diff().min()) for o in offers if len(o.losses) > 1)


def test_what_was_chosen_falls_apart_into_sizes_and_widths():
    plain = problem({"a": matrix()})
    wide = in_widths(plain, {"a": offered()}, {}, False, {})
    variants = wide.variants["a"]
    for number, variant in enumerate(variants):
        chosen = Allocation({"a": number})
        assert wide.sizes(chosen).sizes == {"a": variant.size}
        assert wide.rounded(chosen) == variant.rounded


def test_activations_are_rounded_where_there_is_no_pair():
    """A dense matrix pays for its inputs; a pair in 8 bits keeps them and pays for its weights."""
    widths = (Width("int8-dynamic", 32), Width("int4", 64))
    some = Offered(SHAPE, widths, LOSSES[1:3], activations=0.01)
    assert some.dense_losses.tolist() == pytest.approx([0.011, 0.05])
    variants, found = of_matrix("a", matrix(), some, pivoted=False)
    seen = set()
    for variant, cost, loss in zip(variants, found.costs, found.losses, strict=True):
        how = variant.rounded["a"]
        seen.add((how.width.scheme, variant.size is None))
        if variant.size is None:
            assert float(cost) == in_file(SHAPE, how.width)
            assert float(loss) == pytest.approx(0.011 if how.width.bits == 8 else 0.05)
        elif how.width.bits == 8:
            rank = torch.tensor([variant.size])
            assert how.loss == pytest.approx(float(pair_loss(how.width, 0.001, rank, False)))
    assert {("int8", False), ("int8-dynamic", True)} <= seen
    assert ("int8", True) not in seen and ("int8-dynamic", False) not in seen


def test_a_narrower_part_pays_for_its_share_of_the_inputs():
    some = {"up": Offered((64, 24), (Width("int8-dynamic", 32),), LOSSES[1:2], activations=0.01)}
    costs = torch.tensor([2.0 * 24 * 16 + INDEX]).double()
    offer = Options(torch.tensor([16]), torch.zeros(1).double(), costs, 0.0, torch.zeros(1))
    [variant], found = of_part(offer, some, lambda size: {"up": (size, 24)})
    assert variant.rounded["up"].width.rounds_activations
    assert float(found.losses) == pytest.approx(0.011 / 4)


def test_a_narrower_part_is_rounded_by_its_share_of_the_numbers():
    """Channels of an MLP of three matrices, each in every width."""
    whole, sizes = 64, torch.tensor([16, 32, 48])
    names = ("gate", "up", "down")
    shapes = {"gate": (whole, 24), "up": (whole, 24), "down": (24, whole)}
    losses = {"gate": LOSSES, "up": 2 * LOSSES, "down": 5 * LOSSES}
    part = {name: Offered(shapes[name], WIDTHS, losses[name]) for name in names}

    def at(size):
        return {"gate": (size, 24), "up": (size, 24), "down": (24, size)}

    costs = torch.tensor([6.0 * 24 * size + 3 * INDEX for size in sizes.tolist()]).double()
    offer = Options(sizes, torch.tensor([0.9, 0.4, 0.1]).double(), costs, 0.0, torch.zeros(3))
    variants, found = of_part(offer, part, at)
    for variant, cost, loss in zip(variants, found.costs, found.losses, strict=True):
        size, share = variant.size, variant.size / whole
        rounding = share * sum(how.loss for how in variant.rounded.values())
        assert float(loss) == pytest.approx({16: 0.9, 32: 0.4, 48: 0.1}[size] + rounding)
        bytes_of = {name: in_file(at(size)[name], None) for name in names}
        for name, how in variant.rounded.items():
            bytes_of[name] = in_file(at(size)[name], how.width)
        assert float(cost) == pytest.approx(sum(bytes_of.values()))
    assert {variant.size for variant in variants} == {16, 32, 48}


def test_ways_of_the_same_numbers_still_exclude_one_another():
    """A narrower MLP brings the widths of its matrices; otherwise they have their own."""
    parts = {name: matrix(seed) for seed, name in enumerate(("gate", "up", "down"))}
    components = {
        name: Component(0, offer, never, matrices=(name,)) for name, offer in parts.items()
    }
    narrow = Options(
        torch.tensor([32]),
        torch.tensor([0.001]).double(),
        torch.tensor([3 * in_file((40, 12), None)]).double(),
        3 * in_file(SHAPE, None),
        torch.zeros(1).double(),
    )
    components["0 channels"] = Component(0, narrow, never, 64, tuple(parts))
    choice = OneOf(("0 channels", All(tuple(parts))))
    plain = Problem(components, choice, (choice,), (choice,))
    half = (SHAPE[0], SHAPE[1] // 2)
    wide = in_widths(
        plain,
        dict.fromkeys(parts, offered()),
        {"0 channels": lambda size: dict.fromkeys(parts, half)},
        False,
        {},
    )
    chosen = allocate(wide.problem.offers, 0.2 * plain.dense, wide.problem.choice)
    names = set(chosen.sizes)
    assert names in ({"0 channels"}, set(parts))
    assert set(wide.rounded(chosen)) <= set(parts)


def test_without_16_bits_all_is_rounded():
    some = Offered(SHAPE, WIDTHS[1:], LOSSES[1:])
    wide = in_widths(problem({"a": fixed(in_file(SHAPE, None))}), {"a": some}, {}, False, {})
    assert all(variant.rounded for variant in wide.variants["a"])
    assert wide.problem.dense == in_file(SHAPE, None)


def test_matrices_of_one_width_together():
    """Costs and losses add up; a width that one of them lacks is none of the choice."""
    widths = (None, Width("int8", 32), Width("int4", 64))
    losses = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
    parts = {"q": Offered((64, 64), widths, losses), "k": Offered((32, 64), widths, 2 * losses)}
    variants, offer = of_alike(parts)
    assert offer.losses.tolist() == pytest.approx([1.5, 0.3, 0.0])
    costs = [sum(in_file(one.shape, width) for one in parts.values()) for width in widths]
    assert offer.costs.tolist() == costs[::-1]
    assert {path: how.width for path, how in variants[0].rounded.items()} == dict.fromkeys(
        parts, widths[2]
    )
    assert variants[0].rounded["k"].loss == 1.0 and not variants[2].rounded
    parts["v"] = Offered((32, 64), widths[:2], losses[:2])
    assert len(of_alike(parts)[0]) == 2
