"""What a decoder layer is besides its weights: its modules and their settings, such as the window
of an attention.

transformers builds them from the config and the layer's index, and saves neither. So a layer that
moves forward when one before it is dropped is built anew, and it has to come out the same: by
config lists that run along the layers and are cut with them, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grasp.core.layers.reading_grasp import record_of

if TYPE_CHECKING:
    from grasp.core.decoder import Decoder

INDEX = ("layer_idx", "layer_id", "layer_number", "layer_num")
"""Attributes that hold the layer's own index."""
IDLE = ("training", "gradient_checkpointing", "p")
"""Settings that do not matter to a model that answers; what is named after dropout does not either.
"""


def layers_differ(
    here: Iterable[nn.Module], there: Iterable[nn.Module], but: tuple[str, ...] = ()
) -> Iterator[str]:
    """Where the layers `there` are not built as the layers `here`: modules, shapes of dense
    weights, and settings (not those named in `but`).
    """
    for index, (old, new) in enumerate(zip(here, there, strict=True)):
        now = dict(new.named_modules())
        for path, module in old.named_modules():
            place = f"layers.{index}{'.' * bool(path)}{path}"
            if path not in now:
                yield f"there is no '{place}'"
                continue
            if record_of(module) is not None:
                continue  # one of ours: config.json has a record of it
            found = settings(now[path])
            for name, value in settings(module).items():
                if name in found and name not in but and found[name] != value:
                    yield f"'{place}.{name}' is {found[name]}, not {value}"
            for name, tensor in (
                module.named_parameters(recurse=False) if type(module) is type(now[path]) else ()
            ):
                other = getattr(now[path], name, None)
                if other is None or other.shape != tensor.shape:
                    yield (
                        f"'{place}.{name}' is {None if other is None else tuple(other.shape)}, not"
                        f" {tuple(tensor.shape)}"
                    )


def built_layers(decoder: Decoder, config: Any) -> Any:
    """The decoder layers as the model's class makes them of `config`, without memory (meta
    device).
    """
    with torch.device("meta"):
        return type(decoder.model)(config).get_submodule(decoder.family.layers)


def settings(module: nn.Module) -> dict[str, Any]:
    """The plain values that a module holds."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None)))
    }
    return {
        name: value
        for name, value in plain.items()
        if name[0] != "_" and name not in IDLE and "drop" not in name
    }
