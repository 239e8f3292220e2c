"""A model whose hidden size is smaller (SliceGPT, arXiv 2401.15024), part by part.

Between two blocks the hidden states live in a basis of their own, of fewer dimensions. Linears,
embeddings and head are the ordinary ones, with fewer rows or columns. Three things are new:

- a norm without a weight, which divides by the root of the mean square over the hidden size that
  the model had: what was cut off counts as 0, not as absent (`RootNorm`);
- in each layer, a matrix a block that carries the residual stream from the block's basis into the
  next (`SlicedLayer`);
- a head of its own, where it was the embedding's matrix.

A file that a checkpoint carries: it needs torch and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .reading_grasp import check_floats, check_shape, features

Record = dict[str, Any]
LAYER, TABLE, NORM, HEAD = "layer", "table", "norm", "head"
"""What a record of the kind "sliced" stands for, its "part"."""


class RootNorm(nn.Module):
    """`y = x / sqrt(|x|² / hidden + eps)`, in float32 or wider; x (..., width) may be narrower than
    `hidden`.
    """

    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.hidden = hidden
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """x (..., width) -> y of the same shape and dtype."""
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = wide.square().sum(-1, keepdim=True) / self.hidden
        return (wide * torch.rsqrt(mean + self.eps)).to(input.dtype)


class SlicedNorm(RootNorm):
    """The norm behind the layers."""

    def record(self) -> Record:
        """How to place it (`structure_grasp`)."""
        return {"kind": "sliced", "part": NORM, "hidden": self.hidden}

    def check(self, path: str) -> None:
        """It holds no weights."""


class Sliced(nn.Module):
    """Beside the class of an embedding or a head, which it leaves as it is but for the width."""

    slicing: Record
    weight: Any

    def record(self) -> Record:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        return dict(self.slicing)

    def check(self, path: str) -> None:
        """Raise `ValueError` where a weight that was read is of another shape or type."""
        check_floats(path, weight=self.weight)
        check_shape(path, self.weight, (len(self.weight), self.slicing["width"]))


class PaddedTable(Sliced):
    """An embedding whose vectors get zeros behind them, up to the width "padded": GPT-2's code
    gives its outputs the width of its embeddings. The first layer takes them off.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """(..., padded) for ids (...)."""
        found: Tensor = super().forward(*args, **kwargs)
        return pad(found, (0, self.slicing["padded"] - found.shape[-1]))


class SlicedLayer(nn.Module):
    """Beside the class of a decoder layer, whose modules it keeps: `x -> x S + block(norm(x))`,
    block after block.

    Its record says what the layer is made of. "blocks": the blocks one after another, each a list
    of branches that read the same states and are added up; a branch has "norm", "run" (the modules
    that it calls one after another; the first block's first branch is the attention), "reads" and
    "writes" (its matrices that meet the hidden states). "widths": of the states before each block
    and behind the last; None where they are as in the dense model. `shortcut_0`, `shortcut_1`:
    S (width before, width behind) of each block, or None where both are as in the dense model.
    """

    slicing: Record

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (batch, seq, width) -> y (batch, seq, next width)."""
        hidden_states = hidden_states[..., : self.slicing["widths"][0]]  # of a padded embedding
        for number, branches in enumerate(self.slicing["blocks"]):
            shortcut = getattr(self, f"shortcut_{number}")
            output = hidden_states if shortcut is None else hidden_states @ shortcut
            for place, branch in enumerate(branches):
                inner = getattr(self, branch["norm"])(hidden_states)
                if number == place == 0:
                    inner = getattr(self, branch["run"][0])(inner, *args, **kwargs)
                    inner = inner[0] if isinstance(inner, tuple) else inner
                else:
                    for name in branch["run"]:
                        inner = getattr(self, name)(inner)
                factor = getattr(self, "residual_multiplier", None)  # Granite's
                output = output + (inner if factor is None else inner * factor)
            hidden_states = output
        return (hidden_states,) if self.slicing.get("tuple") else hidden_states

    def record(self) -> Record:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        return dict(self.slicing)

    def check(self, path: str) -> None:
        """Raise `ValueError` where a weight that was read is of another shape or type."""
        for name, shape in shortcuts(self.slicing):
            shortcut = getattr(self, name)
            if shape is not None:
                check_floats(path, **{name: shortcut})
                check_shape(f"{path}.{name}", shortcut, shape)
        for name, (rows, columns) in shapes(self, self.slicing):
            module: Any = self.get_submodule(name)
            shape = (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)
            if getattr(module, "record", None) is None:  # one of ours checks itself
                check_shape(f"{path}.{name}", module.weight, shape)


def marked(old: Any, mark: Any) -> type:
    """The class of `old` with what `mark` adds; hooks and device maps go by its name."""
    kind: Any = type(old)
    return _marked(kind, mark)


@cache
def _marked(kind: Any, mark: Any) -> type:
    return type(kind.__name__, (mark, kind), {"__module__": __name__, "__doc__": kind.__doc__})


def become(layer: nn.Module, record: Record) -> None:
    """Make a decoder layer a `SlicedLayer` of this record; its matrices, norms and shortcuts are
    the caller's.
    """
    if not isinstance(layer, SlicedLayer):
        layer.__class__ = marked(layer, SlicedLayer)
    layer.slicing = record  # type: ignore[assignment]
    for name, _ in shortcuts(record):
        if name not in layer._parameters:
            layer.register_parameter(name, None)


def shortcuts(record: Record) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """(name, shape) of every shortcut of a layer; None where there is none."""
    widths, hidden = record["widths"], record["hidden"]
    for number in range(len(record["blocks"])):
        before, behind = widths[number : number + 2]
        dense = before is None and behind is None
        yield f"shortcut_{number}", None if dense else (before or hidden, behind or hidden)


def shapes(layer: nn.Module, record: Record) -> Iterator[tuple[str, tuple[int, int]]]:
    """(path, (out, in)) of the matrices of a layer that read or write sliced states."""
    for number, branches in enumerate(record["blocks"]):
        before, behind = record["widths"][number : number + 2]
        for branch in branches:
            for path in branch["reads"] if before is not None else ():
                yield path, (features(layer.get_submodule(path))[1], before)
            if behind is not None:
                path = branch["writes"]
                yield path, (behind, features(layer.get_submodule(path))[0])


def resized(old: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A module like `old` (a linear, a GPT-2 `Conv1D`) with W (out, in) and b (out), whatever their
    shapes.
    """
    new = copy.copy(old)
    new._parameters = dict(old._parameters)
    rows, columns = weight.shape
    if isinstance(new, nn.Linear):
        new.out_features, new.in_features = rows, columns
    else:
        new.nf, new.nx, weight = rows, columns, weight.T.contiguous()
    kept = old.weight.requires_grad
    new.weight = nn.Parameter(weight, requires_grad=kept)
    new.bias = None if bias is None else nn.Parameter(bias, requires_grad=kept)
    return new


def sliced_table(old: Any, weight: Tensor, padded: int | None = None) -> Any:
    """An embedding like `old` with `weight` (rows, width); it scales and offsets as `old` does."""
    new = copy.copy(old)
    new._parameters = dict(old._parameters)
    if not isinstance(old, Sliced):
        new.__class__ = marked(old, Sliced if padded is None else PaddedTable)
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    new.embedding_dim = weight.shape[1]
    new.slicing = {"kind": "sliced", "part": TABLE, "width": weight.shape[1]}
    new.slicing |= {} if padded is None else {"padded": padded}
    return new


def sliced_head(old: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A head like `old` with W (vocabulary, width) and b (vocabulary)."""
    new = resized(old, weight, bias)
    new.__class__ = marked(old, Sliced)
    new.slicing = {"kind": "sliced", "part": HEAD, "width": weight.shape[1]}
    new.slicing |= {"biased": True} if bias is not None else {}
    return new


def eps_of(norm: Any) -> float:
    """What a norm adds to the mean square."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def check_record(path: str, record: Record) -> None:
    """Raise `ValueError` for a record that makes no sense."""
    part = record.get("part")
    wanted = {LAYER: ("hidden",), NORM: ("hidden",), TABLE: ("width",), HEAD: ("width",)}
    if part not in wanted:
        raise ValueError(
            f"config.json: the part of '{path}' is {part!r}; it must be one of {', '.join(wanted)}"
        )
    sizes: dict[str, Any] = {name: record.get(name) for name in wanted[part]}
    sizes |= {"padded": record["padded"]} if "padded" in record else {}
    if part == LAYER:
        blocks: Any = record.get("blocks")
        widths = record.get("widths")
        if not _are_blocks(blocks) or not isinstance(widths, list):
            raise ValueError(f"config.json: '{path}' does not say what its blocks are made of")
        sizes |= {f"width {place}": width for place, width in enumerate(widths)}
        if len(widths) != len(blocks) + 1:
            raise ValueError(f"config.json: '{path}' needs a width before and behind each block")
    for name, size in sizes.items():
        if name.startswith("width ") and size is None:
            continue  # as in the dense model
        if type(size) is not int or size < 1:
            raise ValueError(
                f"config.json: the {name} of '{path}' is {size!r}; it must be a whole number, 1 or"
                " more"
            )
    if "padded" in record and record["padded"] < record["width"]:
        raise ValueError(f"config.json: '{path}' is padded to less than its own width")


def _are_blocks(found: Any) -> bool:
    def names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)

    return isinstance(found, list) and all(
        isinstance(branches, list)
        and all(
            isinstance(one, dict)
            and isinstance(one.get("norm"), str)
            and isinstance(one.get("writes"), str)
            and names(one.get("run"))
            and bool(one["run"])
            and names(one.get("reads"))
            for one in branches
        )
        for branches in found
    )


def place(path: str, old: Any, record: Record) -> nn.Module:
    """The module that a record describes, without memory. Raises `ValueError`."""
    part = record["part"]
    if part == NORM:
        return SlicedNorm(record["hidden"], eps_of(old))
    if part == TABLE:
        empty = _empty(old, len(old.weight), record["width"])
        return sliced_table(old, empty, record.get("padded"))
    if part == HEAD:
        rows = len(old.weight)
        bias = _empty(old, rows) if record.get("biased") else None
        return sliced_head(old, _empty(old, rows, record["width"]), bias)
    try:
        _shape_layer(old, record)
    except AttributeError as missing:
        raise ValueError(
            f"config.json: '{path}' is another layer than it says: {missing}"
        ) from None
    return old


def _shape_layer(layer: nn.Module, record: Record) -> None:
    """Give an empty layer the norms, matrices and shortcuts of the record."""
    biased = (
        {path for branches in record["blocks"] for branch in branches for path in branch["reads"]}
        if record.get("biased")
        else set()
    )
    dtype = next(layer.parameters()).dtype
    for path, (rows, columns) in list(shapes(layer, record)):
        old: Any = layer.get_submodule(path)
        bias = _empty(old, rows) if old.bias is not None or path in biased else None
        layer.set_submodule(path, resized(old, _empty(old, rows, columns), bias))
    for width, branches in zip(record["widths"], record["blocks"], strict=False):
        for name in (name for branch in branches for name in branch["run"]):
            layer.get_submodule(name)
        for branch in branches if width is not None else ():
            norm = layer.get_submodule(branch["norm"])
            layer.set_submodule(branch["norm"], RootNorm(record["hidden"], eps_of(norm)))
    become(layer, record)
    for name, shape in shortcuts(record):
        if shape is not None:
            empty = torch.empty(shape, device="meta", dtype=dtype)
            layer.register_parameter(name, nn.Parameter(empty, requires_grad=False))


def _empty(old: Any, *shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=old.weight.dtype)
