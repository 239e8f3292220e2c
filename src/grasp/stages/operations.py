"""How many operations the parts of a compression take, by kind, from the shapes of matrices: what a
method tells of its work beside passes, so that its time can be told (`grasp.verbs.run_time`).

    pass    multiplications and additions of a pass, in the model's dtype
    sum     the same, of sums of outer products over tokens, in float32
    single  the same, of products of large squares, in float32
    double  the same in float64; Cholesky factors and triangular solves by what they take of these
    eigh    n^3 of an eigendecomposition of a symmetric (n, n), in float64
    svd     n^3 of a singular value decomposition of a square (n, n), in float32
    touch   numbers that go through memory, one reading and one writing each

Counts of what is done once a matrix are those of the code, leading terms only; what a kind takes is
measured (`grasp.verbs.machine_speed`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from grasp.core.decoder import Decoder
from grasp.core.experts import is_of_expert, mixture
from grasp.core.families import Family
from grasp.core.layer import Linear

Kind = Literal["pass", "sum", "single", "double", "eigh", "svd", "touch"]
Operations = dict[Kind, float]
"""Kind -> how many."""
Shape = tuple[int, int]

TOGETHER = ("qkv", ("gate", "up"))
"""Roles that read one tensor."""
FACTOR = 3.0
"""n^3 products in the time of a Cholesky factor and of the inverse from it, both slower."""
SORT = 30
"""Numbers touched in the time in which one is sorted."""
FITTED = 60
"""Numbers touched a number whose group gets a scale."""
REMOVALS = 100
"""Numbers touched a number of H^-1, while `grasp.stages.surgeon.removal` makes it smaller."""


def total(parts: Iterable[Operations], times: float = 1) -> Operations:
    """The operations of all parts, so many times."""
    found: Operations = {}
    for part in parts:
        for kind, count in part.items():
            found[kind] = found.get(kind, 0) + times * count
    return found


# --- a token of a sweep


def sums(
    decoder: Decoder,
    linears: Sequence[Linear],
    inputs: Collection[str] = (),
    backward: bool = False,
) -> Operations:
    """Of `grasp.stages.curvature`: sums of outer products of inputs, of the shorter side or, of
    the matrices at the paths `inputs`, of all; and with `backward` of gradients. An expert sees
    its share of the tokens.
    """
    found, seen = [], set[tuple[int, str]]()
    for linear in linears:
        (out, width), read = linear.shape, (linear.layer, _read(decoder.family, linear))
        through: Operations = {"pass": 2.0 * out * width}
        of_inputs: Operations = {"sum": 2.0 * width**2}
        of_outputs: Operations = {"sum": 2.0 * out**2}
        parts = []
        if linear.is_tall or linear.path in inputs:
            parts += [] if read in seen else [of_inputs]
            seen.add(read)
        else:
            parts += [through, of_outputs]
        if backward:
            parts += [through, of_inputs] if linear.is_tall else [of_outputs]
        found.append(total(parts, _share(decoder, linear)))
    return total(found)


def _share(decoder: Decoder, linear: Linear) -> float:
    """Of the tokens, what a matrix sees."""
    experts = mixture(decoder, linear.layer) if is_of_expert(linear) else None
    return 1.0 if experts is None else experts.per_token / experts.count


def _read(family: Family, linear: Linear) -> str:
    """What names the tensor that a matrix reads."""
    for roles in TOGETHER:
        if any(linear.name in family.holding(role) for role in roles):
            return "+".join(roles)
    return linear.path


def gradients(linears: Sequence[Linear]) -> Operations:
    """Of the gradients of the weights of these matrices."""
    return {"pass": 2.0 * sum(out * width for out, width in _shapes(linears))}


def kept_gradients(linears: Sequence[Linear]) -> Operations:
    """Of adding these gradients up, a block."""
    return {"touch": 2.0 * sum(out * width for out, width in _shapes(linears))}


def sensitivities(decoder: Decoder, linears: Sequence[Linear], activations: bool) -> Operations:
    """Of `grasp.stages.sensitivity`: a sum of outer products of inputs for every matrix; with
    `activations` also a product with it. An expert sees its share of the tokens.
    """
    found = []
    for one in linears:
        of_inputs: Operations = {"sum": 2.0 * one.shape[1] ** 2}
        more = [gradients([one])] if activations else []
        found.append(total([of_inputs, *more], _share(decoder, one)))
    return total(found)


# --- once


def rounding(shape: Shape, rows: int, widths: int) -> Operations:
    """Of pricing a matrix in so many widths, from so many of its rows, and of rounding it
    (`grasp.stages.rounding`): fitted scales, and columns that make up for one another.
    """
    out, width = shape
    numbers = FITTED * width * (widths * min(out, rows) + 2 * out)
    return {"double": 2 * FACTOR * width**3, "single": 2.0 * out * width**2, "touch": numbers}


def groups(shape: Shape) -> Operations:
    """Of the singular groups of a matrix in a metric (`grasp.stages.basis.groups`)."""
    tall, short = max(shape), min(shape)
    products = 2.0 * tall * short**2 + (8 + FACTOR) * short**3
    return {"double": products, "eigh": float(short**3), "touch": 20.0 * short**2}


def halves(shape: Shape, collects_inputs: bool) -> Operations:
    """Of the same on both halves of the text, each judged on both; `collects_inputs`: X of a wide
    matrix is there in the place of W X W' (`grasp.stages.forecast.forecast_ranks`).
    """
    out, width = shape
    judged: Operations = {"double": 4 * 8.0 * min(shape) ** 3}
    turned = 2 * 2.0 * (out * width**2 + out**2 * width) if collects_inputs else 0
    return total([groups(shape), groups(shape), judged, {"double": turned}])


def narrowing(shape: Shape, with_halves: bool = True) -> Operations:
    """Of the order and the prices of the inputs of a matrix (`grasp.stages.narrowing`), on the
    whole text and on both halves: a metric, an order and two factors for each of the three, five
    prices.
    """
    out, n = shape
    choosers, judges = (3, 5) if with_halves else (1, 1)
    metric = 2.0 * out**2 * n + 4.0 * out * n**2
    price = 8.0 * n**3  # two products, and two solves at half their speed
    order: Operations = {
        "single": metric + 4 / 3 * n**3,
        "double": 1.3 * FACTOR * n**3,
        "touch": float(REMOVALS * n**2),
    }
    return total([total([order], choosers), {"single": judges * price}])


def refit(shape: Shape) -> Operations:
    """Of what stands in for the inputs that go, three quarters of them staying."""
    out, n = shape
    return {"double": 4.0 * out * n**2 + 0.6 * n**3}


def svd(shape: Shape) -> Operations:
    """Of the singular value decomposition of a matrix, and of scoring its groups."""
    tall, short = max(shape), min(shape)
    made_square = 8.0 * tall * short**2 if tall > short else 0
    return {"svd": float(short**3), "single": made_square + 2.0 * tall * short**2}


def factor(shape: Shape) -> Operations:
    """Of a Cholesky factor of the inputs of a matrix, and of an inverse."""
    return {"double": FACTOR * shape[1] ** 3}


def columns(shape: Shape, block: int) -> Operations:
    """Of replacing columns one after another (`grasp.stages.obs_columns`)."""
    out, n = shape
    beyond: Operations = {"single": float(out * n**2), "touch": out * n * block / 2}
    return total([factor(shape), beyond, sorting(shape)])


def sorting(shape: Shape) -> Operations:
    """Of putting the numbers of a matrix into an order."""
    return {"touch": float(SORT * shape[0] * shape[1])}


def rotation(hidden: int, numbers: int, places: int) -> Operations:
    """Of the directions at so many places, and of turning the `numbers` of a model into them."""
    return {"eigh": float(places * hidden**3), "double": 2.0 * numbers * hidden}


def _shapes(linears: Sequence[Linear]) -> list[Shape]:
    return [linear.shape for linear in linears]
