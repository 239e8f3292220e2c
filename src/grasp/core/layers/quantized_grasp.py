"""Linears in few bits, dense or low-rank: how they multiply. How their matrices are stored, says
`packing_grasp`. A file that a checkpoint carries: it needs torch and transformers and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from .narrow_grasp import scattered
from .packing_grasp import (
    DYNAMIC,
    INTEGERS,
    SYMMETRIC,
    ZEROS,
    aligned,
    check_stored,
    dequantized,
    integer_dtype,
    is_aligned,
    layout,
    unpacked,
)
from .reading_grasp import check_kept, features, record_of

FEW_TOKENS = 8
"""Up to so many tokens the CPU's own kernels for whole-number weights are faster than a dense
product (bfloat16); where it is slow in bfloat16, at any number (`slow_in_bfloat16`).
"""
SLICE = 1 << 25
"""Numbers of a matrix that are there in floating point at a time: more are made in slices of rows
(the head of a large vocabulary).
"""


def of_this_processor(ask: Callable[[], bool]) -> Callable[[], bool]:
    """`ask`, once a process; a constant to `torch.compile`."""
    asked = cache(ask)

    @wraps(ask)
    def told() -> bool:
        return asked()

    return torch.compiler.assume_constant_result(told)


@of_this_processor
def slow_in_bfloat16() -> bool:
    """Whether this processor has AVX2 or AVX512, which those kernels use, but no units for products
    in bfloat16.
    """
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx2")) and not (able.get("avx512_bf16") or able.get("amx_bf16"))


@of_this_processor
def sums_are_exact() -> bool:
    """Whether torch's product of whole numbers is exact on this CPU. torch asks whether the
    processor has VNNI, oneDNN beneath it what it may use (`ONEDNN_MAX_CPU_ISA`); without VNNI it
    sums pairs in 16 bits, which are too few.
    """
    largest = torch.full((8, 64), 127, dtype=torch.int8)
    return all(
        bool((torch._int_mm(largest[:tokens], largest.t()) == 64 * 127**2).all())
        for tokens in (1, 8)
    )


class QuantizedLinear(nn.Linear):
    """`y = Wx + b`, or a low-rank pair, with its matrices in few bits.

    `scheme`: one of `packing_grasp.BITS`; "int8-dynamic" also rounds the input of each product to 8
    bits, one scale a token. `rank` is None for a dense matrix; `pivoted` and `places` are as in
    `LowRankLinear`; `rows`, `columns`, `in_places` and `out_places` as in `NarrowLinear`.
    `replaced` is the class it stands for.
    """

    places: Any  # int32 (out_features), or None
    in_places: Any  # int32 (columns), or None
    out_places: Any  # int32 (rows), or None
    of: dict[str, Any] | None = None  # record of the module that this one replaced

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: str,
        group_size: int,
        rank: int | None = None,
        pivoted: bool = False,
        replaced: type[nn.Module] = nn.Linear,
        device: Any = None,
        dtype: Any = None,
        rows: int | None = None,
        columns: int | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.pivoted = pivoted
        self.scheme, self.group_size, self.replaced = scheme, group_size, replaced
        self.packed: dict[str, tuple[Tensor, Tensor]] = {}
        self.rows = out_features if rows is None else rows
        self.columns = in_features if columns is None else columns
        self.shapes = (
            {"weight": (self.rows, self.columns)}
            if rank is None
            else {
                "weight": (out_features - rank if pivoted else out_features, rank),
                "weight_in": (rank, in_features),
            }
        )
        for name, shape in self.layout().items():
            kind = integer_dtype(scheme) if name.endswith(INTEGERS) else dtype
            self.register_parameter(
                name,
                nn.Parameter(torch.empty(shape, device=device, dtype=kind), requires_grad=False),
            )
        vector = (
            nn.Parameter(torch.empty(self.rows, device=device, dtype=dtype), requires_grad=False)
            if bias
            else None
        )
        self.register_parameter("bias", vector)
        for name, length in (
            ("places", out_features if pivoted else None),
            ("in_places", self.columns if self.columns < in_features else None),
            ("out_places", self.rows if self.rows < out_features else None),
        ):
            empty = None if length is None else torch.empty(length, device=device, dtype=torch.int)
            self.register_buffer(name, empty)

    def layout(self) -> dict[str, tuple[int, int]]:
        """Shape of every stored tensor of the matrices."""
        found: dict[str, tuple[int, int]] = {}
        for name, (rows, columns) in self.shapes.items():
            found |= layout(name, rows, columns, self.scheme, self.group_size)
        return found

    def num_parameters(self) -> int:
        """Numbers that the matrices and the bias stand for, however few bits each takes."""
        return sum(rows * columns for rows, columns in self.shapes.values()) + (
            0 if self.bias is None else self.rows
        )

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) -> y (..., out_features)."""
        if self.in_places is not None:
            input = input.index_select(-1, self.in_places)
        if self.rank is None:
            output = self.times("weight", input)
        else:
            inner = self.times("weight_in", input)
            output = self.times("weight", inner)
            if self.places is not None:
                output = torch.cat((inner, output), dim=-1).index_select(-1, self.places)
        output = output if self.bias is None else output + self.bias
        return scattered(output, self.out_places, self.out_features)

    def times(self, name: str, input: Tensor) -> Tensor:
        """x (..., columns) -> Wx (..., rows) for the matrix `name`."""
        if torch.is_grad_enabled() and input.requires_grad:
            # a gradient passes as if nothing were rounded on the way
            return self._dense(name, input)
        if self.scheme == DYNAMIC:
            return self._dynamic(name, input)
        kernel = {
            "int8": self._int8_product,
            "int4": self._int4_product,
            SYMMETRIC: self._int4_product,
        }.get(self.scheme)
        rows, columns = self.shapes[name]
        fast = (
            input.numel()
            and (input.numel() <= FEW_TOKENS * columns or slow_in_bfloat16())
            and rows
            and input.is_cpu
            and not torch.compiler.is_compiling()
            and input.dtype == getattr(self, name).dtype == torch.bfloat16
        )
        if kernel is None or not fast:
            return self._dense(name, input)
        return kernel(name, input.reshape(-1, columns)).reshape(*input.shape[:-1], rows)

    def _dense(self, name: str, input: Tensor) -> Tensor:
        """x (..., columns) -> Wx (..., rows) by the matrix as the stored numbers give it, which is
        made in slices of rows and dropped.
        """
        rows, columns = self.shapes[name]
        step = max(1, SLICE // max(1, columns))
        parts = [
            linear(input, self.dequantized(name, slice(start, start + step)).to(input.dtype))
            for start in range(0, max(1, rows), step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _int8_product(self, name: str, flat: Tensor) -> Tensor:
        """x (tokens, columns) -> Wx (tokens, rows) from 8 bits. torch's kernel reads 32 columns at
        a time, past the end of a row that has fewer, and ends the process where numbers do not
        begin at a multiple of 16 bytes, as those that lie in a file may not.
        """
        qdata, room = getattr(self, f"{name}_qdata"), -flat.shape[1] % 32
        if room or not is_aligned(qdata):
            if name not in self.packed:
                self.packed[name] = (aligned(pad(qdata, (0, room))), qdata)
            qdata, flat = self.packed[name][0], pad(flat, (0, room))
        scale = getattr(self, name).flatten()
        return torch._weight_int8pack_mm(aligned(flat), qdata, aligned(scale))

    def _int4_product(self, name: str, flat: Tensor) -> Tensor:
        """x (tokens, columns) -> Wx (tokens, rows) from 4 bits, in the order of numbers that this
        processor's kernel likes (kept once made).
        """
        if name not in self.packed:
            (rows, columns), groups = self.shapes[name], getattr(self, name).shape[1]
            room = (0, 0, 0, -rows % 16)
            whole = pad(
                unpacked(getattr(self, name + INTEGERS), self.scheme, columns).int(),
                (0, groups * self.group_size - columns, *room[2:]),
                value=8,
            )
            scale = getattr(self, name)
            zero = getattr(self, name + ZEROS, None)
            zero = torch.zeros_like(scale) if zero is None else zero
            scales = torch.stack((pad(scale, room), pad(zero, room)), dim=-1)
            order = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.contiguous(), 1)
            self.packed[name] = (order, scales.transpose(0, 1).contiguous())
        order, scales = self.packed[name]
        whole = aligned(pad(flat, (0, scales.shape[0] * self.group_size - flat.shape[1])))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(whole, order, self.group_size, scales)[
            :, : self.shapes[name][0]
        ]

    def _dynamic(self, name: str, input: Tensor) -> Tensor:
        """Whole numbers times whole numbers, summed in int32: x is rounded to 8 bits with one scale
        a token.
        """
        (rows, columns), qdata = self.shapes[name], getattr(self, f"{name}_qdata")
        flat = input.reshape(-1, columns).float()
        whole, scale = whole_tokens(flat)
        # what torch's kernels take; on CPU (2.13) they sum a single column wrongly
        fits = (flat.is_cpu and columns > 1 and sums_are_exact()) or (
            flat.is_cuda and len(flat) > 16 and columns % 8 == rows % 8 == 0
        )
        sums = (
            torch._int_mm(whole.to(torch.int8), qdata.t()).float()
            if fits and flat.numel() and rows
            else whole @ qdata.float().t()
        )
        return (
            (sums * scale * getattr(self, name).flatten().float())
            .to(input.dtype)
            .reshape(*input.shape[:-1], rows)
        )

    def dequantized(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The matrix `name` (rows, columns), or these rows of it, as the stored numbers give it, in
        the dtype of the scales.
        """
        return dequantized(
            *stored_rows(self, name, rows), self.scheme, self.shapes[name][1], self.group_size
        )

    def check(self, path: str) -> None:
        """Raise `ValueError` where a tensor read from the files does not have the shape and type
        that the config gives it, or is not finite.
        """
        for name, shape in self.layout().items():
            check_stored(f"{path}.{name}", getattr(self, name), shape, self.scheme)
        for name, width in (("in_places", self.in_features), ("out_places", self.out_features)):
            if getattr(self, name) is not None:
                check_kept(f"{path}.{name}", getattr(self, name), width)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.packed = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.packed = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": {}}

    def record(self) -> dict[str, Any]:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        found = {"kind": "quantized", "scheme": self.scheme, "group_size": self.group_size}
        return found | ({"of": self.of} if self.of else {})

    def reset_parameters(self) -> None:
        """There is nothing sensible to initialise: the numbers always come from a matrix or a
        checkpoint.
        """

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank},"
            f" scheme={self.scheme}, group_size={self.group_size}"
        )


def whole_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens x (tokens, columns) as x = scale q: (q, -127 ... 127 as floats; scales (tokens, 1), of
    each token its largest number / 127).
    """
    if not x.shape[1]:
        return x, x.new_zeros(len(x), 1)
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / scale).round(), scale


def stored_rows(
    module: Any, name: str, rows: slice | Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(whole numbers, scales, zeros or None) of these rows of the matrix `name` of a module."""
    zero = getattr(module, name + ZEROS, None)
    qdata, scale = getattr(module, name + INTEGERS)[rows], getattr(module, name)[rows]
    return qdata, scale, None if zero is None else zero[rows]


def quantized_like(
    old: nn.Module,
    scheme: str,
    group_size: int,
    device: Any = None,
    kind: type[QuantizedLinear] = QuantizedLinear,
) -> QuantizedLinear:
    """An unfilled `QuantizedLinear`, or `kind` of it, for a linear or a low-rank pair."""
    rank = getattr(old, "rank", None)
    pivoted = bool(getattr(old, "pivoted", False))
    dtype: Any = old.weight.dtype
    new = kind(
        *features(old),
        old.bias is not None,
        scheme,
        group_size,
        rank,
        pivoted,
        type(old),
        device,
        dtype,
        getattr(old, "rows", None),
        getattr(old, "columns", None),
    )
    new.of = record_of(old)
    return new
