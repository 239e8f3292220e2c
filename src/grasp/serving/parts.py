"""What one device of a server holds of one matrix: the slices of its factors, and how to multiply
by them. Plain torch.

A server splits a linear over its devices by outputs (column-parallel: q, k, v, gate, up) or by
inputs (row-parallel: o, down), and stacks matrices that read the same input into one linear. With
`y = B (A x)`, `B` (out, rank) and `A` (rank, in):

    by outputs: every device has the whole A and its rows of B: no more communication than a
                dense linear
    by inputs:  every device has its columns of A and the whole B: the partial outputs are summed,
                as a dense linear's are

The rank need not divide by the number of devices. A pivoted pair (`modeling_grasp.LowRankLinear`)
keeps A's `rank` outputs and computes the others from them; split by outputs, a device keeps only
those rows of B that its own outputs need, and a shorter list of places.

All matrices of a stacked linear run their first products as one: `rows` below, A of a pair, the
matrix itself where it is dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from grasp.core.layers.packing_grasp import INTEGERS, ZEROS
from grasp.core.layers.reading_grasp import check_floats, check_places
from grasp.serving.gathering import Gathering
from grasp.serving.stored import Matrix, columns_of

Multiply = Callable[[Tensor], Tensor]


@dataclass
class Part:
    """One matrix of the checkpoint within a linear of the server, on one device.

    `path`: its name, for errors. `out_features`, `in_features`: of the whole matrix. `outputs`,
    `inputs`: the ranges of them that live here. `rank`: None for a dense matrix. `scheme`,
    `group_size`: set where its matrices are stored in few bits (`packing_grasp`). `keep`: they stay
    so, unless columns are cut through a group; else they are dequantised. Tensors come one by one,
    in any order, to `load`; each is sliced as soon as it can be.
    """

    path: str
    out_features: int
    in_features: int
    outputs: Sequence[range]
    inputs: range
    rank: int | None = None
    pivoted: bool = False
    scheme: str | None = None
    group_size: int = 1
    keep: bool = False
    _stored: dict[str, Gathering] = field(default_factory=dict, repr=False)
    _weight: Matrix | None = field(default=None, repr=False)
    _places: Tensor | None = field(default=None, repr=False)
    _order: Tensor | None = field(default=None, repr=False)
    _sliced: dict[str, Matrix] = field(default_factory=dict, repr=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that the checkpoint holds of this matrix, whole."""
        if self.rank is None:
            return {"weight": (self.out_features, self.in_features)}
        rows = self.out_features - self.rank if self.pivoted else self.out_features
        found: dict[str, tuple[int, ...]] = {
            "weight": (rows, self.rank),
            "weight_in": (self.rank, self.in_features),
        }
        return {**found, "places": (self.out_features,)} if self.pivoted else found

    def load(self, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """Take one whole tensor of the checkpoint and keep what is needed here. Raises `ValueError`
        for a wrong name or shape.
        """
        matrix: Matrix = tensor
        if self.scheme is not None and name != "places":
            name, gathered = self._gather(self.scheme, name, tensor)
            if gathered is None:
                return
            matrix = gathered
        expected = self.shapes().get(name)
        if expected is None:
            raise ValueError(
                f"{self.path}: the checkpoint has a '{name}', but config.json names no rank for it"
            )
        if tuple(matrix.shape) != expected:
            raise ValueError(
                f"{self.path}.{name} has the shape {tuple(matrix.shape)}, config.json asks for"
                f" {expected}"
            )
        if isinstance(matrix, Tensor) and name != "places":
            check_floats(self.path, **{name: matrix})
        if name == "weight_in":
            self._sliced[name] = columns_of(matrix, self.inputs).to(device, dtype)
        elif name == "places":
            check_places(self.path, tensor)
            self._places = tensor
        else:
            self._weight = matrix
        weight = self._weight
        if weight is None or (self.pivoted and self._places is None):
            return  # which rows are needed is known once both are here
        if self._places is not None:
            rows, order = local_places(self._places, self.outputs, self.rank or 0)
            self._order = order.to(device)
        else:
            rows = torch.cat([torch.arange(span.start, span.stop) for span in self.outputs])
        inputs = self.inputs if self.rank is None else range(weight.shape[1])
        self._sliced["weight"] = columns_of(weight, inputs)[rows].to(device, dtype)
        self._weight = self._places = None

    def _gather(self, scheme: str, name: str, tensor: Tensor) -> tuple[str, Matrix | None]:
        """(matrix, itself) once all its stored numbers are here."""
        matrix = name.removesuffix(INTEGERS).removesuffix(ZEROS)
        if matrix not in self.shapes():
            return matrix, tensor  # which `load` refuses
        rows, columns = self.shapes()[matrix]
        if matrix not in self._stored:
            shape = (rows, columns)
            self._stored[matrix] = Gathering(self.path, matrix, shape, scheme, self.group_size)
        whole = self._stored[matrix].take(name, tensor)
        return matrix, whole if whole is None or self.keep else whole.dequantized()

    def missing(self) -> list[str]:
        """Names of tensors that never came."""
        here = {*self._sliced, *(() if self._order is None else ("places",))}
        return sorted(self.shapes().keys() - here)

    def first(self) -> Matrix:
        """What the input is multiplied by: A (rank, in), or the matrix (out, in) if it is dense."""
        return self._sliced["weight_in" if self.rank is not None else "weight"]

    def second(self) -> Matrix | None:
        """What A's result is multiplied by: B (rows, rank). None for a dense matrix."""
        return None if self.rank is None else self._sliced["weight"]

    def order(self) -> Tensor | None:
        """(outputs) Where in `cat(A x, B A x)` each output is. None unless pivoted."""
        return self._order


def local_places(places: Tensor, outputs: Sequence[range], rank: int) -> tuple[Tensor, Tensor]:
    """Of a pivoted pair with `places` (out), what the `outputs` need: rows of B (n), and places
    (outputs) in `cat(A x, B[rows] A x)`.
    """
    mine = torch.cat([places[span.start : span.stop] for span in outputs]).long()
    computed = mine >= rank
    rows, position = torch.unique(mine[computed] - rank, return_inverse=True)
    mine[computed] = rank + position
    return rows, mine


@dataclass(frozen=True)
class Stack:
    """How the parts of one linear combine. `sizes`: of the first product's columns, by part, of
    which `widths` are used where a kernel wants more. `second`: the second product of each part,
    None where it is dense. `order` (outputs): puts the results in place, None where they are.
    """

    sizes: list[int]
    widths: list[int]
    second: Sequence[Multiply | None]
    pivoted: Sequence[bool]
    order: Tensor | None
    out_features: int

    def __call__(self, input: Tensor, first: Multiply | None) -> Tensor:
        """x (..., in) -> y (..., outputs), without a bias. `first` multiplies by all parts' rows at
        once.
        """
        if first is None:  # rank 0 throughout
            return input.new_zeros(*input.shape[:-1], self.out_features)
        if self.order is None and self.sizes == self.widths and not any(self.second):
            return first(input)  # dense throughout
        results = []
        columns = first(input).split(self.sizes, dim=-1)
        for inner, width, second, pivoted in zip(
            columns, self.widths, self.second, self.pivoted, strict=True
        ):
            if second is None or pivoted:
                results.append(inner[..., :width])
            if second is not None:
                results.append(second(inner))
        output = results[0] if len(results) == 1 else torch.cat(results, dim=-1)
        return output if self.order is None else output.index_select(-1, self.order)


def padded(factor: Tensor, rows: int, columns: int) -> Tensor:
    """The factor (n, k) with zeros, up to multiples of `rows` and `columns`."""
    n, k = factor.shape
    return pad(factor, (0, -k % columns, 0, -n % rows))


def global_order(parts: Sequence[Part]) -> Tensor | None:
    """(outputs) Where each output of the linear is in the results of all parts laid side by side;
    None where they are in order.
    """
    if not any(part.pivoted for part in parts):
        return None
    found, offset = [], 0
    for part in parts:
        first, second, order = part.first(), part.second(), part.order()
        width = second.shape[0] if second is not None else first.shape[0]
        width += first.shape[0] if part.pivoted else 0
        found.append(
            offset + (order if order is not None else torch.arange(width, device=first.device))
        )
        offset += width
    return torch.cat(found)


def spans(
    whole: Sequence[int], local: Sequence[int], index: Sequence[int], stored_as_one: bool
) -> list[list[range]]:
    """The ranges of outputs that live here, for each stored matrix.

    A linear of the server stacks matrices of `whole` outputs; of each, block number `index` of size
    `local` lives here. The checkpoint stores them one by one, or, where `stored_as_one`, as a
    single matrix with the same rows.
    """
    ranges = [range(i * size, (i + 1) * size) for size, i in zip(local, index, strict=True)]
    if not stored_as_one:
        return [[one] for one in ranges]
    starts = [sum(whole[:i]) for i in range(len(whole))]
    return [
        [
            range(start + one.start, start + one.stop)
            for start, one in zip(starts, ranges, strict=True)
        ]
    ]
