"""Bits beside ranks and channels: every size that a component offers, in every width that its
matrices can have, under one budget in bytes.

A problem of sizes becomes one of variants: a size of a component, with a width for each matrix that
it is about. The losses of structure and of rounding add up; what a variant costs is what its
matrices take in the file. Variants that another beats in both are left out. One multiplier chooses
(`grasp.stages.budget`), and what it chose falls apart again into sizes, carried out as ever, and
widths, carried out last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.core.records import Allocation
from grasp.methods.components import Component, Problem, never
from grasp.methods.costs import INDEX
from grasp.stages.options import All, Options, fixed
from grasp.stages.rounding import Width, pair_bytes, pair_loss

Shape = tuple[int, int]
Shapes = Mapping[str, Shape]
"""Path of a matrix -> (out, in)."""
Point = tuple[float, float, tuple[int, ...]]
"""Bytes, loss, and the number of a width for every matrix."""


def in_file(shape: Shape, width: Width | None) -> float:
    """Bytes of a matrix in a width, or in 16 bits."""
    if width is None:
        return float(2 * math.prod(shape) + INDEX)
    return float(width.num_bytes(*shape) + width.tensors * INDEX)


@dataclass(frozen=True)
class Offered:
    """In which widths a matrix of `shape` may be stored, and what each costs it in nats a token;
    None: as it is, at no loss. `activations`: what rounding its inputs adds, in widths that do.
    """

    shape: Shape
    widths: tuple[Width | None, ...]
    losses: Float[Tensor, "widths"]
    activations: float = 0.0

    @property
    def dense_losses(self) -> Float[Tensor, "widths"]:
        """What each width costs a matrix that is no pair, its inputs included."""
        both = [width is not None and width.rounds_activations for width in self.widths]
        return self.losses + self.activations * torch.tensor(both).to(self.losses)


@dataclass(frozen=True)
class Rounding:
    """How a matrix is stored, and what that costs in nats a token."""

    width: Width
    loss: float


@dataclass(frozen=True)
class Variant:
    """A size of a component (None: as it is), and those of its matrices that are rounded."""

    size: int | None
    rounded: Mapping[str, Rounding]


@dataclass(frozen=True)
class InWidths:
    """The problem `of` sizes as one of variants: a size of a component in `variants` is the number
    of one of these.
    """

    of: Problem
    problem: Problem
    variants: Mapping[str, Sequence[Variant]] = field(default_factory=dict)

    def taken(self, chosen: Allocation) -> dict[str, Variant]:
        """Component -> the variant that was chosen."""
        return {
            name: self.variants[name][number]
            for name, number in chosen.sizes.items()
            if number is not None and name in self.variants
        }

    def sizes(self, chosen: Allocation) -> Allocation:
        """The sizes in what was chosen."""
        variants = self.taken(chosen)
        return Allocation(
            {
                name: variants[name].size if name in variants else size
                for name, size in chosen.sizes.items()
                if name in self.of.components
            }
        )

    def rounded(self, chosen: Allocation) -> dict[str, Rounding]:
        """Path of every matrix that is rounded -> how."""
        return {
            path: how
            for variant in self.taken(chosen).values()
            for path, how in variant.rounded.items()
        }


def in_widths(
    problem: Problem,
    offered: Mapping[str, Offered],
    narrower: Mapping[str, Callable[[int], Shapes]],
    pivoted: bool,
    outside: Mapping[str, Offered],
    alike: Sequence[tuple[str, ...]] = (),
) -> InWidths:
    """A problem in bytes, with widths for the matrices in `offered`.

    `narrower`: the component of a narrower part -> the shapes of its matrices at a size.
    `pivoted`: how pairs are stored in 16 bits. `outside`: matrices that no component is about.
    `alike`: matrices of one width together; they are in `offered`, and have no ranks.
    """
    components, variants = dict(problem.components), {}
    whole = problem.dense
    joint = {path for paths in alike for path in paths}
    for paths in alike:
        # the first is about all of them, the others cost nothing
        variants[paths[0]], offer = of_alike({path: offered[path] for path in paths})
        layer = components[paths[0]].layer
        components |= {path: Component(layer, fixed(0.0), never) for path in paths[1:]}
        components[paths[0]] = Component(layer, offer, never, matrices=paths)
    for name, one in problem.components.items():
        if name in joint:
            continue
        if name in offered:
            found = of_matrix(name, one.offer, offered[name], pivoted)
        elif name in narrower and all(path in offered for path in one.matrices):
            parts = {path: offered[path] for path in one.matrices}
            found = of_part(one.offer, parts, narrower[name])
        else:
            continue
        variants[name], offer = found
        components[name] = Component(one.layer, offer, never, matrices=one.matrices)
    for name, one_offered in outside.items():
        bare = fixed(in_file(one_offered.shape, None))
        variants[name], offer = of_matrix(name, bare, one_offered, False)
        components[name] = Component(-1, offer, never, matrices=(name,))
        whole += bare.dense
    wide = Problem(
        components,
        All((problem.choice, *outside)),
        (*problem.per_layer, *outside),
        (*problem.uniform, *outside),
        whole,
    )
    return InWidths(problem, wide, variants)


def of_matrix(
    path: str, offer: Options, offered: Offered, pivoted: bool
) -> tuple[list[Variant], Options]:
    """The ranks of a matrix, and the matrix as it is, in every width. The inputs of pairs are not
    rounded: what the second product would read is not known before there is a pair.
    """
    ranks, lost, seen = offer.sizes, offer.losses, offer.seen
    sizes: list[int | None] = ranks.tolist()
    stays = math.isfinite(offer.dense)
    if stays:
        sizes, lost, seen = [*sizes, None], _and(lost, 0.0), _and(seen, 0.0)
    costs, losses, on_seen, added = [], [], [], []
    each = zip(offered.widths, offered.losses.tolist(), offered.dense_losses.tolist(), strict=True)
    for width, loss, loss_dense in each:
        cost, rounding, dense = offer.costs, torch.zeros(len(ranks)).double(), offer.dense
        if width is not None:
            cost = pair_bytes(width, offered.shape, ranks, pivoted) + 2 * width.tensors * INDEX
            rounding = pair_loss(width, loss, ranks, pivoted)
            dense = in_file(offered.shape, width)
        costs.append(_and(cost, dense) if stays else cost)
        rounding = _and(rounding, loss_dense) if stays else rounding
        added.append(rounding)
        losses.append(lost + rounding)
        on_seen.append(seen + rounding)

    def variant(number: int) -> Variant:
        place, size = divmod(number, len(sizes))
        width, lost = offered.widths[place], float(added[place][size])
        if width is None:
            return Variant(sizes[size], {})
        width = width if sizes[size] is None else width.in_pairs
        return Variant(sizes[size], {path: Rounding(width, lost)})

    return _best(torch.cat(costs), torch.cat(losses), torch.cat(on_seen), variant)


def of_alike(offered: Mapping[str, Offered]) -> tuple[list[Variant], Options]:
    """Matrices without ranks, all in one of the widths that each of them has."""
    several = list(offered.values())
    common = [one for one in several[0].widths if all(one in other.widths for other in several)]
    losses = [
        [float(one.dense_losses[one.widths.index(width)]) for one in several] for width in common
    ]
    costs = [sum(in_file(one.shape, width) for one in several) for width in common]

    def variant(number: int) -> Variant:
        width = common[number]
        if width is None:
            return Variant(None, {})
        each = zip(offered, losses[number], strict=True)
        return Variant(None, {path: Rounding(width, loss) for path, loss in each})

    together = torch.tensor([sum(one) for one in losses], dtype=torch.float64)
    return _best(torch.tensor(costs, dtype=torch.float64), together, together, variant)


def of_part(
    offer: Options, offered: Mapping[str, Offered], shapes: Callable[[int], Shapes]
) -> tuple[list[Variant], Options]:
    """The sizes of a part whose matrices become narrower, each in every width. A narrower matrix
    loses by rounding what its share of the numbers does.
    """
    paths, together = list(offered), _hull(list(offered.values()))
    costs, losses, seen = [], [], []
    for place, size in enumerate(offer.sizes.tolist()):
        at = shapes(size)
        shares = {path: math.prod(at[path]) / math.prod(offered[path].shape) for path in paths}
        for chosen in together:
            cost, rounding = float(offer.costs[place]), 0.0
            for path, number in zip(paths, chosen, strict=True):
                width, shape = offered[path].widths[number], at[path]
                rounding += shares[path] * float(offered[path].dense_losses[number])
                cost += in_file(shape, width) - in_file(shape, None)
            costs.append(cost)
            losses.append(float(offer.losses[place]) + rounding)
            seen.append(float(offer.seen[place]) + rounding)

    def variant(number: int) -> Variant:
        place, chosen = divmod(number, len(together))
        rounded = {}
        for path, one in zip(paths, together[chosen], strict=True):
            width, loss = offered[path].widths[one], float(offered[path].dense_losses[one])
            if width is not None:
                rounded[path] = Rounding(width, loss)
        return Variant(int(offer.sizes[place]), rounded)

    three = [torch.tensor(one, dtype=torch.float64) for one in (costs, losses, seen)]
    return _best(three[0], three[1], three[2], variant)


def _best(
    costs: Tensor, losses: Tensor, seen: Tensor, variant: Callable[[int], Variant]
) -> tuple[list[Variant], Options]:
    """The variants that no other beats in cost and loss, cheapest first, and what they offer."""
    order = losses.argsort(stable=True)
    order = order[costs[order].argsort(stable=True)]
    least = losses[order].cummin(0).values
    kept = order[torch.cat([torch.ones(1, dtype=torch.bool), least[1:] < least[:-1]])]
    numbers = torch.arange(len(kept))
    offer = Options(numbers, losses[kept], costs[kept], math.inf, seen[kept])
    return [variant(number) for number in kept.tolist()], offer


def _and(values: Tensor, last: float) -> Tensor:
    """With one more behind the others."""
    return torch.cat([values.double(), torch.tensor([last], dtype=torch.float64)])


def _hull(offered: Sequence[Offered]) -> list[tuple[int, ...]]:
    """Of all ways to give each matrix a width, those of least loss for some worth of a byte: the
    lower convex hull of bytes and losses.
    """
    each = []
    for one in offered:
        costs = [in_file(one.shape, width) for width in one.widths]
        each.append(list(zip(costs, one.dense_losses.tolist(), strict=True)))
    points = []
    for chosen in itertools.product(*(range(len(one)) for one in each)):
        at = [one[number] for one, number in zip(each, chosen, strict=True)]
        points.append((sum(cost for cost, _ in at), sum(loss for _, loss in at), chosen))
    hull: list[Point] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [chosen for _, _, chosen in hull]


def _is_above(one: Point, middle: Point, other: Point) -> bool:
    """Whether the middle point lies on the line between its neighbours, or above it."""
    across, along = other[0] - one[0], middle[0] - one[0]
    return (middle[1] - one[1]) * across >= (other[1] - one[1]) * along
