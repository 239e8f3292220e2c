"""Whole numbers of few bits in bytes, and the matrices that they stand for.

A file that a checkpoint carries: it needs torch and nothing else. A matrix W (rows, columns) called
`name` is stored as plain tensors:

    name          scales, float (rows, groups): a row is one group in 8 bits, `group_size` columns
                  are one in fewer; the last may be shorter
    name_qdata    the whole numbers q: int8 (rows, columns) in 8 bits, else uint8 (rows, bytes)
    name_zero     fewer than 8 bits only, and not where symmetric: float (rows, groups)

    8 bits:    W = scale q, q in -128 ... 127
    fewer:     W = scale (q - 2^(bits - 1)) + zero, q in 0 ... 2^bits - 1
    symmetric: W = scale (q - 2^(bits - 1)); a scale may be negative

The bytes of a row. 4 bits: column 2j in the low half of byte j, 2j + 1 in the high. Other widths
are cut into pieces of 4, 2 and 1 bits, which divide a byte (`PIECES`, the lowest bits first), each
in bytes of its own behind those of the one before. A piece of p bits takes n = ceil(columns p / 8)
bytes; column j is in byte j mod n, at bit p floor(j / n). So what unpacks is a few shifts of whole
rows, laid side by side.

The scales bear the name of the matrix, so that a transformers that knows nothing of grasp finds a
wrong shape there and stops, where a missing tensor would have been filled with random numbers.
Every tensor is cut by rows when outputs are shared among devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

DYNAMIC = "int8-dynamic"
"""8 bits, and the input of each product in 8 bits too."""
SYMMETRIC = "int4-symmetric"
"""4 bits without a zero."""
BITS = {"int8": 8, DYNAMIC: 8, "int6": 6, "int5": 5, "int4": 4, SYMMETRIC: 4, "int3": 3}
"""Scheme -> bits a weight."""
PIECES = {6: (4, 2), 5: (4, 1), 3: (2, 1)}
"""Bits -> the pieces that a number is stored in."""
SCALES, INTEGERS, ZEROS = "", "_qdata", "_zero"
"""What the names of the stored tensors end in."""


def is_grouped(scheme: str) -> bool:
    """Whether the scheme has a scale for every group of columns."""
    return BITS[scheme] < 8


def has_zeros(scheme: str) -> bool:
    """Whether the scheme has a zero beside every scale."""
    return is_grouped(scheme) and scheme != SYMMETRIC


def num_groups(scheme: str, columns: int, group_size: int) -> int:
    """Scales of a row."""
    return -(-columns // group_size) if is_grouped(scheme) else 1


def num_bytes(scheme: str, columns: int) -> int:
    """Bytes of the whole numbers of a row."""
    bits = BITS[scheme]
    return sum(-(-columns * piece // 8) for piece in PIECES.get(bits, (bits,)))


def layout(
    name: str, rows: int, columns: int, scheme: str, group_size: int
) -> dict[str, tuple[int, int]]:
    """Shapes of the stored tensors of a matrix (rows, columns)."""
    groups = num_groups(scheme, columns, group_size)
    found = {name: (rows, groups), name + INTEGERS: (rows, num_bytes(scheme, columns))}
    return found | ({name + ZEROS: (rows, groups)} if has_zeros(scheme) else {})


def integer_dtype(scheme: str) -> torch.dtype:
    """What the whole numbers are stored in."""
    return torch.uint8 if is_grouped(scheme) else torch.int8


ALIGNED = 64
"""Bytes, at multiples of which torch's own tensors begin."""


def is_aligned(x: Tensor) -> bool:
    """Whether the numbers begin where torch's kernels expect it. Those in a file may not."""
    return x.data_ptr() % ALIGNED == 0


def aligned(x: Tensor) -> Tensor:
    """The same numbers, contiguous and where torch's kernels expect them."""
    x = x.contiguous()
    return x if is_aligned(x) else x.clone()


def packed(numbers: Tensor, scheme: str) -> Tensor:
    """q (rows, columns) -> the bytes (rows, bytes) that hold them."""
    bits, columns = BITS[scheme], numbers.shape[1]
    if bits == 8:
        return numbers.to(torch.int8).contiguous()
    numbers = numbers.to(torch.uint8)
    if bits == 4:
        even = pad(numbers, (0, columns % 2))
        return even[:, ::2] | (even[:, 1::2] << 4)
    found, low = [], 0
    for piece in PIECES[bits]:
        length, mask = -(-columns * piece // 8), (1 << piece) - 1
        slots = pad((numbers >> low) & mask, (0, length * (8 // piece) - columns))
        row = torch.zeros_like(slots[:, :length])
        for place, slot in enumerate(slots.split(length, dim=1) if length else ()):
            row |= slot << (piece * place)
        found.append(row)
        low += piece
    return torch.cat(found, dim=1)


def unpacked(qdata: Tensor, scheme: str, columns: int) -> Tensor:
    """The bytes of `packed` -> q (rows, columns)."""
    bits = BITS[scheme]
    if bits == 8:
        return qdata
    if bits == 4:
        return torch.stack((qdata & 15, qdata >> 4), dim=-1).flatten(1)[:, :columns]
    found, low, start = [], 0, 0
    for piece in PIECES[bits]:
        length, mask = -(-columns * piece // 8), ((1 << piece) - 1) << low
        row = qdata[:, start : start + length]
        slots = [_moved(row, low - place) & mask for place in range(0, 8, piece)]
        found.append(torch.cat(slots, dim=1)[:, :columns])
        low, start = low + piece, start + length
    return found[0] | found[1]


def _moved(row: Tensor, places: int) -> Tensor:
    """Bits moved up by so many places, or down where it is negative."""
    return row << places if places > 0 else row >> -places


def dequantized(
    qdata: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, columns: int, group_size: int
) -> Tensor:
    """The matrix (rows, columns) that the stored numbers stand for, in the dtype of the scales;
    `zero` is None where the scheme has none.
    """
    if not is_grouped(scheme):
        return (qdata.float() * scale.float()).to(scale.dtype)
    whole = unpacked(qdata, scheme, columns).float() - 2 ** (BITS[scheme] - 1)
    groups = scale.shape[1]
    room = groups * group_size - columns
    grouped = (pad(whole, (0, room)) if room else whole).unflatten(1, (groups, group_size))
    wide = grouped * scale.float()[..., None]
    wide = wide if zero is None else wide + zero.float()[..., None]
    return wide.flatten(1)[:, :columns].to(scale.dtype)


def check_stored(path: str, tensor: Tensor, shape: tuple[int, int], scheme: str) -> None:
    """Raise `ValueError` where a stored tensor, called `path`, does not have the shape and type
    that the config gives it, or is not finite.
    """
    is_whole = path.endswith(INTEGERS)
    fits = tensor.dtype == integer_dtype(scheme) if is_whole else tensor.is_floating_point()
    if tuple(tensor.shape) != shape or not fits:
        raise ValueError(
            f"'{path}' is {tensor.dtype} {tuple(tensor.shape)}, which does not fit the"
            f" quantization in config.json ({scheme}: {shape})"
        )
    if not is_whole and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"'{path}' holds non-finite numbers; the checkpoint is damaged")


def check_record(path: str, record: dict[str, Any]) -> None:
    """Raise `ValueError` for a record that makes no sense."""
    scheme, size = record.get("scheme"), record.get("group_size")
    if scheme not in BITS:
        raise ValueError(
            f"config.json: the quantization scheme {scheme!r} of '{path}' is unknown; known are"
            f" {', '.join(BITS)}"
        )
    if type(size) is not int or size < 1:
        raise ValueError(
            f"config.json: the group_size {size!r} of '{path}' must be a whole number, 1 or more"
        )
