"""A matrix in few bits as its checkpoint stores it: slices of it, and several one below the other.
Plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from grasp.core.layers.packing_grasp import dequantized, is_grouped, packed, unpacked


@dataclass(frozen=True)
class Stored:
    """The stored tensors of a matrix, or of some of its rows and columns (`packing_grasp`)."""

    qdata: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: str
    columns: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.qdata.shape[0], self.columns

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    def __getitem__(self, rows: Tensor) -> Stored:
        """The rows with these numbers."""
        zero = None if self.zero is None else self.zero[rows]
        return replace(self, qdata=self.qdata[rows], scale=self.scale[rows], zero=zero)

    def to(self, device: torch.device, dtype: torch.dtype) -> Stored:
        """On a device, with scales of a type."""
        zero = None if self.zero is None else self.zero.to(device, dtype)
        return replace(
            self, qdata=self.qdata.to(device), scale=self.scale.to(device, dtype), zero=zero
        )

    def numbers(self) -> Tensor:
        """The whole numbers (rows, columns)."""
        return unpacked(self.qdata, self.scheme, self.columns)

    def dequantized(self) -> Tensor:
        """The matrix (rows, columns), in the type of the scales."""
        return dequantized(
            self.qdata, self.scale, self.zero, self.scheme, self.columns, self.group_size
        )


Matrix = Tensor | Stored


def columns_of(matrix: Matrix, columns: range) -> Matrix:
    """These columns; in floating point where they cut through a group."""
    if isinstance(matrix, Tensor):
        return matrix[:, columns.start : columns.stop].contiguous()
    if columns == range(matrix.columns):
        return matrix
    scale, zero = matrix.scale, matrix.zero
    if is_grouped(matrix.scheme):
        size = matrix.group_size
        if columns.start % size or (columns.stop % size and columns.stop < matrix.columns):
            return columns_of(matrix.dequantized(), columns)
        groups = slice(columns.start // size, -(-columns.stop // size))
        scale, zero = scale[:, groups], None if zero is None else zero[:, groups]
    qdata = packed(matrix.numbers()[:, columns.start : columns.stop], matrix.scheme)
    return replace(matrix, qdata=qdata, scale=scale, zero=zero, columns=len(columns))


def with_rows(matrix: Matrix, multiple: int) -> Matrix:
    """With rows of zeros below, up to a multiple."""
    room = (0, 0, 0, -matrix.shape[0] % multiple)
    if isinstance(matrix, Tensor):
        return pad(matrix, room)
    zero = None if matrix.zero is None else pad(matrix.zero, room)
    return replace(matrix, qdata=pad(matrix.qdata, room), scale=pad(matrix.scale, room), zero=zero)


def kind(matrix: Matrix) -> tuple[str, int] | None:
    """What matrices must share to be multiplied as one."""
    return None if isinstance(matrix, Tensor) else (matrix.scheme, matrix.group_size)


def joined(matrices: Sequence[Matrix]) -> Matrix:
    """Matrices of one kind, one below the other."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat([one for one in matrices if isinstance(one, Tensor)])
    below = [one for one in matrices if isinstance(one, Stored)]
    zeros = [one.zero for one in below if one.zero is not None]
    return replace(
        first,
        qdata=torch.cat([one.qdata for one in below]),
        scale=torch.cat([one.scale for one in below]),
        zero=torch.cat(zeros) if zeros else None,
    )
