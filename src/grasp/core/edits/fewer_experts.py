"""Modules of a layer with fewer experts, and the config's entry that counts them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from grasp.core.building import built_layers
from grasp.core.decoder import Decoder
from grasp.core.edits.base import Undo
from grasp.core.experts import mixtures
from grasp.errors import ModelError

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Under which names a configuration, or a model, gives the number of experts of every layer."""


def fewer(old: nn.Module, count: int, keep: Sequence[int]) -> nn.Module:
    """The same module, of experts or a router, with these of its `count` experts: every parameter
    and buffer that has an entry for each keeps theirs.
    """
    new: Any = copy.copy(old)
    places = torch.tensor(list(keep))
    new._parameters, new._buffers = dict(old._parameters), dict(old._buffers)
    for name, parameter in old._parameters.items():
        if parameter is not None and len(parameter) == count:
            kept = parameter.detach()[places.to(parameter.device)]
            new._parameters[name] = nn.Parameter(kept, parameter.requires_grad)
    for name, buffer in old._buffers.items():
        if buffer is not None and buffer.dim() and len(buffer) == count:
            new._buffers[name] = buffer[places.to(buffer.device)]
    new.num_experts = len(places)
    return new


def count_in_config(decoder: Decoder, left: int) -> Undo:
    """Make the config and the model say that layers have `left` experts. Returns what makes the
    model say again what it said; the config is the caller's to bring back.
    """
    _count(decoder.config, left)
    own = vars(decoder.model)
    before = {name: own[name] for name in COUNTS if isinstance(own.get(name), int)}
    own.update(dict.fromkeys(before, left))
    return lambda: own.update(before)


def _count(config: Any, left: int) -> None:
    for name in COUNTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, left)


def check_buildable(decoder: Decoder, left: int) -> None:
    """Raise `ModelError` where the model's class, built from a config with `left` experts, would
    not have so many in the layers that have some.
    """
    config = copy.deepcopy(decoder.model.config)
    _count(config.get_text_config(decoder=True), left)
    where = decoder.family.experts
    assert where is not None
    places = {decoder.kept.index(one.layer) for one in mixtures(decoder)}
    for place, layer in enumerate(built_layers(decoder, config)):
        if place not in places:
            continue
        counts = {layer.get_submodule(path).num_experts for path in (where.path, where.router)}
        if counts != {left}:
            raise ModelError(
                f"a '{decoder.config.model_type}' model with {left} experts a layer would load"
                f" again with {max(counts)} in layer {place}; whole experts cannot go"
            )
