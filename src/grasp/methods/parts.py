"""The parts of a layer that compete under one budget, and which of them are about the same numbers.

Components are named by path (the ranks of a matrix) or by layer and part: "3 channels", "3 gone",
"3 rest" (what layer 3 costs beside its matrices).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Factorize, Note, Step
from grasp.core.edits.droppable import check_droppable
from grasp.core.experts import is_of_expert
from grasp.core.layer import Linear
from grasp.core.layers.experts_grasp import SPLIT
from grasp.core.records import Allocation, Statistics
from grasp.errors import ModelError, RecipeError
from grasp.methods.components import Component, Problem, never
from grasp.stages import budget as budgets
from grasp.stages.narrowing import AXES
from grasp.stages.options import All, Choice, Costs, OneOf, fixed, gone, only
from grasp.stages.routing import ExpertLosses
from grasp.stages.sublayers import ATTENTION, MLP, LayerLosses

RANKS, LAYERS, EXPERTS = "ranks", "layers", "experts"
PARTS = (RANKS, *AXES, LAYERS, EXPERTS)
DEFAULT, DENSE = (RANKS, "channels"), ("channels", LAYERS)
"""What may become smaller where no --parts say it: in any shape, and where all must stay dense."""
FIRST = 0.8
"""Of two rounds, the share of the narrowing that comes first: the second sweep still finds some of
it better done by ranks.
"""


def beyond(costs: Costs, linears: Sequence[Linear]) -> dict[str, Component]:
    """What layers cost beside their matrices, which goes only with them."""
    return {
        f"{layer} rest": Component(layer, fixed(costs.layer(layer)), never)
        for layer in dict.fromkeys(linear.layer for linear in linears)
    }


def leaving(
    decoder: Decoder, stats: Statistics, linears: Sequence[Linear], costs: Costs, pairs: bool
) -> dict[str, Component]:
    """Layers gone, where all their matrices may be edited; one stays, that which costs most. With
    `pairs` also sublayers: all their matrices at rank 0.
    """
    if not linears:
        return {}
    losses: Mapping[str, float] = stats[LayerLosses.name]
    layers = by_layer(linears)
    needed = max(layers, key=lambda layer: losses[str(layer)])
    found = {}
    for layer, own in layers.items():
        whole = len(own) == len(decoder.layer(layer).linears)
        if whole and layer != needed and can_go(decoder, layer):
            loss = losses[str(layer)]
            make = partial(dropped, layer, loss)
            found[f"{layer} gone"] = Component(layer, gone(loss), make)
        for name, members in sublayers(decoder, own).items() if pairs else ():
            if f"{layer} {name}" in losses:
                for linear in members:
                    loss = losses[f"{layer} {name}"] if linear is members[-1] else 0.0
                    cost = costs.of(linear.path)(linear.shape, 0)
                    make = partial(emptied, linear, loss)
                    offer = gone(loss, cost)
                    found[f"{linear.path} gone"] = Component(
                        layer, offer, make, matrices=(linear.path,)
                    )
    return found


def experts_gone(
    stats: Statistics, linears: Sequence[Linear], costs: Costs
) -> dict[str, Component]:
    """Experts gone, of those whose matrices may all be edited: both at rank 0, so that they add
    nothing to the tokens that are still sent to them.
    """
    losses: Mapping[str, float] = stats[ExpertLosses.name]
    found = {}
    for name, members in by_expert(linears).items():
        for linear in members:
            known = losses[f"{linear.layer} {name}"]
            loss, cost = known if linear is members[-1] else 0.0, costs.of(linear.path)
            offer = gone(loss, cost(linear.shape, 0))
            make = partial(emptied, linear, loss)
            found[f"{linear.path} gone"] = Component(
                linear.layer, offer, make, matrices=(linear.path,)
            )
    return found


def most_gone(linears: Sequence[Linear], costs: Costs) -> dict[int, float]:
    """What layers save that are gone, all but the one that costs most."""
    saved = {
        layer: costs.layer(layer) + sum(costs.of(one.path)(one.shape, None) for one in own)
        for layer, own in by_layer(linears).items()
    }
    largest = max(saved, key=lambda layer: saved[layer], default=0)
    return {layer: cost for layer, cost in saved.items() if layer != largest}


def by_layer(linears: Sequence[Linear]) -> dict[int, list[Linear]]:
    """Matrices by their layer."""
    found: dict[int, list[Linear]] = {}
    for linear in linears:
        found.setdefault(linear.layer, []).append(linear)
    return found


def by_expert(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """The matrices of one layer's experts, by expert."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        if is_of_expert(linear):
            found.setdefault(linear.name.rpartition(".")[0], []).append(linear)
    return found


def sublayers(decoder: Decoder, linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """The matrices of a layer's attention and MLP, where all of them are among `linears`, its
    own.
    """
    family, by_name = decoder.family, {linear.name: linear for linear in linears}
    paths = {ATTENTION: family.attention, MLP: family.mlp}
    return {
        name: [by_name[path] for _, path in matrices]
        for name, matrices in paths.items()
        if matrices and all(path in by_name for _, path in matrices)
    }


def emptied(linear: Linear, loss: float, _size: int) -> Step:
    """A matrix at rank 0, as part of a sublayer that is gone."""
    out, into = linear.shape
    edit = Factorize(linear.path, torch.zeros(0, into), torch.zeros(out, 0))
    return Step(edit, Note(predicted_loss=loss, seen_loss=loss))


def dropped(layer: int, loss: float, _size: int) -> Step:
    """The layer gone."""
    return Step(Drop(layer), Note(predicted_loss=loss, seen_loss=loss))


def can_go(decoder: Decoder, layer: int) -> bool:
    """Whether the model without that layer would load again."""
    try:
        check_droppable(decoder, [layer])
    except ModelError:
        return False
    return True


def one_width(problem: Problem, spend: float) -> Allocation:
    """The sizes of least loss at which all MLPs have one width. Raises `RecipeError` where they
    cannot.
    """
    offers = problem.offers
    names = [name for name in offers if name.endswith(" channels")]
    if len(names) < len(problem.per_layer):
        raise RecipeError(
            f"--uniform: only {len(names)} of {len(problem.per_layer)} layers have an MLP that can"
            " be narrower; leave --uniform out, or take all --layers and --projections"
        )
    shared = set.intersection(*(set(offers[name].sizes.tolist()) for name in names))
    found = []
    for width in sorted(shared):
        at = {**offers, **{name: only(offers[name], width) for name in names}}
        if budgets.cheapest(at, problem.choice) <= spend:
            found.append(budgets.allocate(at, spend, problem.choice))
    if not found:
        raise RecipeError(
            "--uniform: no width of all MLPs is small enough; take a smaller --ratio, or a smaller"
            " --width-multiple"
        )
    return min(found, key=lambda one: budgets.total_loss(offers, one))


def narrower_first(problem: Problem, sizes: Allocation) -> Allocation | None:
    """Of a choice, what is no rank, `FIRST` of the way; None where that is nothing."""
    first: dict[str, int | None] = {}
    for name, component, size in problem.taken(sizes):
        if " " in name and f".{SPLIT}." not in name:  # experts are taken apart once
            offer, whole = component.offer, component.whole
            wanted = whole - FIRST * (whole - size)
            place = int(torch.searchsorted(offer.sizes, wanted))
            if place < len(offer.sizes):
                first[name] = int(offer.sizes[place])
    return Allocation(first) if first else None


def settled(problem: Problem, sizes: Allocation, linears: Sequence[Linear]) -> float:
    """What a choice costs beyond these matrices, the dense ones that it leaves: layers beside their
    matrices, and parts whose narrower matrices have gaps, and so no ranks.
    """
    left = {linear.path for linear in linears}
    found = ((problem.components[name], size) for name, size in sizes.sizes.items())
    return sum(one.cost(size) for one, size in found if left.isdisjoint(one.matrices))


def choices(
    decoder: Decoder, layer: int, linears: Sequence[Linear], components: dict[str, Component]
) -> tuple[Choice, ...]:
    """What of a layer goes together: each matrix by itself, or the part that it belongs to; one
    choice where the layer may go as a whole.
    """
    taken: dict[str, Choice] = {linear.name: linear.path for linear in linears}
    for part, roles in (("values", "vo"), ("groups", "qkvo"), ("channels", ("gate", "up", "down"))):
        name = f"{layer} {part}"
        if name not in components:
            continue
        paths = [
            path
            for found, path in decoder.family.matrices
            if path in taken and set(found.split("+")) & set(roles)
        ]
        others = tuple(dict.fromkeys(taken[path] for path in paths))
        taken |= dict.fromkeys(paths, OneOf((name, All(others))))
    together = (*sublayers(decoder, linears).values(), *by_expert(linears).values())
    for members in together:
        left_out = tuple(f"{linear.path} gone" for linear in members)
        if all(name in components for name in left_out):
            names = [linear.name for linear in members]
            others = tuple(dict.fromkeys(taken[name] for name in names))
            taken |= dict.fromkeys(names, OneOf((All(left_out), All(others))))
    parts = tuple(dict.fromkeys(taken.values()))
    if f"{layer} rest" in components:
        parts = (*parts, f"{layer} rest")
    if f"{layer} gone" in components:
        return (OneOf((f"{layer} gone", All(parts))),)
    return parts


def problem_of(
    decoder: Decoder, linears: Sequence[Linear], components: dict[str, Component]
) -> Problem:
    """What a budget chooses from: these components, of which those of a layer go together as
    `choices` says.
    """
    trees = [choices(decoder, layer, own, components) for layer, own in by_layer(linears).items()]
    per_layer = tuple(All(tree) if len(tree) > 1 else tree[0] for tree in trees)
    every = tuple(part for tree in trees for part in tree)
    return Problem(components, All(per_layer), per_layer, every)
