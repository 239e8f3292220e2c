"""MLPs of one width in every layer: an ordinary model of that width, with nothing of ours in it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from grasp.core.axes import WIDTHS, width_entry
from grasp.core.building import built_layers, layers_differ, settings
from grasp.core.decoder import Decoder
from grasp.core.layer import is_narrow
from grasp.core.layers.reading_grasp import features
from grasp.core.layers.structure_grasp import structure_of


def settle(decoder: Decoder) -> None:
    """Where narrowed MLPs are all that is of ours in the model, and all layers have one width, put
    the plain modules of its class in their place and the width into the config.

    Left as it is where its class, built from such a config, would come out otherwise.
    """
    structure = structure_of(decoder.model)
    if not structure or not all(is_narrow(record) for record in structure.values()):
        return
    family = decoder.family
    paths = [path for role in ("gate", "up", "down") for path in family.holding(role)]
    names = list(dict.fromkeys(paths))
    places = {
        f"{family.layers}.{index}.{name}" for index in range(len(decoder.stack)) for name in names
    }
    entry = width_entry(decoder.config)
    if structure.keys() != places or not isinstance(getattr(decoder.config, entry, 0), int | None):
        return
    found = {features(layer.get_submodule(family.path("down")))[0] for layer in decoder.stack}
    if len(found) > 1:
        return
    config = copy.deepcopy(decoder.model.config)
    setattr(config.get_text_config(decoder=True), entry, found.pop())
    built = built_layers(decoder, config)
    if next(layers_differ(decoder.stack, built, but=WIDTHS), None) is not None:
        return
    modules = [
        (old, name, filled(new.get_submodule(name), old.get_submodule(name)))
        for old, new in zip(decoder.stack, built, strict=True)
        for name in names
    ]
    if any(module is None for *_, module in modules):
        return
    copy_widths(decoder.stack, built)
    for layer, name, module in modules:
        layer.set_submodule(name, module)
    setattr(decoder.config, entry, features(modules[-1][2])[0])


def copy_widths(layers: Iterable[nn.Module], built: Iterable[nn.Module]) -> None:
    """Give the modules of `layers` the MLP widths that they note in layers `built` from a config:
    they come out so when the model is loaded.
    """
    for old, new in zip(layers, built, strict=True):
        for path, module in old.named_modules():
            for name in settings(module).keys() & set(WIDTHS):
                setattr(module, name, getattr(new.get_submodule(path), name))


def filled(new: Any, old: Any) -> Any:
    """The empty module `new` with the numbers of the narrowed `old`; None where they do not fit."""
    matrix = old.weight
    if not isinstance(new, nn.Linear):  # GPT-2's Conv1D stores (in, out)
        matrix = nn.Parameter(matrix.detach().T.contiguous(), matrix.requires_grad)
    if new.weight.shape != matrix.shape or (new.bias is None) != (old.bias is None):
        return None
    with torch.no_grad():
        new.weight, new.bias = matrix, old.bias
    return new.train(old.training)
