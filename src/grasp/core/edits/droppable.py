"""What a config says layer by layer, cut when a layer goes, and whether it can go.

transformers builds layers from the config and their index, and saves neither. So a layer that moves
forward when one before it is dropped is built anew, and it has to come out the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from grasp.core.building import INDEX, built_layers, layers_differ
from grasp.core.decoder import Decoder
from grasp.core.edits.placing import renumber, sync
from grasp.core.edits.slicing import check_unsliced
from grasp.errors import ModelError, RecipeError


def take_out(decoder: Decoder, layer: int) -> None:
    """Remove the decoder layer of index `layer`, which `check_droppable` has passed."""
    position, stack = decoder.kept.index(layer), decoder.stack
    _sync_config(decoder.config, position, len(stack))
    del stack[position]
    decoder.kept.remove(layer)
    renumber(decoder)
    sync(decoder)


def check_droppable(decoder: Decoder, layers: Iterable[int]) -> None:
    """Raise `ModelError` where the model without `layers` would not be built from its config as it
    is in memory, and so not load again; `RecipeError` for a layer that is not there, or the last.
    """
    model, layers = decoder.model, list(layers)
    check_unsliced(decoder, "each layer hands on in a basis of its own and none can be dropped")
    for layer in layers:
        if layer not in decoder.kept:
            raise RecipeError(
                f"layer {layer} is not in the model; it has layers 0 to {decoder.num_layers - 1}"
            )
    if len(layers) == len(decoder.kept):
        raise RecipeError(
            f"layer {layers[-1]} is the last one left; a model needs at least one layer"
        )
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
        built = built_layers(decoder, config)
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


def _can_be_built(decoder: Decoder) -> bool:
    try:
        return len(built_layers(decoder, decoder.model.config)) > 0
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
