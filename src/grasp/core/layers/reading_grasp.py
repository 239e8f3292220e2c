"""What the files of a checkpoint hold, against the model they are read into.

Nothing is filled in, left out or guessed: a weight that is missing or has no place, factors that
are not floating point, places that are not an order of the outputs, are each a `ValueError` of one
line. A file that a checkpoint carries: it needs torch and transformers and nothing else.

A checkpoint may be read by another class than the one that was saved (`AutoModel`, a classifier,
the text model of a multimodal one). Its paths then begin otherwise, and the heads differ, as
transformers allows; the decoder layers must be all there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an `nn.Linear` or a GPT-2 `Conv1D`, whose weight is stored
    (in, out).
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    fan_in, fan_out = module.weight.shape  # type: ignore[misc]
    return int(fan_in), int(fan_out)


def record_of(module: nn.Module) -> dict[str, Any] | None:
    """The record of one of our modules; None of an ordinary one."""
    told = getattr(module, "record", None)
    return told() if callable(told) else None


def text_decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """(path, module) of the text decoder inside a model: its body, or that of the language model
    inside a multimodal one.
    """
    found: Any = model
    for _ in range(5):  # a language model inside a wrapper has a decoder of its own
        inner = found.get_decoder() if callable(getattr(found, "get_decoder", None)) else found
        if inner is found or not isinstance(inner, nn.Module):
            break
        found = inner
    return next((path for path, module in model.named_modules() if module is found), ""), found


def own_path(model: nn.Module, path: str, what: str = "linear") -> str:
    """Where that is in this model which config.json calls `path`, as it may be of another class
    than the one saved: a "linear" of a decoder layer, its "experts", a "layer", or an "end", which
    is in none.
    """
    if _is_there(model, path, what):
        return path
    parts, begin = path.split("."), text_decoder(model)[0]
    for start in range(len(parts)):
        rest = ".".join(parts[start:])
        if what != "end" and not any(part.isdigit() for part in parts[start:]):
            break  # what is left no longer says which layer
        for candidate in (rest, f"{begin}.{rest}"):
            if _is_there(model, candidate, what):
                return candidate
    word = "module" if what == "end" else what
    raise ValueError(f"config.json names the {word} '{path}', which {type(model).__name__} lacks")


def _is_there(model: nn.Module, path: str, what: str) -> bool:
    try:
        found = model.get_submodule(path)
        parent = model.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        return False
    if what == "end":
        return True
    if what == "experts":
        return hasattr(found, "num_experts")
    is_layer = isinstance(parent, nn.ModuleList)
    return is_layer if what == "layer" else isinstance(found, (nn.Linear, Conv1D))


def watch_keys(model: Any, paths: list[str]) -> None:
    """Have `check_keys` called once transformers knows which weights are missing, have no place, or
    do not fit. `paths`: of our linears, as config.json has them.
    """
    adjust = getattr(model, "_adjust_missing_and_unexpected_keys", None)
    if adjust is None:
        return

    def adjusted(info: Any) -> None:
        adjust(info)
        unwatch(model)
        check_keys(model, info, paths)

    model._adjust_missing_and_unexpected_keys = adjusted  # of this one model, until it is loaded


def unwatch(model: Any) -> None:
    """Undo `watch_keys`."""
    vars(model).pop("_adjust_missing_and_unexpected_keys", None)


def check_keys(model: Any, info: Any, paths: list[str]) -> None:
    """Raise `ValueError` where weights are missing, have no place or do not fit, but for the heads
    of a class that was not the one saved.
    """
    missing = set(info.missing_keys)
    surplus = set(info.unexpected_keys)
    mismatched = {key for key, *_ in info.mismatched_keys}
    saved = getattr(model.config, "architectures", None)
    if saved and type(model).__name__ not in saved:
        theirs = {_stack(path) for path in paths}
        body = model.base_model_prefix + "." if model.base_model is not model else ""
        missing = {key for key in missing if key.startswith(body)}
        mismatched = {key for key in mismatched if key.startswith(body)}
        surplus = {key for key in surplus if key.startswith(tuple(theirs))}
    for keys, wrong in (
        (missing, "missing from the files"),
        (mismatched, "of another shape than config.json asks for"),
    ):
        if keys:
            raise ValueError(
                f"{len(keys)} weights are {wrong}, the first is '{min(keys)}'; the checkpoint is"
                " damaged"
            )
    if surplus:
        raise ValueError(
            f"{len(surplus)} weights of the files have no place in the model that config.json"
            f" describes, the first is '{min(surplus)}'; the config or the files were changed"
        )


def _stack(path: str) -> str:
    """`model.layers.` of `model.layers.3.mlp.up_proj`."""
    parts = path.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:first]) + "."


def check_shape(path: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` for a weight of another shape than config.json gives it."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"the weight of '{path}' is {tuple(tensor.shape)}, which does not fit the ranks in"
            f" config.json: {shape}"
        )


def check_floats(path: str, **tensors: Tensor | None) -> None:
    """Raise `ValueError` for a weight that is not floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(
                f"'{path}.{name}' holds {str(tensor.dtype).removeprefix('torch.')}, not"
                " floating-point numbers"
            )


def check_kept(name: str, places: Tensor, width: int) -> None:
    """Raise `ValueError` unless `places` are rising, each below `width`."""
    if places.is_meta:
        return
    whole = places.dtype in (torch.int32, torch.int64) and places.dim() == 1
    if whole and places.numel():
        whole = bool((places.diff() > 0).all()) and int(places[0]) >= 0 and int(places[-1]) < width
    if not whole:
        raise ValueError(f"'{name}' are no rising places below {width}; the checkpoint is damaged")


def check_places(path: str, places: Tensor) -> None:
    """Raise `ValueError` unless `places` (out) names each place of the outputs once."""
    if places.is_meta:
        return
    whole = places.dtype in (torch.int32, torch.int64) and places.dim() == 1
    if not whole or not torch.equal(
        places.sort().values.long(), torch.arange(places.numel(), device=places.device)
    ):
        raise ValueError(
            f"'{path}.places' is no order of the {places.numel()} outputs; the checkpoint is"
            " damaged"
        )
