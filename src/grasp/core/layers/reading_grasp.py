"""What config.json says, and what the files hold, against the model they are read into: the third
file that a checkpoint carries.

Nothing is filled in, left out or guessed: a table that makes no sense, a weight that is missing or
has no place, factors that are not floating point, places that are not an order of the outputs, are
each a `ValueError` of one line. It needs torch and transformers, like its neighbours.

A checkpoint may be read by another class than the one that was saved (`AutoModel`, a classifier,
the text model of a multimodal one). Its paths then begin otherwise, and the heads differ, as
transformers allows; the decoder layers must be all there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SCHEMES = ("int8", "int8-dynamic", "int4")
"""The ways of rounding that `quantized_grasp` knows."""


def check_table(ranks: Any, pivoted: Any, quantization: Any) -> None:
    """Raise `ValueError` where the "quantization_config" of a config.json is not what `GraspConfig`
    describes.
    """
    if not isinstance(ranks, dict):
        raise ValueError(f"config.json: 'ranks' is {ranks!r}; it must give a rank to each path")
    for path, rank in ranks.items():
        if type(rank) is not int or rank < 0:
            raise ValueError(
                f"config.json: the rank of '{path}' is {rank!r}; it must be a whole number, 0 or"
                " more"
            )
    _check_paths("pivoted", pivoted)
    if unknown := sorted(set(pivoted) - ranks.keys()):
        raise ValueError(f"config.json: '{unknown[0]}' is named as pivoted, but has no rank")
    if quantization is None:
        return
    if (
        not isinstance(quantization, dict)
        or not {"scheme", "group_size", "modules"} <= quantization.keys()
    ):
        raise ValueError(
            f"config.json: 'quantization' is {quantization!r}; it must hold scheme, group_size and"
            " modules"
        )
    scheme, size = quantization["scheme"], quantization["group_size"]
    if scheme not in SCHEMES:
        raise ValueError(
            f"config.json: the quantization scheme {scheme!r} is unknown; known are"
            f" {', '.join(SCHEMES)}"
        )
    if type(size) is not int or size < 1:
        raise ValueError(f"config.json: the group_size {size!r} must be a whole number, 1 or more")
    _check_paths("modules", quantization["modules"])


def _check_paths(name: str, paths: Any) -> None:
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"config.json: '{name}' is {paths!r}; it must be a list of paths")
    if len(set(paths)) < len(paths):
        raise ValueError(f"config.json: '{name}' names a path twice")


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


def own_path(model: nn.Module, path: str) -> str:
    """Where the linear that config.json calls `path` is in this model, which may be of another
    class than the one saved.
    """
    if _is_linear(model, path):
        return path
    parts, begin = path.split("."), text_decoder(model)[0]
    for start in range(len(parts)):
        rest = ".".join(parts[start:])
        if not any(part.isdigit() for part in parts[start:]):
            break  # what is left no longer says which layer
        for candidate in (rest, f"{begin}.{rest}"):
            if _is_linear(model, candidate):
                return candidate
    raise ValueError(f"config.json names the linear '{path}', which {type(model).__name__} lacks")


def _is_linear(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(model.get_submodule(path), (nn.Linear, Conv1D))
    except AttributeError:
        return False


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


def check_floats(path: str, **tensors: Tensor | None) -> None:
    """Raise `ValueError` for a weight that is not floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(
                f"'{path}.{name}' holds {str(tensor.dtype).removeprefix('torch.')}, not"
                " floating-point numbers"
            )


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
