"""A matrix to whole numbers of few bits, each to the nearest. In 8 bits symmetric, a scale a row;
in fewer a scale and a minimum for every group of columns, over the range of its numbers (min-max).

    8 bits:  scale = max |W| / 127.5             q = round(W / scale), -128 ... 127
    fewer:   scale = (max - min) / (2^bits - 1)  q = round((W - min) / scale), 0 ... 2^bits - 1

What is rounded is divided by the scale as stored, in the dtype of the model. `stored` lays numbers
out, these or better ones, as `grasp.core.layers.packing_grasp` says. A low-rank pair is rounded as
it is: scaling its second factor's columns against the first one's rows, which is exact, does not
lower the error (docs/log.md).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from grasp.core.layers.packing_grasp import BITS, INTEGERS, ZEROS, is_grouped, packed
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
    step = max(1, SLICE // max(1, matrix.shape[1]))
    if len(matrix) > step:  # of a large vocabulary
        parts = [rounded(name, rows, scheme, group_size, dtype) for rows in matrix.split(step)]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    matrix = matrix.detach().float()
    if is_grouped(scheme):
        numbers, scale, zero = _min_max(matrix, BITS[scheme], group_size, dtype)
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
    (`zero` is None) and 0 ... 2^bits - 1 in fewer: W = scale (q - 2^(bits - 1)) + zero.

    Raises `ValueError` for numbers that the scheme does not have.
    """
    bits = BITS[scheme]
    low = 0 if is_grouped(scheme) else -128
    high = low + 2**bits - 1
    if numbers.numel() and not low <= int(numbers.min()) <= int(numbers.max()) <= high:
        raise ValueError(f"'{name}' holds numbers outside {low} ... {high}, those of {scheme}")
    if (zero is not None) != is_grouped(scheme):
        needs = "needs" if is_grouped(scheme) else "takes no"
        raise ValueError(f"'{name}': {scheme} {needs} zeros beside the scales")
    found = {name: scale.contiguous(), name + INTEGERS: packed(numbers, scheme)}
    return found if zero is None else found | {name + ZEROS: zero.contiguous()}


def _min_max(
    matrix: Float[Tensor, "rows columns"], bits: int, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(q (rows, columns), scales (rows, groups), zeros (rows, groups)); the zero is what the middle
    number, 2^(bits - 1), stands for.
    """
    rows, columns = matrix.shape
    groups = -(-columns // group_size)
    # a short last group: repeating a number moves neither end of its range
    room = matrix[:, -1:].expand(rows, groups * group_size - columns)
    grouped = torch.cat((matrix, room), dim=1).unflatten(1, (groups, group_size))
    low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
    middle = 2 ** (bits - 1)
    step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(dtype).tiny)
    scale, zero = step.to(dtype), (low + step * middle).to(dtype)
    start = zero.float() - scale.float() * middle
    numbers = ((grouped - start[..., None]) / scale.float()[..., None]).round()
    return numbers.clamp(0, 2**bits - 1).to(torch.uint8).flatten(1)[:, :columns], scale, zero
