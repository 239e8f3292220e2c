"""Layers that are alike, and what one of them and each of its matrices takes of the model's time.

Times of one kind of layer are pooled: the same work is timed in many places, so noise matters less.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import mul

from torch import nn

from grasp.core.decoder import Decoder
from grasp.core.layers.low_rank_grasp import SAME_INPUT
from grasp.core.layers.reading_grasp import features
from grasp.stages.in_place import ENDS, Part, Samples, Times, blocks, quiet

Shape = tuple[int, int]


@dataclass(frozen=True)
class Matrix:
    """A matrix of one kind of layer: its `module` without numbers, its `share` of the model's time
    in place, and those of its layer that it can share a first product with, itself among them.
    """

    module: nn.Module
    share: Times
    beside: tuple[str, ...]

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        fan_in, fan_out = features(self.module)
        return fan_out, fan_in

    @property
    def sign(self) -> tuple[str, Shape, bool]:
        """Matrices of one sign take the same time alone."""
        return type(self.module).__name__, self.shape, self.module.bias is not None


@dataclass(frozen=True)
class Kind:
    """Layers that are alike: how many, their matrices by path inside the layer, and what one costs
    beside them: all, and the part of that within its attention and its MLP.
    """

    count: int
    matrices: dict[str, Matrix]
    rest: Times
    attention: Times
    mlp: Times


def share_of(part: float, whole: float) -> float:
    """Part of whole; 0 where the whole took no time that the clock saw."""
    return part / whole if whole else 0.0


def kinds_of(
    decoder: Decoder, samples: Mapping[Part, Samples]
) -> tuple[Times, list[Kind], dict[int, int]]:
    """(seconds of the whole model, kinds of layers, which is each layer's)."""
    alike: dict[object, list[int]] = {}
    for layer in decoder.layers():
        sign = tuple((name, linear.shape) for name, linear in layer.linears.items())
        alike.setdefault((type(layer.module), sign), []).append(layer.index)
    seconds = [
        {
            path: quiet(samples[index, path] for index in indices)
            for path in ("", *filter(None, blocks(decoder)), *decoder.layer(indices[0]).linears)
        }
        for indices in alike.values()
    ]
    layers = [found[""] for i, found in zip(alike.values(), seconds, strict=True) for _ in i]
    whole = _sum([quiet([samples[ENDS]]), *layers])
    kinds = [
        _kind(decoder, indices, {path: one.mapped(share_of, whole) for path, one in found.items()})
        for indices, found in zip(alike.values(), seconds, strict=True)
    ]
    return whole, kinds, {i: n for n, indices in enumerate(alike.values()) for i in indices}


def _kind(decoder: Decoder, indices: Sequence[int], shares: Mapping[str, Times]) -> Kind:
    """Matrices of one shape take what they take on average; all of them, at most what the layer
    does.
    """
    linears = decoder.layer(indices[0]).linears
    attention, mlp = blocks(decoder)
    alike: dict[tuple[int, int], list[Times]] = {}
    for name, linear in linears.items():
        alike.setdefault(linear.shape, []).append(shares[name])
    total = _sum(shares[name] for name in linears)
    fits = shares[""].mapped(lambda layer, sum: min(share_of(layer, sum), 1.0), total)
    sums = {shape: _sum(times).mapped(mul, fits) for shape, times in alike.items()}
    each = {
        name: Times(sums[shape].decode / len(alike[shape]), sums[shape].prefill / len(alike[shape]))
        for name, shape in ((name, linear.shape) for name, linear in linears.items())
    }

    def beside_matrices(block: str) -> Times:
        inside = _sum(
            time for name, time in each.items() if name.startswith(f"{block}." if block else "")
        )
        return shares[block].mapped(lambda a, b: max(a - b, 0.0), inside)

    rest, none = beside_matrices(""), Times(0.0, 0.0)
    within = [
        beside_matrices(block).mapped(min, rest) if block else none for block in (attention, mlp)
    ]
    matrices = {
        name: Matrix(_empty(linear.module), each[name], _beside(name, linears))
        for name, linear in linears.items()
    }
    return Kind(len(indices), matrices, rest, *within)


def _sum(times: Iterable[Times]) -> Times:
    found = list(times)
    return Times(sum(one.decode for one in found), sum(one.prefill for one in found))


def _beside(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """The matrices of the layer whose first products run as one with that of `name`."""
    parent, _, own = name.rpartition(".")
    for group in SAME_INPUT:
        if own in group:
            return tuple(p for one in group if (p := f"{parent}.{one}") in names)
    return (name,)


def _empty(module: nn.Module) -> nn.Module:
    """The module without its numbers."""
    return copy.deepcopy(module).to("meta")
