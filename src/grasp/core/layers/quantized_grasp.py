"""Linears in 8 or 4 bits, dense or low-rank: the second file that a checkpoint carries, beside
`modeling_grasp`. It needs torch and nothing else.

A matrix W (rows, columns) called `name` ("weight", or "weight_in" for the first factor of a pair)
is stored as plain tensors:

    name          scales, float (rows, groups): a row is one group in 8 bits, `group_size` columns
                  are one in 4; the last may be shorter
    name_qdata    8 bits: int8 (rows, columns), q
                  4 bits: uint8 (rows, ceil(columns / 2)), column 2j in the low half of byte j,
                  2j + 1 in the high
    name_zero     4 bits only: float (rows, groups)

    8 bits: W = scale q, q in -128 ... 127
    4 bits: W = scale (q - 8) + zero, q in 0 ... 15

The scales bear the name of the matrix, so that a transformers that knows nothing of grasp finds a
wrong shape there and stops, where a missing tensor would have been filled with random numbers.
Every tensor is cut by rows when outputs are shared among devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from .narrow_grasp import scattered
from .reading_grasp import SCHEMES, check_kept, features, record_of

FEW_TOKENS = 8
"""Up to so many tokens the CPU's own kernels for whole-number weights are faster than a dense
product (bfloat16).
"""


class QuantizedLinear(nn.Linear):
    """`y = Wx + b`, or a low-rank pair, with its matrices in 8 or 4 bits (the module's docstring
    says how).

    `scheme`: "int8" and "int4" round the weights; "int8-dynamic" also rounds the input of each
    product to 8 bits, one scale a token. `rank` is None for a dense matrix; `pivoted` and `places`
    are as in `LowRankLinear`; `rows`, `columns`, `in_places` and `out_places` as in `NarrowLinear`.
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
            kind = (
                (torch.uint8 if scheme == "int4" else torch.int8)
                if name.endswith("_qdata")
                else dtype
            )
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
        found = {}
        for name, (rows, columns) in self.shapes.items():
            groups = -(-columns // self.group_size) if self.scheme == "int4" else 1
            found[name] = (rows, groups)
            found[f"{name}_qdata"] = (rows, -(-columns // 2) if self.scheme == "int4" else columns)
            if self.scheme == "int4":
                found[f"{name}_zero"] = (rows, groups)
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
            return linear(input, self.dequantized(name))
        if self.scheme == "int8-dynamic":
            return self._dynamic(name, input)
        rows, columns = self.shapes[name]
        few = (
            0 < input.numel() <= FEW_TOKENS * columns
            and rows
            and input.is_cpu
            and not torch.compiler.is_compiling()
        )
        if not few or input.dtype != torch.bfloat16 or getattr(self, name).dtype != torch.bfloat16:
            return linear(input, self.dequantized(name).to(input.dtype))
        flat = input.reshape(-1, columns)
        output = (
            self._int8_product(name, flat)
            if self.scheme == "int8"
            else self._int4_product(name, flat)
        )
        return output.reshape(*input.shape[:-1], rows)

    def _int8_product(self, name: str, flat: Tensor) -> Tensor:
        """x (tokens, columns) -> Wx (tokens, rows) from 8 bits. torch's kernel reads 32 columns at
        a time, past the end of a row that has fewer.
        """
        qdata, room = getattr(self, f"{name}_qdata"), -flat.shape[1] % 32
        if room and name not in self.packed:
            self.packed[name] = (pad(qdata, (0, room)), qdata)
        if room:
            qdata, flat = self.packed[name][0], pad(flat, (0, room))
        return torch._weight_int8pack_mm(flat.contiguous(), qdata, getattr(self, name).flatten())

    def _int4_product(self, name: str, flat: Tensor) -> Tensor:
        """x (tokens, columns) -> Wx (tokens, rows) from 4 bits, in the order of numbers that this
        processor's kernel likes (kept once made).
        """
        if name not in self.packed:
            (rows, _), groups = self.shapes[name], getattr(self, name).shape[1]
            room = (0, 0, 0, -rows % 16)
            whole = pad(
                self._integers(name).int(),
                (0, groups * self.group_size - self.shapes[name][1], *room[2:]),
                value=8,
            )
            scales = torch.stack(
                (pad(getattr(self, name), room), pad(getattr(self, f"{name}_zero"), room)), dim=-1
            )
            order = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.contiguous(), 1)
            self.packed[name] = (order, scales.transpose(0, 1).contiguous())
        order, scales = self.packed[name]
        whole = pad(flat, (0, scales.shape[0] * self.group_size - flat.shape[1]))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(whole, order, self.group_size, scales)[
            :, : self.shapes[name][0]
        ]

    def _dynamic(self, name: str, input: Tensor) -> Tensor:
        """Whole numbers times whole numbers, summed in int32: x is rounded to 8 bits with one scale
        a token.
        """
        (rows, columns), qdata = self.shapes[name], getattr(self, f"{name}_qdata")
        flat = input.reshape(-1, columns).float()
        peak = (
            flat.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
            if columns
            else flat.new_zeros(len(flat), 1)
        )
        whole = (flat / peak).round()
        # what torch's kernels take; on CPU (2.13) they sum a single column wrongly
        fits = (flat.is_cpu and columns > 1) or (
            flat.is_cuda and len(flat) > 16 and columns % 8 == rows % 8 == 0
        )
        sums = (
            torch._int_mm(whole.to(torch.int8), qdata.t()).float()
            if fits and flat.numel() and rows
            else whole @ qdata.float().t()
        )
        return (
            (sums * peak * getattr(self, name).flatten().float())
            .to(input.dtype)
            .reshape(*input.shape[:-1], rows)
        )

    def _integers(self, name: str) -> Tensor:
        """q (rows, columns) of a matrix in 4 bits."""
        return halves(getattr(self, f"{name}_qdata"), self.shapes[name][1])

    def dequantized(self, name: str) -> Tensor:
        """The matrix `name` (rows, columns) as the stored numbers give it, in the dtype of the
        scales.
        """
        zero = getattr(self, f"{name}_zero", None)
        return meaning(
            getattr(self, f"{name}_qdata"),
            getattr(self, name),
            zero,
            self.shapes[name][1],
            self.group_size,
        )

    def check(self, path: str) -> None:
        """Raise `ValueError` where a tensor read from the files does not have the shape and type
        that the config gives it, or is not finite.
        """
        for name, shape in self.layout().items():
            tensor, whole = getattr(self, name), name.endswith("_qdata")
            packed = torch.uint8 if self.scheme == "int4" else torch.int8
            if tuple(tensor.shape) != shape or (
                tensor.dtype != packed if whole else not tensor.dtype.is_floating_point
            ):
                raise ValueError(
                    f"'{path}.{name}' is {tensor.dtype} {tuple(tensor.shape)}, which does not fit"
                    " the quantization in config.json"
                )
            if not whole and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"'{path}.{name}' holds non-finite numbers; the checkpoint is damaged"
                )
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


def halves(packed: Tensor, columns: int) -> Tensor:
    """q (rows, columns), 0 to 15, from bytes (rows, ceil(columns / 2)) that hold two each."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]


def meaning(
    qdata: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group_size: int
) -> Tensor:
    """The matrix (rows, columns) that stored numbers stand for, in the dtype of the scales; `zero`
    is None for 8 bits.
    """
    if zero is None:
        return (qdata.float() * scale.float()).to(scale.dtype)
    wide = [t.float().repeat_interleave(group_size, dim=1)[:, :columns] for t in (scale, zero)]
    return ((halves(qdata, columns).float() - 8) * wide[0] + wide[1]).to(scale.dtype)


def quantized_like(
    old: nn.Module, scheme: str, group_size: int, device: Any = None
) -> QuantizedLinear:
    """An unfilled `QuantizedLinear` for a linear or a low-rank pair."""
    rank = getattr(old, "rank", None)
    pivoted = bool(getattr(old, "pivoted", False))
    dtype: Any = old.weight.dtype
    new = QuantizedLinear(
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


def check_record(path: str, record: dict[str, Any]) -> None:
    """Raise `ValueError` for a record that makes no sense."""
    scheme, size = record.get("scheme"), record.get("group_size")
    if scheme not in SCHEMES:
        raise ValueError(
            f"config.json: the quantization scheme {scheme!r} of '{path}' is unknown; known are"
            f" {', '.join(SCHEMES)}"
        )
    if type(size) is not int or size < 1:
        raise ValueError(
            f"config.json: the group_size {size!r} of '{path}' must be a whole number, 1 or more"
        )


def place(path: str, old: nn.Module, record: dict[str, Any]) -> QuantizedLinear:
    """The quantized linear that a record describes, without memory."""
    return quantized_like(old, record["scheme"], record["group_size"], "meta")
