"""What matrices and layers cost in time, measured on the machine at hand.

The unit is a share of the dense model's time: half of it decoding (one token, batch 1, with the
cache), half reading a prompt:

    cost = ½ decode / (decode step of the whole model) + ½ prefill / (prefill of the whole model)

so the dense model costs 1, and costs add up: matrices + what layers cost beside them + the ends
(embedding, last norm, head).

1. The model runs, and its layers and matrices are timed in place (`grasp.stages.in_place`).
2. What else a matrix could be is timed beside it as it is, alone (`grasp.stages.measuring`), at
   some ranks and widths, as the module that an edit puts there. The ratio of the two times the
   matrix's cost in place is what the other costs. Between ranks and widths it is linear, and it
   never falls with either.
3. Pairs of matrices that read the same input run their first products as one. What that saves is
   timed with all of them as pairs of the same share of their full rank, and taken off each.

What is measured is kept: later edits of the model do not change the unit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from grasp.core.clock import Clock, clock_of
from grasp.core.decoder import Decoder
from grasp.core.layers.low_rank_grasp import low_rank_like
from grasp.core.layers.narrow_grasp import narrow_like
from grasp.stages.in_place import ENDS, Times, prompt_length, quiet, time_in_place
from grasp.stages.layer_kinds import Kind, Matrix, Shape, kinds_of, share_of
from grasp.stages.measuring import Curve, Variant, shares
from grasp.stages.options import Cost

POINTS = 5
"""Ranks at which a pair is timed, beside 1."""
FUSED_AT = (1 / 4, 3 / 4)
"""Shares of the full ranks at which fused first products are timed."""
DENSE_WIDTHS = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)
PAIR_WIDTHS = (1 / 8, 1 / 2, 1.0)
"""Of the matrix as it was. Below the first, the first's time counts."""


class Latency:
    """What the matrices and layers of `decoder`, as it is now, cost as shares of its time.

    The model runs at once. A shape is timed when it is first asked for: as it is, with all its
    ranks; narrower, with all widths, and at a rank with all ranks too. Ask while nothing else runs.

    `pivoted`: how pairs are stored. `whole`: seconds of a decode step and of reading a prompt of
    `tokens`. `ends`: what all costs that is not in a layer.
    """

    def __init__(self, decoder: Decoder, pivoted: bool, clock: Clock | None = None):
        self.device, self.dtype, self.pivoted = decoder.device, decoder.dtype, pivoted
        self.clock, self.most_bytes = clock or clock_of(decoder.device), decoder.num_bytes()
        self.tokens, self._layers = prompt_length(decoder), decoder.family.layers
        samples = time_in_place(decoder, self.tokens, self.clock)
        self.whole, self.kinds, self.kind_of = kinds_of(decoder, samples)
        self.ends_times = quiet([samples[ENDS]]).mapped(share_of, self.whole)
        self.ends = mixed(self.ends_times)
        self._pairs: dict[tuple[object, ...], Curve] = {}
        self._dense: dict[tuple[object, ...], Curve] = {}
        self._fused: dict[tuple[object, ...], Curve] = {}

    def layer(self, index: int, heads: float = 1.0, channels: float = 1.0) -> float:
        """What decoder layer `index` costs beside its matrices, at least 0, where these shares of
        its heads and of its MLP's channels are left.
        """
        return mixed(self.layer_times(index, heads, channels))

    def layer_times(self, index: int, heads: float = 1.0, channels: float = 1.0) -> Times:
        """The same as shares of a decode step, and of reading a prompt. Decoding, it is a number of
        calls, however wide; only what a prompt takes falls with the width.
        """
        kind = self.kinds[self.kind_of[index]]
        saved = (1 - heads) * kind.attention.prefill + (1 - channels) * kind.mlp.prefill
        return Times(kind.rest.decode, max(kind.rest.prefill - saved, 0.0))

    def of(self, path: str, spread: bool = False) -> Cost:
        """What the matrix at `path` (as in `Linear.path`) costs at a shape (out, in) and rank, None
        for dense. Its own shape, or one with fewer outputs or fewer inputs. `spread`: narrower, it
        keeps its width to the outside, as value dimensions do (`NarrowLinear`); dense only.
        """
        return lambda shape, rank: mixed(self.times(path, shape, rank, spread))

    def times(self, path: str, shape: Shape, rank: int | None, spread: bool = False) -> Times:
        """The same as shares of a decode step, and of reading a prompt."""
        index, _, name = path.removeprefix(self._layers + ".").partition(".")
        kind = self.kinds[self.kind_of[int(index)]]
        return self._times(kind, kind.matrices[name], shape, rank, spread)

    def __call__(self, shape: Shape, rank: int | None) -> float:
        """What a matrix of this shape (out, in) costs: the mean of the model's matrices that have
        it, or else of the smallest that have one side of it and a longer other one.
        """
        known = [(kind, matrix) for kind in self.kinds for matrix in kind.matrices.values()]
        fits = [matrix.shape for _, matrix in known if _side(matrix.shape, shape) is not None]
        if not fits:
            raise ValueError(f"no matrix of the model is {shape} or becomes that when narrowed")
        chosen = min(fits, key=lambda one: (one != shape, one[0] * one[1]))
        costs = [
            (kind.count, mixed(self._times(kind, matrix, shape, rank)))
            for kind, matrix in known
            if matrix.shape == chosen
        ]
        return sum(count * cost for count, cost in costs) / sum(count for count, _ in costs)

    def _times(
        self, kind: Kind, matrix: Matrix, shape: Shape, rank: int | None, spread: bool = False
    ) -> Times:
        side = _side(matrix.shape, shape)
        if side is None:
            raise ValueError(f"a matrix {matrix.shape} does not become {shape} when narrowed")
        width, full = shape[side], matrix.shape[side]
        if width == full:
            ranks = self._ranks(kind, matrix, shape)
            ratio = Times(1.0, 1.0) if rank is None else ranks.at(rank)
        elif rank is None:
            ratio = self._widths(matrix, side, spread).at(width)
        else:
            widths = _widths(full, PAIR_WIDTHS)
            shapes = [_with(matrix.shape, side, size) for size in widths]
            times = [self._ranks(kind, matrix, one).at(rank) for one in shapes]
            ratio = Curve.rising(widths, times).at(width)
        return matrix.share.mapped(lambda share, change: share * change, ratio)

    def _widths(self, matrix: Matrix, side: int, spread: bool) -> Curve:
        """The matrix dense, at some widths of one side, as shares of its time as it is."""
        key = (matrix.sign, side, spread)
        if key not in self._dense:
            full = matrix.shape[side]
            widths = _widths(full, DENSE_WIDTHS)
            variants = {full: matrix.module}
            for width in widths[:-1]:
                shape, ways = _with(matrix.shape, side, width), (not side, bool(side))
                kept = ways if spread else (False, False)
                variants[width] = narrow_like(matrix.module, *shape, *kept, "meta")
            found = self._measured({size: Variant({"it": one}) for size, one in variants.items()})
            if spread and len(widths) > 1:
                del widths[-1]  # as it is, its numbers need no places: there the cost may fall
            self._dense[key] = Curve.rising(widths, [found[width] for width in widths])
        return self._dense[key]

    def _ranks(self, kind: Kind, matrix: Matrix, shape: Shape) -> Curve:
        """The matrix as a pair at some ranks, cut to `shape`, as shares of its time as it is."""
        key = (matrix.sign, shape, self._signs(kind, matrix))
        if key not in self._pairs:
            short = min(shape)
            shares_of_full = [i / (POINTS - 1) for i in range(POINTS)]
            ranks = sorted({min(round(short * s), max(short - 1, 1)) for s in shares_of_full} | {1})
            old = narrow_like(matrix.module, *shape, False, False, "meta")
            variants: dict[int, Variant] = {-1: Variant({"it": matrix.module})}
            variants |= {rank: Variant({"it": self._pair(old, rank)}) for rank in ranks}
            found, joint = self._measured(variants), self._joint(kind, matrix)
            self._pairs[key] = Curve.rising(
                ranks,
                [found[r].mapped(lambda a, b: a * b, joint.at(r / short)) for r in ranks],
            )
        return self._pairs[key]

    def _joint(self, kind: Kind, matrix: Matrix) -> Curve:
        """What fusing the first products leaves of the time, by the share of their full rank."""
        key = self._signs(kind, matrix)
        if key not in self._fused:
            found = []
            for step in FUSED_AT if len(matrix.beside) > 1 else ():
                members = [kind.matrices[name] for name in matrix.beside]
                pairs = {
                    name.rpartition(".")[2]: self._pair(
                        one.module, max(round(min(one.shape) * step), 1)
                    )
                    for name, one in zip(matrix.beside, members, strict=True)
                }
                found.append(
                    self._measured({fused: Variant(pairs, fused) for fused in (False, True)})[True]
                )
            self._fused[key] = Curve(FUSED_AT, found or [Times(1.0, 1.0)] * len(FUSED_AT))
        return self._fused[key]

    def _signs(self, kind: Kind, matrix: Matrix) -> tuple[object, ...]:
        return tuple(kind.matrices[name].sign for name in matrix.beside)

    def _pair(self, old: nn.Module, rank: int) -> nn.Module:
        return low_rank_like(old, rank, "meta", self.pivoted)

    def _measured(self, variants: dict[int, Variant]) -> dict[int, Times]:
        return shares(
            variants,
            dtype=self.dtype,
            device=self.device,
            tokens=self.tokens,
            clock=self.clock,
            most_bytes=self.most_bytes,
        )


def mixed(times: Times) -> float:
    """The unit of costs."""
    return (times.decode + times.prefill) / 2


def _widths(full: int, of_full: Sequence[float]) -> list[int]:
    return sorted({max(round(full * share), 1) for share in of_full})


def _with(shape: Shape, side: int, width: int) -> Shape:
    return (width, shape[1]) if side == 0 else (shape[0], width)


def _side(full: Shape, shape: Shape) -> int | None:
    """Which side of `full` is cut in `shape` (0 where none is); None where that is no cut of it."""
    if full[1] == shape[1] and shape[0] <= full[0]:
        return 0
    return 1 if full[0] == shape[0] and shape[1] <= full[1] else None
