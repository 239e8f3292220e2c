"""Products with matrices in few bits as they are stored, by torch's kernels for CPU. Plain torch.

8 bits have a kernel. 4 bits have one for groups of 32, 64, 128 and 256 columns, and 3 bits use it:
with `scale (q - 4) + zero = scale ((q + 4) - 8) + zero` they are numbers of 4 bits. 6 and 5 have
none. Only bfloat16 is fast there (AVX2 and AVX512); other types run ten times slower than a dense
product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from grasp.core.layers.packing_grasp import BITS, aligned, is_grouped
from grasp.serving.stored import Stored

GROUPS = (32, 64, 128, 256)
"""Columns a group that the kernel for 4 bits takes."""


def has_kernel(scheme: str, group_size: int) -> bool:
    """Whether matrices stored so can be multiplied as they are, on CPU."""
    bits = BITS[scheme]
    return bits == 8 or (bits in (4, 3) and group_size in GROUPS)


class AtWidth(nn.Module):
    """x (..., columns) -> Wx (..., rows) in `dtype`, on CPU. x may have more columns, of zeros, up
    to the next multiple of 32.
    """

    def __init__(self, matrix: Stored, dtype: torch.dtype):
        super().__init__()
        self.rows, columns = matrix.shape
        self.group_size = matrix.group_size
        self.grouped = is_grouped(matrix.scheme)
        if not self.grouped:
            # the kernel reads 32 columns at a time
            numbers = aligned(pad(matrix.qdata, (0, -columns % 32)))
            scales = matrix.scale.flatten()
            self.columns = numbers.shape[1]
        else:
            self.columns = matrix.scale.shape[1] * matrix.group_size
            rows = (0, 0, 0, -self.rows % 16)
            up = 8 - 2 ** (BITS[matrix.scheme] - 1)  # from this width's middle to that of 4 bits
            whole = pad(matrix.numbers().int() + up, (0, self.columns - columns, *rows[2:]))
            numbers = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
            zero = torch.zeros_like(matrix.scale) if matrix.zero is None else matrix.zero
            pairs = torch.stack((pad(matrix.scale, rows), pad(zero, rows)), dim=-1)
            scales = pairs.transpose(0, 1)
        self.numbers = nn.Parameter(numbers.contiguous(), requires_grad=False)
        self.scales = nn.Parameter(scales.to(dtype).contiguous(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, input.shape[-1])
        room = self.columns - flat.shape[1]
        flat = (pad(flat, (0, room)) if room else flat).contiguous()
        if self.grouped:
            output = torch.ops.aten._weight_int4pack_mm_for_cpu(
                flat, self.numbers, self.group_size, self.scales
            )[:, : self.rows]
        else:
            output = torch._weight_int8pack_mm(flat, self.numbers, self.scales)
        return output.reshape(*input.shape[:-1], self.rows)
