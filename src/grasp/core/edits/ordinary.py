"""A model without anything of ours in it: dense matrices in the place of pairs and of few bits.

These are no edits: they belong to opening and exporting a model, and nothing is logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from grasp.core.axes import width_entry
from grasp.core.decoder import Decoder
from grasp.core.edits.joining import joined
from grasp.core.edits.placing import stored, sync
from grasp.core.edits.widening import whole, widened, widest, widths
from grasp.core.edits.widths import copy_widths
from grasp.core.layer import is_quantized
from grasp.core.layers.embedding_grasp import dense_embedding
from grasp.core.layers.experts_grasp import SplitExperts
from grasp.core.layers.low_rank_grasp import fuse
from grasp.core.layers.modeling_grasp import plain_class
from grasp.core.layers.quantized_grasp import QuantizedLinear
from grasp.core.layers.structure_grasp import made, structure_of
from grasp.errors import ModelError

ORDINARY = ("low-rank", "narrow", "experts")
"""Kinds of modules that an ordinary model can do without."""


@torch.no_grad()
def multiply_out(decoder: Decoder) -> int:
    """Put dense matrices in the place of all low-rank pairs, products taken in float32 and kept in
    the pair's dtype; returns how many. Experts that were taken apart are in one tensor again.

    Narrowed layers get one width, that of the widest, filled up with zeros; heads and value
    dimensions that went are zeros again. The model is then one of its original class, with nothing
    of grasp in it. Layers that were dropped stay dropped.
    """
    model, structure = decoder.model, structure_of(decoder.model)
    kinds = {path: record["kind"] for path, record in structure.items()}
    if odd := next((path for path in kinds if kinds[path] not in ORDINARY), None):
        raise ModelError(
            f"'{odd}' is of the kind '{kinds[odd]}', which has no place in an ordinary model; load"
            " the checkpoint with `import grasp`, or with trust_remote_code=True"
        )
    layers = widths(decoder)
    there = widest(decoder, layers) if layers else None
    ours = {path: model.get_submodule(path) for path in structure}
    model.__class__ = plain_class(type(model))
    strip_quantization_marks(model)
    if there is not None:
        setattr(decoder.config, width_entry(decoder.config), there.channels)
    with torch.device("meta"):
        # says which kind of module stood there: GPT-2 stores its matrices (in, out)
        original = type(model)(model.config)
    split = [path for path, kind in kinds.items() if kind == "experts"]
    for path in split:
        model.set_submodule(
            path, joined(cast(SplitExperts, ours[path]), original.get_submodule(path))
        )
    for path, module in ours.items():
        if any(f"{path}.".startswith(f"{one}.") for one in split):
            continue
        dense, (matrix, bias) = original.get_submodule(path), whole(module)
        if there is not None:
            place, name = decoder.locate(path)
            here = layers[decoder.kept[place]]
            matrix, bias = widened(decoder.family, name, matrix, bias, here, there)
        dense.weight = nn.Parameter(stored(dense, matrix), requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias, requires_grad=False)
        model.set_submodule(path, dense)
    if there is not None:
        copy_widths(decoder.stack, original.get_submodule(decoder.family.layers))
    return sum(kind == "low-rank" for kind in kinds.values())


def strip_quantization_marks(model: Any) -> None:
    """Make a dequantised or multiplied-out model an ordinary one: transformers will not save it as
    such while it bears these marks.
    """
    for holder in (model, model.config):
        for mark in (
            "hf_quantizer",
            "quantization_method",
            "quantization_config",
            "_is_quantized",
            "auto_map",
        ):
            if mark in holder.__dict__:
                delattr(holder, mark)
    model.is_quantized = False


@torch.no_grad()
def dequantize(decoder: Decoder) -> None:
    """Make every quantized linear, pair, embedding and head an ordinary one again, in the dtype of
    its scales. What rounding lost stays lost.
    """
    tables: dict[Any, nn.Parameter] = {}
    for path, module in [pair for pair in decoder.model.named_modules() if is_quantized(pair[1])]:
        old: Any = module
        if isinstance(old, nn.Embedding):
            table = dense_embedding(old)
            tables[old.weight] = table.weight
            decoder.model.set_submodule(path, table.eval())
            continue
        new: Any = _empty(old)
        if old.of is not None:
            new = made(path, new, old.of).to_empty(device=old.weight.device)
        for name in old.shapes:
            if getattr(old, name) in tables:  # a head that is tied
                new.weight = tables[getattr(old, name)]
                continue
            dense = old.dequantized(name)
            getattr(new, name).copy_(dense if isinstance(new, nn.Linear) else dense.T)
        for name in ("bias", "places", "in_places", "out_places"):
            if getattr(old, name, None) is not None:
                getattr(new, name).copy_(getattr(old, name))
        decoder.model.set_submodule(path, new.eval())
    fuse(decoder.model)
    sync(decoder)


class Held(nn.Module):
    """Tensors to be written. It cannot be run."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def hold(decoder: Decoder, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put tensors that are written for them in the place of linears in few bits, {path: {name:
    tensor}}. What else is in few bits is dequantised, and the model bears no mark of ours.
    """
    for path, tensors in found.items():
        decoder.model.set_submodule(path, Held(tensors))
    dequantize(decoder)
    strip_quantization_marks(decoder.model)


def _empty(module: QuantizedLinear) -> Any:
    """An unfilled module of the class that a quantized dense matrix stands for: `nn.Linear`, or
    GPT-2's `Conv1D` (out, in).
    """
    with torch.device(module.weight.device):
        if issubclass(module.replaced, torch.nn.Linear):
            new: Any = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None
            )
        else:
            new = module.replaced(module.out_features, module.in_features)
    return new.to(module.weight.dtype).requires_grad_(False)
