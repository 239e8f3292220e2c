"""A matrix to whole numbers, through torchao: round to nearest, symmetric in 8 bits a row, with a
minimum a group in 4 bits.

The numbers go into the layout of `grasp.core.quantized_grasp`. A low-rank pair is rounded as it is:
scaling its second factor's columns against the first one's rows, which is exact, does not lower the
error (docs/log.md).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.core.extras import need


def torchao() -> ModuleType:
    """torchao's primitives. Raises `RecipeError` where it is not installed."""
    need("grasp quantize", "quantize", "torchao")
    from torchao.quantization import quant_primitives

    return quant_primitives


def rounded(
    name: str,
    matrix: Float[Tensor, "rows columns"],
    scheme: str,
    group_size: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The stored tensors of the matrix `name`, with scales in `dtype`: what is rounded is divided
    by the scale as stored.
    """
    ao, matrix = torchao(), matrix.detach().float()
    rows, columns = matrix.shape
    if scheme != "int4":
        # torchao takes a single column's scales over all rows
        matrix = matrix.repeat(1, 2) if columns == 1 else matrix
        block, low, high = (1, matrix.shape[1]), -128, 127
        scale, zero = ao.choose_qparams_affine(
            matrix,
            ao.MappingType.SYMMETRIC,
            block,
            torch.int8,
            low,
            high,
            eps=torch.finfo(dtype).tiny,
            scale_dtype=dtype,
            zero_point_dtype=torch.int8,
        )
        whole = ao.quantize_affine(matrix, block, scale.float(), zero, torch.int8, low, high)
        return {name: scale.reshape(rows, 1), f"{name}_qdata": whole[:, :columns].contiguous()}
    groups = -(-columns // group_size)
    # a short last group: repeating a number moves neither end of its range
    room = matrix[:, -1:].expand(rows, groups * group_size - columns)
    block, whole = (1, group_size), torch.cat((matrix, room), dim=1)
    scale, zero = ao._choose_qparams_affine_tinygemm(
        whole,
        ao.MappingType.ASYMMETRIC,
        block,
        torch.int32,
        0,
        15,
        torch.finfo(dtype).tiny,
        dtype,
        dtype,
    )
    scale, zero = scale.reshape(rows, groups), zero.reshape(rows, groups)
    numbers = ao._quantize_affine_tinygemm(
        whole, block, scale.float(), zero.float(), torch.int32, 0, 15
    )[:, :columns]
    return {name: scale, f"{name}_qdata": packed(numbers), f"{name}_zero": zero}


def packed(numbers: Any) -> Tensor:
    """Integers 0 ... 15 (rows, columns) -> uint8 (rows, ceil(columns / 2)), an even column in the
    low half of its byte.
    """
    even = torch.nn.functional.pad(numbers.to(torch.uint8), (0, numbers.shape[1] % 2))
    return even[:, ::2] | (even[:, 1::2] << 4)
