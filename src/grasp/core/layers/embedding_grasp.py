"""The embedding and the head of a model in few bits, stored as `packing_grasp` says.

An embedding gives rows of its matrix: only those that are looked up are dequantised. A head is a
linear like others. Where the two are tied, the numbers are stored once: the head's parameters are
the embedding's, as transformers ties a dense head's (`tie`). A file that a checkpoint carries: it
needs torch and transformers and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .packing_grasp import INTEGERS, ZEROS, check_stored, dequantized, integer_dtype, layout
from .quantized_grasp import QuantizedLinear, quantized_like, stored_rows
from .reading_grasp import record_of

EMBEDDING, HEAD = "embedding", "head"
"""What a record of the kind "quantized" stands for outside the decoder layers, its "part"."""


class QuantizedEmbedding(nn.Embedding):
    """An embedding whose matrix (num_embeddings, embedding_dim) is in few bits. What its class does
    beyond looking up, such as scaling, it does still (`embedding_like`).
    """

    scheme: str
    group_size: int
    replaced: type[nn.Module]
    of: dict[str, Any] | None
    shapes: dict[str, tuple[int, int]]

    def forward(self, input: Tensor) -> Tensor:
        """Ids (...) -> vectors (..., embedding_dim), in the dtype of the scales."""
        return self._rows("weight", input.flatten()).unflatten(0, input.shape)

    def layout(self) -> dict[str, tuple[int, int]]:
        """Shape of every stored tensor."""
        return layout("weight", *self.shapes["weight"], self.scheme, self.group_size)

    def num_parameters(self) -> int:
        """Numbers that the matrix stands for, however few bits each takes."""
        rows, columns = self.shapes["weight"]
        return rows * columns

    def dequantized(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The matrix "weight", or these rows of it, as the stored numbers give it, in the dtype of
        the scales.
        """
        return self._rows(name, rows)

    def _rows(self, name: str, rows: slice | Tensor) -> Tensor:
        numbers, columns = stored_rows(self, name, rows), self.shapes[name][1]
        return dequantized(*numbers, self.scheme, columns, self.group_size)

    def check(self, path: str) -> None:
        """Raise `ValueError` where a tensor read from the files does not have the shape and type
        that the config gives it, or is not finite.
        """
        for name, shape in self.layout().items():
            check_stored(f"{path}.{name}", getattr(self, name), shape, self.scheme)

    def record(self) -> dict[str, Any]:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        found = {"kind": "quantized", "part": EMBEDDING, "scheme": self.scheme}
        return {**found, "group_size": self.group_size, **({"of": self.of} if self.of else {})}

    def reset_parameters(self) -> None:
        """There is nothing sensible to initialise: the numbers always come from a matrix or a
        checkpoint.
        """

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme},"
            f" group_size={self.group_size}"
        )


class QuantizedHead(QuantizedLinear):
    """A head in few bits. A class without one, such as a classifier, passes its record over."""

    def record(self) -> dict[str, Any]:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        return {**super().record(), "part": HEAD}


@cache
def _quantized_class(kind: Hashable) -> type:
    """The class `kind` of an embedding, which looks up in few bits: its own `forward` calls that of
    `nn.Embedding`, and finds ours.
    """
    if kind is nn.Embedding:
        return QuantizedEmbedding
    ours = {name: vars(QuantizedEmbedding)[name] for name in ("record", "check", "extra_repr")}
    marks = {"__module__": __name__, "__doc__": kind.__doc__, **ours}
    bases: Any = (kind, QuantizedEmbedding)
    return type(QuantizedEmbedding.__name__, bases, marks)


def embedding_like(old: Any, scheme: str, group_size: int, device: Any = None) -> Any:
    """An unfilled `QuantizedEmbedding` for an embedding of any class."""
    new: Any = copy.copy(old)
    new._parameters, new._buffers = {}, dict(old._buffers)
    kind: Any = type(old)
    new.of, new.replaced = record_of(old), kind
    new.__class__ = _quantized_class(kind)
    new.scheme, new.group_size = scheme, group_size
    new.shapes = {"weight": tuple(old.weight.shape)}
    for name, shape in new.layout().items():
        kind = integer_dtype(scheme) if name.endswith(INTEGERS) else old.weight.dtype
        empty = torch.empty(shape, device=device, dtype=kind)
        new.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    return new


def dense_embedding(old: Any) -> Any:
    """The embedding of its own class again, in the dtype of the scales."""
    new: Any = copy.copy(old)
    new._buffers = dict(old._buffers)
    new.__class__ = old.replaced
    new._parameters = {"weight": nn.Parameter(old.dequantized("weight"), requires_grad=False)}
    for name in ("scheme", "group_size", "replaced", "of", "shapes"):
        delattr(new, name)
    return new


def share(head: QuantizedLinear, table: Any) -> None:
    """Make the numbers of a head those of its embedding, the very parameters."""
    for name in table.layout():
        head.register_parameter(name, table._parameters[name])


def tie(model: Any) -> None:
    """Tell transformers which stored tensors a tied head shares with its embedding; it knows of
    "weight" alone. Where neither is in few bits (any more), there is nothing to tell.
    """
    keys = getattr(model, "all_tied_weights_keys", None)
    named = getattr(model, "_tied_weights_keys", None) or {}
    if not isinstance(keys, dict) or not isinstance(named, dict):
        return
    more: dict[str, str] = {}
    for target, source in keys.items():
        head, table = (_owner(model, path) for path in (target, source))
        if isinstance(head, QuantizedHead) and isinstance(table, QuantizedEmbedding):
            names = [name.removeprefix("weight") for name in table.layout() if name != "weight"]
            more |= {target + name: source + name for name in names}
    model.all_tied_weights_keys = _plain(keys) | more
    if _plain(named) | more != named:
        model._tied_weights_keys = _plain(named) | more  # of this one model


def _owner(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        return None


def _plain(keys: dict[str, str]) -> dict[str, str]:
    """Without what `tie` added."""
    ends = (INTEGERS, ZEROS)
    return {target: source for target, source in keys.items() if not target.endswith(ends)}


def place(path: str, old: Any, record: dict[str, Any], device: Any = "meta") -> Any:
    """The linear, embedding or head in few bits that a record describes, unfilled, in the place of
    `old`. Raises `ValueError`.
    """
    part, how = record.get("part"), (record["scheme"], record["group_size"], device)
    if isinstance(old, nn.Embedding) != (part == EMBEDDING):
        raise ValueError(
            f"config.json: the part of '{path}' is {part!r}, which {type(old).__name__} is not"
        )
    if part == EMBEDDING:
        return embedding_like(old, *how)
    return quantized_like(old, *how, kind=QuantizedHead if part == HEAD else QuantizedLinear)
