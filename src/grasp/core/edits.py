"""The only code that changes a model: edits, their application, and their JSON form.

An edit names places by the paths and indices of the model as it was loaded, so edits can be listed, logged and repeated in
any tool. After every edit the model in memory is a complete Hugging Face model: it runs, generates and saves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grasp.core.decoder import Decoder
from grasp.core.layer import is_low_rank
from grasp.core.modeling_grasp import GraspConfig, carry_code, fuse, low_rank_like
from grasp.core.models import strip_quantization_marks
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

    `kept`: the indices of the singular groups the pair holds, ordered by falling sigma, and `attribution` their scores, where the
    method chose among groups. `places` (out): the pair is pivoted (see `LowRankLinear`), and `weight` is (out - rank, rank).
    `predicted_loss`: by how many nats a token the method expects the loss to rise.
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


Edit = Drop | Factorize


@torch.no_grad()
def multiply_out(decoder: Decoder) -> int:
    """Put dense matrices in the place of all low-rank pairs, products taken in float32 and kept in the pair's dtype; returns how many.

    The model is then one of its original class, with nothing of grasp in it. Layers that were dropped stay dropped.
    """
    model = decoder.model
    pairs = {path: module for path, module in model.named_modules() if is_low_rank(module)}
    model.__class__ = next(kind for kind in type(model).__mro__ if not kind.__module__.endswith("modeling_grasp"))
    strip_quantization_marks(model)
    with torch.device("meta"):
        original = type(model)(model.config)  # says which kind of module stood there: GPT-2 stores its matrices (in, out)
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


def _short(values: Tensor) -> list[float]:
    """Five significant digits: enough to plot, to rank and to compare runs."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def apply(decoder: Decoder, edit: Edit) -> None:
    """Carry out one edit. Raises `RecipeError` where it names something that is not there, before anything is changed."""
    if isinstance(edit, Drop):
        _drop(decoder, edit)
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
        raise RecipeError(f"'{edit.path}': factors {tuple(edit.weight.shape)} x {tuple(edit.weight_in.shape)} do not fit the matrix")
    new.weight.copy_(edit.weight)
    new.weight_in.copy_(edit.weight_in)
    if new.places is not None and edit.places is not None:
        new.places.copy_(edit.places)
    if not bool(torch.isfinite(new.weight).all() and torch.isfinite(new.weight_in).all()):
        raise NumericsError(f"'{edit.path}': the factors are not finite in {new.weight.dtype}; try --dtype float32")
    if old.bias is not None:
        new.bias.copy_(old.bias)  # type: ignore[arg-type]
    layer.set_submodule(name, new)
    fuse(layer)  # as loading does, so that the model computes the same, bit for bit, before it is saved and after
    _sync_quantization_config(decoder)


def _drop(decoder: Decoder, edit: Drop) -> None:
    if edit.layer not in decoder.kept:
        raise RecipeError(f"layer {edit.layer} is not in the model; it has layers 0 to {decoder.num_layers - 1}")
    if len(decoder.kept) == 1:
        raise RecipeError(f"layer {edit.layer} is the last one left; a model needs at least one layer")
    config = decoder.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError("this model scales attention by the layer's index (scale_attn_by_inverse_layer_idx): its layers cannot be dropped")
    position, stack = decoder.kept.index(edit.layer), decoder.stack
    _sync_config(config, position, len(stack))
    del stack[position]
    decoder.kept.remove(edit.layer)
    for index, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]  # the key-value cache keeps its entries by this number
    _sync_quantization_config(decoder)


LAYER_INDEX_LISTS = ("mlp_only_layers", "moe_layers", "cross_attention_layers")
"""Config entries that list layer indices. Every other list named `*layer*` with one entry a layer lists per-layer settings."""


def _sync_config(config: Any, position: int, num_layers: int) -> None:
    """Take layer `position` out of every per-layer entry of the config."""
    values = config.to_dict()
    for key, value in values.items():
        if not isinstance(value, list) or "layer" not in key:
            continue
        if key in LAYER_INDEX_LISTS:
            setattr(config, key, [i - (i > position) for i in value if i != position])
        elif len(value) == num_layers:
            setattr(config, key, [v for i, v in enumerate(value) if i != position])
    window = getattr(config, "max_window_layers", None)
    if window is not None and position < window:
        config.max_window_layers = window - 1
    config.num_hidden_layers = num_layers - 1


def _sync_quantization_config(decoder: Decoder) -> None:
    """Keep the config's table of ranks equal to the model: it is what a loader rebuilds the model from."""
    model = decoder.model
    pairs = {path: module for path, module in model.named_modules() if is_low_rank(module)}
    if pairs:
        pivoted = [path for path, module in pairs.items() if getattr(module, "pivoted", False)]
        model.config.quantization_config = GraspConfig({path: module.rank for path, module in pairs.items()}, pivoted=pivoted)
        carry_code(model)
