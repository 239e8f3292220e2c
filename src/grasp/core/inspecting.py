"""The family of a model: its row in the table, placed where this model keeps it; failing that, a
row read off the model itself (`grasp.core.unlisted`).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn

from grasp.core.families import FAMILIES, Ends, Family
from grasp.core.layer import matrix_in, module_in
from grasp.core.layers.reading_grasp import text_decoder
from grasp.core.unlisted import ADD_A_ROW, left_alone, read_off
from grasp.errors import ModelError

logger = logging.getLogger(__name__)


def find_family(model: nn.Module, model_type: str) -> Family:
    """The row for `model_type`; failing that, a row read off the model itself, with a notice.
    Raises `ModelError`.

    Its `layers` is the path in this model: a multimodal one has its text decoder further in.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            here = _placed(model, family)
            _check(model, here)
            return here
    family = read_off(model, model_type)
    layers: Any = model.get_submodule(family.layers)
    experts = family.experts
    logger.warning(
        "no family row for model type '%s': found %d layers at '%s' with the linears %s%s by"
        " inspection%s",
        model_type,
        len(layers),
        family.layers,
        ", ".join(path for _, path in family.matrices),
        f", and experts at {experts.path}" if experts else "",
        left_alone(layers, family),
    )
    return family


def _placed(model: nn.Module, family: Family) -> Family:
    """A row with the paths that its layers and ends have in this model."""
    layers = _layers_path(model, family)
    if family.ends is None:
        return replace(family, layers=layers)
    before, now = (path.rpartition(".")[0] for path in (family.layers, layers))

    def here(path: str) -> str:
        inside = path.removeprefix(before + ".")
        return ".".join(filter(None, (now, inside))) if inside != path else path

    ends = family.ends
    return replace(
        family,
        layers=layers,
        ends=Ends(
            here(ends.embedding),
            here(ends.norm),
            _head_path(model) or ends.head,
            here(ends.positions),
            tuple(map(here, ends.between)),
        ),
    )


def _head_path(model: Any) -> str:
    """Where a model keeps its head; empty for one that has none."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), "")


def _layers_path(model: nn.Module, family: Family) -> str:
    """Where this model keeps the layers of a family: the end of the row's path, below the text
    decoder.
    """
    parts, begin = family.layers.split("."), text_decoder(model)[0]
    for start in range(len(parts)):
        path = ".".join(([begin] if begin else []) + parts[start:])
        try:
            if isinstance(model.get_submodule(path), nn.ModuleList):
                return path
        except AttributeError:
            continue
    return family.layers


def _check(model: nn.Module, family: Family) -> None:
    """Raise `ModelError` where the layers are not there, or a matrix or the experts of the row are
    in none. What stands beside experts, without a role, a model may lack.
    """
    try:
        layers: Any = model.get_submodule(family.layers)
    except AttributeError as missing:
        raise ModelError(
            f"the model is not laid out as {family.name}: {missing}; {ADD_A_ROW}"
        ) from None
    needed = {path: matrix_in for roles, path in family.matrices if roles != path}
    if family.experts is not None:
        needed |= {family.experts.path: module_in, family.experts.router: module_in}
    for path, found_in in needed.items():
        if all(found_in(layer, path) is None for layer in layers):
            raise ModelError(
                f"the model is not laid out as {family.name}: no layer of {family.layers} has"
                f" '{path}'; {ADD_A_ROW}"
            )


def beside_text(model: Any) -> str:
    """What of a multimodal model is no part of its text decoder, and stays as it is; "" of a model
    of text alone.
    """
    begin, head = text_decoder(model)[0], model.get_output_embeddings()
    inside, found = begin.split("."), dict[str, nn.Module]()
    for depth, name in enumerate(inside):
        place = ".".join(inside[:depth])
        around = model.get_submodule(place) if place else model
        for other, module in around.named_children():
            if other != name and module is not head:
                found[f"{place}.{other}" if place else other] = module
    total = sum(p.numel() for p in model.parameters())
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in found.items()}
    named = [f"{path} ({size / total:.0%} of all numbers)" for path, size in sizes.items() if size]
    if not named:
        return ""
    return f"only the text decoder, {begin}, is compressed; left as it is: {', '.join(named)}"
