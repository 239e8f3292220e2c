"""The only code that changes a model: edits, their application, and their JSON form.

An edit names places by the paths and indices of the model as it was loaded, so edits can be listed,
logged and repeated in any tool. After every edit the model in memory is a complete Hugging Face
model: it runs, generates and saves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grasp.core.building import INDEX, layers_differ
from grasp.core.decoder import Decoder
from grasp.core.layer import is_low_rank, is_quantized
from grasp.core.layers.modeling_grasp import (
    GraspConfig,
    LowRankLinear,
    carry_code,
    fuse,
    low_rank_like,
    plain_class,
)
from grasp.core.layers.quantized_grasp import QuantizedLinear, quantized_like
from grasp.core.records import Attribution
from grasp.errors import ModelError, NumericsError, RecipeError


@dataclass(frozen=True)
class Drop:
    """Remove decoder layer `layer`."""

    layer: int

    def spec(self) -> dict[str, Any]:
        return {"edit": "drop", "layer": self.layer}


@dataclass(frozen=True)
class Factorize:
    """Replace the matrix at `path` by the pair `weight_in` A (rank, in) and `weight` B (out, rank).

    `kept`: the indices of the singular groups the pair holds, ordered by falling sigma, and
    `attribution` their scores, where the method chose among groups. `places` (out): the pair is
    pivoted (see `LowRankLinear`), and `weight` is (out - rank, rank). `predicted_loss`: by how many
    nats a token the method expects the loss to rise.
    """

    path: str
    weight_in: Tensor
    weight: Tensor
    kept: Tensor | None = None
    attribution: Attribution | None = field(default=None, repr=False)
    places: Tensor | None = None
    predicted_loss: float | None = None

    @property
    def rank(self) -> int:
        return self.weight_in.shape[0]

    def spec(self) -> dict[str, Any]:
        found: dict[str, Any] = {"edit": "factorize", "path": self.path, "rank": self.rank}
        if self.places is not None:
            found["pivoted"] = True
        if self.predicted_loss is not None:
            found["predicted_loss"] = self.predicted_loss
        if self.kept is not None:
            found["kept"] = self.kept.tolist()
        if self.attribution is not None:
            found["score"] = self.attribution.score
            found["scores"] = _short(self.attribution.scores)
            found["singular_values"] = _short(self.attribution.singular_values)
        return found


@dataclass(frozen=True)
class Quantize:
    """Put the linear or low-rank pair at module path `path` in 8 or 4 bits: `tensors` by name, as
    `grasp.core.quantized_grasp` lays them out.
    """

    path: str
    scheme: str
    group_size: int
    tensors: dict[str, Tensor] = field(repr=False)

    def spec(self) -> dict[str, Any]:
        return {
            "edit": "quantize",
            "path": self.path,
            "scheme": self.scheme,
            "group_size": self.group_size,
        }


Edit = Drop | Factorize | Quantize


@torch.no_grad()
def multiply_out(decoder: Decoder) -> int:
    """Put dense matrices in the place of all low-rank pairs, products taken in float32 and kept in
    the pair's dtype; returns how many.

    The model is then one of its original class, with nothing of grasp in it. Layers that were
    dropped stay dropped.
    """
    model = decoder.model
    pairs = {path: module for path, module in model.named_modules() if is_low_rank(module)}
    model.__class__ = plain_class(type(model))
    strip_quantization_marks(model)
    with torch.device("meta"):
        # says which kind of module stood there: GPT-2 stores its matrices (in, out)
        original = type(model)(model.config)
    for path, pair in pairs.items():
        dense, dtype = original.get_submodule(path), pair.weight.dtype
        pair.joint = None
        product = pair.float().product().to(dtype)
        stored = product if isinstance(dense, nn.Linear) else product.T.contiguous()
        dense.weight = nn.Parameter(stored, requires_grad=False)
        if pair.bias is not None:
            dense.bias = nn.Parameter(pair.bias.to(dtype), requires_grad=False)
        model.set_submodule(path, dense)
    return len(pairs)


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


def _short(values: Tensor) -> list[float]:
    """Five significant digits: enough to plot, to rank and to compare runs."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def apply(decoder: Decoder, edit: Edit) -> None:
    """Carry out one edit. Raises `RecipeError` where it names something that is not there, before
    anything is changed.
    """
    if isinstance(edit, Drop):
        _drop(decoder, edit)
    elif isinstance(edit, Quantize):
        _quantize(decoder, edit)
    else:
        _factorize(decoder, edit)


@torch.no_grad()
def _factorize(decoder: Decoder, edit: Factorize) -> None:
    index, name = decoder.locate(edit.path)
    layer = decoder.layer(index).module
    old = layer.get_submodule(name)
    if is_low_rank(old):
        raise RecipeError(f"'{edit.path}' is a low-rank pair already")
    new = low_rank_like(old, edit.rank, device=old.weight.device, pivoted=edit.places is not None)
    if new.weight.shape != edit.weight.shape or new.weight_in.shape != edit.weight_in.shape:
        raise RecipeError(
            f"'{edit.path}': factors {tuple(edit.weight.shape)} x {tuple(edit.weight_in.shape)} do"
            " not fit the matrix"
        )
    new.weight.copy_(edit.weight)
    new.weight_in.copy_(edit.weight_in)
    if new.places is not None and edit.places is not None:
        new.places.copy_(edit.places)
    if not bool(torch.isfinite(new.weight).all() and torch.isfinite(new.weight_in).all()):
        raise NumericsError(
            f"'{edit.path}': the factors are not finite in {new.weight.dtype}; try --dtype float32"
        )
    if old.bias is not None:
        new.bias.copy_(old.bias)  # type: ignore[arg-type]
    layer.set_submodule(name, new)
    fuse(
        layer
        # as loading does, so that the model computes the same, bit for bit, before it is saved and
        # after
    )
    _sync_quantization_config(decoder)


@torch.no_grad()
def _quantize(decoder: Decoder, edit: Quantize) -> None:
    old: Any = decoder.model.get_submodule(edit.path)
    if is_quantized(old):
        raise RecipeError(f"'{edit.path}' is quantized already")
    new = quantized_like(old, edit.scheme, edit.group_size, device=old.weight.device)
    for name, value in edit.tensors.items():
        getattr(new, name).copy_(value)
    for name in ("bias", "places"):
        if getattr(old, name, None) is not None:
            getattr(new, name).copy_(getattr(old, name))
    try:
        new.check(edit.path)
    except ValueError as failure:
        raise NumericsError(f"{failure}; try --dtype float32") from failure
    decoder.model.set_submodule(edit.path, new)
    fuse(decoder.model)  # the pairs that are left
    _sync_quantization_config(decoder)


@torch.no_grad()
def dequantize(decoder: Decoder) -> None:
    """Make every quantized linear and pair an ordinary one again, in the dtype of its scales. What
    rounding lost stays lost.
    """
    for path, module in [pair for pair in decoder.model.named_modules() if is_quantized(pair[1])]:
        old: Any = module
        bias = old.bias is not None
        if old.rank is None:
            new: Any = _empty(old)
            dense = old.dequantized("weight")
            new.weight.copy_(dense if isinstance(new, torch.nn.Linear) else dense.T)
        else:
            new = LowRankLinear(
                old.in_features,
                old.out_features,
                old.rank,
                bias,
                old.weight.device,
                old.weight.dtype,
                old.pivoted,
            )
            new.weight.copy_(old.dequantized("weight"))
            new.weight_in.copy_(old.dequantized("weight_in"))
        for name in ("bias", "places"):
            if getattr(old, name) is not None:
                getattr(new, name).copy_(getattr(old, name))
        decoder.model.set_submodule(path, new.eval())
    fuse(decoder.model)
    _sync_quantization_config(decoder)


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


def _drop(decoder: Decoder, edit: Drop) -> None:
    if edit.layer not in decoder.kept:
        raise RecipeError(
            f"layer {edit.layer} is not in the model; it has layers 0 to {decoder.num_layers - 1}"
        )
    if len(decoder.kept) == 1:
        raise RecipeError(
            f"layer {edit.layer} is the last one left; a model needs at least one layer"
        )
    check_droppable(decoder, [edit.layer])
    position, stack = decoder.kept.index(edit.layer), decoder.stack
    _sync_config(decoder.config, position, len(stack))
    del stack[position]
    decoder.kept.remove(edit.layer)
    for index, layer in enumerate(stack):
        for module in layer.modules():
            for name in INDEX:
                if isinstance(getattr(module, name, None), int):
                    # the key-value cache keeps its entries by this number
                    setattr(module, name, index)
    _sync_quantization_config(decoder)


def check_droppable(decoder: Decoder, layers: Iterable[int]) -> None:
    """Raise `ModelError` where the model without `layers` would not be built from its config as it
    is in memory, and so not load again.
    """
    model = decoder.model
    gone = sorted({decoder.kept.index(layer) for layer in layers}, reverse=True)
    if getattr(decoder.config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(
            "this model scales attention by the layer's index (scale_attn_by_inverse_layer_idx):"
            " its layers cannot be dropped"
        )
    config = copy.deepcopy(model.config)
    for number, position in enumerate(gone):
        _sync_config(config.get_text_config(decoder=True), position, len(decoder.stack) - number)
    kept = [layer for position, layer in enumerate(decoder.stack) if position not in gone]
    try:
        built = _built(decoder, config)
    except Exception as failure:  # whatever a model's class may raise
        if not _can_be_built(decoder):
            return  # a class of its own kind: the proof after the saving has the last word
        found: str | None = (
            f"transformers refuses its config, {' '.join(str(failure).split())[:200]}"
        )
    else:
        count = (
            None
            if len(built) == len(kept)
            else f"it would have {len(built)} layers, not {len(kept)}"
        )
        found = count or next(layers_differ(kept, built, but=INDEX), None)
    if found:
        names = ", ".join(str(decoder.kept[position]) for position in reversed(gone))
        raise ModelError(
            f"layer {names} of a '{decoder.config.model_type}' model cannot be dropped: what is"
            " left would load again as another model, since its layers are built from their index:"
            f" {found}; use a method that keeps all layers"
        )


def _built(decoder: Decoder, config: Any) -> Any:
    """The decoder layers as `config` gives them, without memory (meta device)."""
    with torch.device("meta"):
        return type(decoder.model)(config).get_submodule(decoder.family.layers)


def _can_be_built(decoder: Decoder) -> bool:
    try:
        return len(_built(decoder, decoder.model.config)) > 0
    except Exception:
        return False


LAYER_COUNTS = (
    "num_hidden_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_layers",
    "n_layers",
    "n_layer",
)
"""Config entries that give the number of layers. Those of an encoder bear other names."""
LAYER_INDEX_LISTS = ("mlp_only_layers", "moe_layers", "cross_attention_layers")
"""Config entries that list layer indices. Every other list named `*layer*` with one entry a layer
lists per-layer settings.
"""
LAYER_BOUNDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
"""Config entries that say how many of the first layers are of another kind."""
LAYER_SETTINGS = (
    "intermediate_size",
    "activation_sparsity_pattern",
    "indexer_types",
    "num_experts",
    "moe_topk",
)
"""Lists with one entry a layer that are not named so."""


def _sync_config(config: Any, position: int, num_layers: int) -> None:
    """Take layer `position` out of every per-layer entry of the config."""
    values = config.to_dict()
    for key, value in values.items():
        if not isinstance(value, list) or ("layer" not in key and key not in LAYER_SETTINGS):
            continue
        if key in LAYER_INDEX_LISTS:
            setattr(config, key, [i - (i > position) for i in value if i != position])
        elif len(value) == num_layers:
            setattr(config, key, [v for i, v in enumerate(value) if i != position])
    for key in LAYER_BOUNDS:
        bound = getattr(config, key, None)
        if isinstance(bound, int) and position < bound:
            setattr(config, key, bound - 1)
    for key in LAYER_COUNTS:
        if getattr(config, key, None) == num_layers:
            setattr(config, key, num_layers - 1)
    config.num_hidden_layers = num_layers - 1


def _sync_quantization_config(decoder: Decoder) -> None:
    """Keep what the config says of ranks and bits equal to the model: it is what a loader rebuilds
    the model from.
    """
    model, modules = decoder.model, dict(decoder.model.named_modules())
    quantized: dict[str, Any] = {
        path: module for path, module in modules.items() if is_quantized(module)
    }
    pairs: dict[str, Any] = {
        path: module for path, module in modules.items() if is_low_rank(module)
    }
    pairs |= {path: module for path, module in quantized.items() if module.rank is not None}
    if not pairs and not quantized:
        _carry_no_code(model)
        return
    said = None
    if quantized:
        one = next(iter(quantized.values()))
        said = {"scheme": one.scheme, "group_size": one.group_size, "modules": sorted(quantized)}
    ranks = {path: module.rank for path, module in pairs.items()}
    model.config.quantization_config = GraspConfig(
        ranks, pivoted=[path for path, module in pairs.items() if module.pivoted], quantization=said
    )
    carry_code(model)


def _carry_no_code(model: Any) -> None:
    """Undo `carry_code`, for a model that has become an ordinary one."""
    if plain_class(type(model)) is not type(model):
        model.__class__ = plain_class(type(model))
        for mark in ("auto_map", "quantization_config"):
            vars(model.config).pop(mark, None)
