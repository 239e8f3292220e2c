"""A matrix to whole numbers of few bits, each to the nearest. In 8 bits symmetric, a scale a row;
in fewer a scale and a minimum for every group of columns, over the range of its numbers (min-max).

    8 bits:    scale = max |W| / 127.5             q = round(W / scale), -128 ... 127
    fewer:     scale = (max - min) / (2^bits - 1)  q = round((W - min) / scale), 0 ... 2^bits - 1
    symmetric: scale = -w / 2^(bits - 1)           q = round(W / scale) + 2^(bits - 1), at most
               2^bits - 1; w is the number furthest from 0, so that it becomes 0, of which there is
               one more than above the middle (llama.cpp's Q4_0 rounds so)

What is rounded is divided by the scale as stored, in the dtype of the model. `stored` lays numbers
out, these or better ones, as `grasp.core.layers.packing_grasp` says. A low-rank pair is rounded as
it is: scaling its second factor's columns against the first one's rows, which is exact, does not
lower the error (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from grasp.core.layer import is_low_rank
from grasp.core.layers.packing_grasp import (
    BITS,
    INTEGERS,
    ZEROS,
    has_zeros,
    is_grouped,
    packed,
)
from grasp.core.layers.quantized_grasp import SLICE


def rounded(
    name: str,
    matrix: Float[Tensor, "rows columns"],
    scheme: str,
    group_size: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The stored tensors of the matrix `name`, its numbers rounded to the nearest, with scales in
    `dtype`.
    """
    return in_slices(
        matrix, lambda rows: _rounded(name, rows.detach().float(), scheme, group_size, dtype)
    )


def in_slices(
    matrix: Float[Tensor, "rows columns"],
    make: Callable[[Tensor], dict[str, Tensor]],
    numbers: int = SLICE,
) -> dict[str, Tensor]:
    """What `make` makes of the rows of a matrix, so many numbers at a time: a large vocabulary is
    never there whole in floats.
    """
    parts = [make(rows) for rows in matrix.split(max(1, numbers // max(1, matrix.shape[1])))]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _rounded(
    name: str, matrix: Tensor, scheme: str, group_size: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`rounded`, of rows in float32."""
    if is_grouped(scheme):
        how = (matrix, BITS[scheme], group_size, dtype)
        numbers, scale, zero = _min_max(*how) if has_zeros(scheme) else _symmetric(*how)
        return stored(name, numbers, scale, zero, scheme)
    most = matrix.abs().amax(dim=1, keepdim=True)
    scale = (most / 127.5).clamp_min(torch.finfo(dtype).tiny).to(dtype)
    numbers = (matrix * (1 / scale.float())).round().clamp(-128, 127)
    return stored(name, numbers.to(torch.int8), scale, None, scheme)


def stored(
    name: str,
    numbers: Integer[Tensor, "rows columns"],
    scale: Float[Tensor, "rows groups"],
    zero: Float[Tensor, "rows groups"] | None,
    scheme: str,
) -> dict[str, Tensor]:
    """The stored tensors of the matrix `name` that has these whole numbers, -128 ... 127 in 8 bits
    and 0 ... 2^bits - 1 in fewer: W = scale (q - 2^(bits - 1)) + zero; `zero` is None where the
    scheme has none.

    Raises `ValueError` for numbers that the scheme does not have.
    """
    bits = BITS[scheme]
    low = 0 if is_grouped(scheme) else -128
    high = low + 2**bits - 1
    if numbers.numel() and not low <= int(numbers.min()) <= int(numbers.max()) <= high:
        raise ValueError(f"'{name}' holds numbers outside {low} ... {high}, those of {scheme}")
    if (zero is not None) != has_zeros(scheme):
        needs = "needs" if has_zeros(scheme) else "takes no"
        raise ValueError(f"'{name}': {scheme} {needs} zeros beside the scales")
    found = {name: scale.contiguous(), name + INTEGERS: packed(numbers, scheme)}
    return found if zero is None else found | {name + ZEROS: zero.contiguous()}


def _min_max(
    matrix: Float[Tensor, "rows columns"], bits: int, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(q (rows, columns), scales (rows, groups), zeros (rows, groups)); the zero is what the middle
    number, 2^(bits - 1), stands for.
    """
    x = grouped(matrix, group_size)
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(dtype).tiny)
    scale, zero = step.to(dtype), (low + step * 2 ** (bits - 1)).to(dtype)
    numbers = nearest(x, scale, zero, bits).to(torch.uint8)
    return numbers.flatten(1)[:, : matrix.shape[1]], scale[..., 0], zero[..., 0]


def _symmetric(
    matrix: Float[Tensor, "rows columns"], bits: int, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, None]:
    """(q (rows, columns), scales (rows, groups), None)."""
    x = grouped(matrix, group_size)
    scale = not_zero((furthest(x) / -(2 ** (bits - 1))).to(dtype))
    numbers = nearest(x, scale, torch.zeros_like(scale), bits).to(torch.uint8)
    return numbers.flatten(1)[:, : matrix.shape[1]], scale[..., 0], None


def furthest(x: Float[Tensor, "rows groups size"]) -> Float[Tensor, "rows groups 1"]:
    """The number of each group that is furthest from 0."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def not_zero(scale: Tensor) -> Tensor:
    """Scales of either sign, of which none is too small to divide by."""
    tiny = torch.finfo(scale.dtype).tiny
    return torch.where(scale.abs() < tiny, tiny, scale)


def grouped(
    matrix: Float[Tensor, "rows columns"], size: int, room: float | None = None
) -> Float[Tensor, "rows groups size"]:
    """The columns in groups. A short last one repeats its last column, which moves neither end of
    its range; or has `room` in it.
    """
    missing = -matrix.shape[1] % size
    if missing:
        last = matrix[:, -1:] if room is None else torch.full_like(matrix[:, -1:], room)
        matrix = torch.cat([matrix, last.expand(len(matrix), missing)], dim=1)
    return matrix.unflatten(1, (-1, size))


def nearest(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The whole numbers, as floats, whose meaning `scale (q - 2^(bits - 1)) + zero` is nearest to
    x.
    """
    step = scale.float()
    return ((x - _start(step, zero, bits)) / step).round_().clamp_(0, 2**bits - 1)


def meaning(q: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What whole numbers stand for, in float32."""
    step = scale.float()
    return q * step + _start(step, zero, bits)


def _start(step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What the number 0 stands for."""
    return zero.float() - step * 2 ** (bits - 1)


@torch.no_grad()
def matrices_of(module: Any) -> dict[str, Float[Tensor, "rows columns"]]:
    """The matrices of a linear, a pair or an embedding by name, ready to be rounded; none of a pair
    of rank 0.
    """
    if not is_low_rank(module):
        weight = module.weight.detach()
        is_stored_so = isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
        return {"weight": weight if is_stored_so else weight.T}
    if module.rank == 0:
        return {}
    return {"weight": module.weight.detach(), "weight_in": module.weight_in.detach()}
