"""A linear that keeps some of the inputs or outputs of the matrix it replaces.

A file that a checkpoint carries: it needs torch and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .reading_grasp import check_floats, check_kept, check_shape, features, record_of


class NarrowLinear(nn.Linear):
    """`y = Wx + b` on the inputs and outputs that are left of a wider matrix.

    `weight` (rows, columns), `bias` (rows) or None. Where the code around it can do with fewer
    numbers (the inner channels of an MLP) they are simply fewer. Where it cannot, the width stays:
    with `out_places` (rows), output i goes to place `out_places[i]` of `out_features`, and the
    others are 0; with `in_places` (columns) only those of the `in_features` inputs are read.
    """

    in_places: Any  # int32 (columns), or None
    out_places: Any  # int32 (rows), or None
    of: dict[str, Any] | None = None  # record of the module that this one replaced

    def __init__(
        self,
        in_features: int,
        out_features: int,
        columns: int,
        rows: int,
        bias: bool,
        device: Any = None,
        dtype: Any = None,
    ):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.columns = columns
        self.rows = rows
        self.weight = nn.Parameter(
            torch.empty(rows, columns, device=device, dtype=dtype), requires_grad=False
        )
        vector = torch.empty(rows, device=device, dtype=dtype) if bias else None
        self.register_parameter(
            "bias", None if vector is None else nn.Parameter(vector, requires_grad=False)
        )
        for name, kept, width in (
            ("in_places", columns, in_features),
            ("out_places", rows, out_features),
        ):
            places = torch.empty(kept, device=device, dtype=torch.int32) if kept < width else None
            self.register_buffer(name, places)

    @property
    def is_plain(self) -> bool:
        """Whether it is an ordinary linear, only smaller."""
        return self.in_places is None and self.out_places is None

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) -> y (..., out_features)."""
        if self.in_places is not None:
            input = input.index_select(-1, self.in_places)
        output = linear(input, self.weight, self.bias)  # ..., rows
        return scattered(output, self.out_places, self.out_features)

    def record(self) -> dict[str, Any]:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        found: dict[str, Any] = {"kind": "narrow", "rows": self.rows, "columns": self.columns}
        found |= {"scattered": True} if self.out_places is not None else {}
        found |= {"gathered": True} if self.in_places is not None else {}
        return found | ({"of": self.of} if self.of else {})

    def check(self, path: str) -> None:
        """Raise `ValueError` where a weight that was read is of another shape or type."""
        check_floats(path, weight=self.weight, bias=self.bias)
        check_shape(path, self.weight, (self.rows, self.columns))
        for name, width in (("in_places", self.in_features), ("out_places", self.out_features)):
            if getattr(self, name) is not None:
                check_kept(f"{path}.{name}", getattr(self, name), width)

    def reset_parameters(self) -> None:
        """There is nothing to initialise: the numbers always come from a matrix or a checkpoint."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" rows={self.rows}, columns={self.columns}, bias={self.bias is not None}"
        )


def scattered(output: Tensor, places: Tensor | None, width: int) -> Tensor:
    """y (..., rows) at its `places` among `width` zeros; y itself where there are no places."""
    if places is None:
        return output
    whole = output.new_zeros(*output.shape[:-1], width)
    return whole.index_copy(-1, places.long(), output)


def narrow_like(
    old: nn.Module,
    rows: int,
    columns: int,
    scattered: bool,
    gathered: bool,
    device: Any = None,
) -> NarrowLinear:
    """An unfilled `NarrowLinear` with the bias and dtype of `old`; `scattered`, `gathered`: it
    keeps the width of its outputs, of its inputs.
    """
    fan_in, fan_out = features(old)
    new = NarrowLinear(
        fan_in if gathered else columns,
        fan_out if scattered else rows,
        columns,
        rows,
        old.bias is not None,
        device,
        old.weight.dtype,
    )
    # narrowed again: the record of the narrower one says it all
    ours = type(old).__name__ == "NarrowLinear"
    again = ours and not gathered and _gaps(old) == _gaps(new)
    new.of = old.of if again else record_of(old)  # type: ignore[assignment]
    return new


def _gaps(linear: Any) -> tuple[bool, bool]:
    """Whether its inputs, its outputs keep a width that it does not have itself."""
    return linear.in_places is not None, linear.out_places is not None


def check_record(path: str, record: dict[str, Any]) -> None:
    """Raise `ValueError` for a record that makes no sense."""
    for name in ("rows", "columns"):
        if type(record.get(name)) is not int or record[name] < 0:
            raise ValueError(
                f"config.json: the {name} of '{path}' are {record.get(name)!r}; they must be a"
                " whole number, 0 or more"
            )
    for name in ("scattered", "gathered"):
        if type(record.get(name, False)) is not bool:
            raise ValueError(f"config.json: '{name}' of '{path}' must be true or false")


def place(path: str, old: nn.Module, record: dict[str, Any]) -> NarrowLinear:
    """The linear that a record describes, without memory. Raises `ValueError`."""
    rows, columns = record["rows"], record["columns"]
    fan_in, fan_out = features(old)
    if rows > fan_out or columns > fan_in:
        raise ValueError(
            f"config.json gives '{path}' {rows} x {columns} numbers, but the matrix it replaces has"
            f" only {fan_out} x {fan_in}"
        )
    scattered = record.get("scattered", False)
    gathered = record.get("gathered", False)
    return narrow_like(old, rows, columns, scattered, gathered, "meta")
