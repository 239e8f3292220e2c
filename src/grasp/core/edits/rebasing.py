"""Carries a slice out: all new modules are made first, then put in place together (`slicing` has
the maths).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grasp.core.decoder import Decoder
from grasp.core.edits.base import Undo
from grasp.core.edits.placing import remember, sync
from grasp.core.edits.replace import gives_tuples
from grasp.core.edits.slicing import (
    ATTENTION,
    HEAD,
    Norm,
    Place,
    check_basis,
    check_sliceable,
    dense_matrices,
    ends_of,
    layer_record,
    norm_module,
    norm_of,
    places,
    tables,
)
from grasp.core.layers.sliced_grasp import (
    Record,
    RootNorm,
    SlicedLayer,
    SlicedNorm,
    become,
    resized,
    sliced_head,
    sliced_table,
)
from grasp.errors import NumericsError, RecipeError

SLICE = 1 << 21
"""Numbers of a matrix that are in float64 at a time."""


class _Draft:
    """What will be in the model: modules by path, and by layer its record and its shortcuts."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.modules: dict[str, nn.Module] = {}
        self.records: dict[int, Record] = {}
        self.shortcuts: dict[tuple[int, int], Tensor] = {}

    def path(self, layer: int, inside: str) -> str:
        """Of a module of layer `layer`, in the model as it is now."""
        return f"{self.decoder.family.layers}.{self.decoder.kept.index(layer)}.{inside}"

    def record(self, layer: int) -> Record:
        """That of a layer, to be changed."""
        if layer not in self.records:
            module = self.decoder.layer(layer).module
            told = module.record() if isinstance(module, SlicedLayer) else self._first(module)
            self.records[layer] = {**told, "widths": list(told["widths"])}
        return self.records[layer]

    def _first(self, module: nn.Module) -> Record:
        record = layer_record(self.decoder)
        return record | ({"tuple": True} if gives_tuples(self.decoder, module) else {})

    def shortcut(self, layer: int, block: int) -> Tensor:
        """The matrix by which the sum goes past a block, (before, behind), in float64."""
        found = self.shortcuts.get((layer, block))
        if found is None:
            found = getattr(self.decoder.layer(layer).module, f"shortcut_{block}", None)
        if found is not None:
            return found.detach().double()
        hidden = self.decoder.config.hidden_size
        return torch.eye(hidden, dtype=torch.float64, device=self.decoder.device)


@torch.no_grad()
def carry_out(decoder: Decoder, place: Place, basis: Tensor) -> Undo:
    """Keep the states at `place` in `basis` (hidden, width). Raises before anything is changed:
    `ModelError` where the model does not suit, `RecipeError` where the place or the basis does not,
    `NumericsError` for numbers that are not finite.
    """
    if not any(isinstance(layer, SlicedLayer) for layer in decoder.stack):
        check_sliceable(decoder)
    if place not in places(decoder):
        known = ", ".join(dict.fromkeys(one.block for one in places(decoder)))
        raise RecipeError(
            f"layer {place.layer}, {place.block}: no such place in the model; it has layers"
            f" {decoder.kept[0]} to {decoder.kept[-1]}, and reads states by {known} (of the last)"
        )
    check_basis(basis, decoder.config.hidden_size, place)
    wide, norm = basis.to(decoder.device).double(), norm_of(norm_module(decoder, place))
    draft = _Draft(decoder)
    _read(draft, place, wide)
    _write(draft, place, wide - wide.mean(0) if norm.centred else wide)
    _check_finite(draft)
    return _put(draft)


def _read(draft: _Draft, place: Place, basis: Tensor) -> None:
    """What reads the states at `place` reads them in the basis, the norm's weight folded in."""
    decoder, hidden = draft.decoder, len(basis)
    if place.block == HEAD:
        ends, norm = ends_of(decoder), norm_of(norm_module(decoder, place))
        head: Any = decoder.model.get_submodule(ends.head)
        draft.modules[ends.norm] = SlicedNorm(hidden, norm.eps)
        draft.modules[ends.head] = sliced_head(head, *_reading(head, norm, basis))
        for path in tables(decoder) if decoder.family.ends_as_begun else ():
            table: Any = decoder.model.get_submodule(path)
            if table.weight.shape[1] > basis.shape[1]:
                raise RecipeError(
                    f"layer {place.layer}, head: {basis.shape[1]} dimensions are fewer than the"
                    f" {table.weight.shape[1]} of '{path}', which this family's code cannot do"
                )
            draft.modules[path] = sliced_table(table, table.weight.detach(), basis.shape[1])
        return
    layer, number = place.layer, 0 if place.block == ATTENTION else 1
    module, record = decoder.layer(place.layer).module, draft.record(layer)
    if record["widths"][number] is not None:
        raise RecipeError(f"layer {layer}, {place.block}: its states are sliced already")
    record["widths"][number] = basis.shape[1]
    for branch in record["blocks"][number]:
        norm = norm_of(module.get_submodule(branch["norm"]))
        if norm.shift is not None:
            record["biased"] = True
        draft.modules[draft.path(layer, branch["norm"])] = RootNorm(hidden, norm.eps)
        readers = dense_matrices(module, branch["reads"])
        for path, reader in zip(branch["reads"], readers, strict=True):
            made = resized(reader, *_reading(reader, norm, basis))
            draft.modules[draft.path(layer, path)] = made
    draft.shortcuts[layer, number] = basis.mT @ draft.shortcut(layer, number)


def _reading(reader: Any, norm: Norm, basis: Tensor) -> tuple[Tensor, Tensor | None]:
    """W diag(scale) Q and b + W shift, in the reader's dtype."""
    weight, dtype = _matrix(reader), reader.weight.dtype
    bias = None if reader.bias is None else reader.bias.double()
    if norm.shift is not None:
        shift = _times(weight, norm.shift[:, None], torch.float64)[:, 0]
        bias = shift if bias is None else bias + shift
    sliced = _times(weight, norm.scale[:, None] * basis, dtype)
    return sliced, None if bias is None else bias.to(dtype)


def _write(draft: _Draft, place: Place, turn: Tensor) -> None:
    """What writes the states at `place` writes them in the basis `turn`."""
    decoder, layer = draft.decoder, place.layer
    number = 1 if place.block not in (ATTENTION, HEAD) else 0
    if place.block == ATTENTION and layer == decoder.kept[0]:
        for path in tables(decoder):
            table: Any = decoder.model.get_submodule(path)
            weight = _times(table.weight, turn, table.weight.dtype)
            padded = len(turn) if decoder.family.ends_as_begun else None
            draft.modules[path] = sliced_table(table, weight, padded)
        return
    if place.block == ATTENTION:
        layer = decoder.kept[decoder.kept.index(layer) - 1]
    record = draft.record(layer)
    number = number or len(record["blocks"])  # the place behind the last block
    record["widths"][number] = turn.shape[1]
    module = decoder.layer(layer).module
    for branch in record["blocks"][number - 1]:
        for writer in dense_matrices(module, [branch["writes"]]):
            bias = None if writer.bias is None else writer.bias.double() @ turn
            weight = (turn.mT @ _matrix(writer).double()).to(writer.weight.dtype)
            made = resized(writer, weight, None if bias is None else bias.to(weight.dtype))
            draft.modules[draft.path(layer, branch["writes"])] = made
    draft.shortcuts[layer, number - 1] = draft.shortcut(layer, number - 1) @ turn


def _matrix(module: Any) -> Tensor:
    """W (out, in)."""
    weight: Tensor = module.weight if isinstance(module, nn.Linear) else module.weight.T
    return weight


def _times(weight: Tensor, turn: Tensor, dtype: torch.dtype) -> Tensor:
    """W (out, in) times `turn` (in, n), computed in float64: so many rows at a time that a table of
    the vocabulary takes no more memory than another matrix.
    """
    found = torch.empty(len(weight), turn.shape[1], dtype=dtype, device=weight.device)
    rows = max(SLICE // len(turn), 1)
    for part, into in zip(weight.split(rows), found.split(rows), strict=True):
        into.copy_(part.double() @ turn)
    return found


def _check_finite(draft: _Draft) -> None:
    found: dict[str, list[Tensor]] = {
        path: list(module.parameters()) for path, module in draft.modules.items()
    }
    found |= {f"shortcut of layer {at[0]}": [one] for at, one in draft.shortcuts.items()}
    for path, tensors in found.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise NumericsError(f"'{path}': the weights are not finite; try --dtype float32")


def _put(draft: _Draft) -> Undo:
    """Put all of it in place. Embedding and head are two matrices from then on."""
    decoder, model = draft.decoder, draft.decoder.model
    restore, ends = remember(decoder), ends_of(decoder)
    stack = decoder.stack
    layers = {layer: stack[decoder.kept.index(layer)] for layer in draft.records}
    owners = [model.get_submodule(path.rpartition(".")[0]) for path in draft.modules]
    undo = _keep([model, *owners, *layers.values()])
    for path, module in draft.modules.items():
        model.set_submodule(path, module)
    for layer, record in draft.records.items():
        become(layers[layer], record)
    for (layer, block), shortcut in draft.shortcuts.items():
        weight = shortcut.to(decoder.dtype).contiguous()
        parameter = nn.Parameter(weight, requires_grad=_trains(layers[layer]))
        layers[layer].register_parameter(f"shortcut_{block}", parameter)
    if ends.embedding in draft.modules:
        _untie(decoder)
    sync(decoder)

    def undo_all() -> None:
        undo()
        restore()

    return undo_all


def _trains(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _untie(decoder: Decoder) -> None:
    """Say that the head is a matrix of its own: it stays in a basis that the embedding leaves."""
    model: Any = decoder.model
    for config in (model.config, decoder.config):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _keep(modules: Iterable[nn.Module]) -> Undo:
    """What brings back the classes, parts and settings of modules as they are now."""
    saved = [
        (
            module,
            type(module),
            {
                name: dict(value) if name in ("_parameters", "_modules", "_buffers") else value
                for name, value in vars(module).items()
            },
        )
        for module in {id(module): module for module in modules}.values()
    ]

    def undo() -> None:
        for module, kind, values in saved:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(values)

    return undo
