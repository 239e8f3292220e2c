"""The family of a model: its row in the table, placed where this model keeps it; failing that, a
row read off the model itself.

A model of no row is understood where its decoder layers are nearly all plain linears. They may
differ in which: a hybrid model has layers of two kinds, and `Decoder.layer` gives of each what is
there. What a matrix read off so is for is not known, so such a row has no roles and no axes.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from grasp.core.families import FAMILIES, Ends, Family
from grasp.core.layer import matrix_in, module_in
from grasp.core.layers.reading_grasp import text_decoder
from grasp.errors import ModelError

logger = logging.getLogger(__name__)

_ADD_A_ROW = "to support it, add a row to src/grasp/core/families.py (see CONTRIBUTING.md)"
_MOSTLY = 0.9
"""Share of a layer's parameters that plain linears must hold for a layer to be understood by
inspection.
"""


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
    family = _inspect(model, model_type)
    logger.warning(
        "no family row for model type '%s': found %d layers at '%s' with the linears %s by"
        " inspection",
        model_type,
        len(model.get_submodule(family.layers)),  # type: ignore[arg-type]
        family.layers,
        ", ".join(path for _, path in family.matrices),
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
            f"the model is not laid out as {family.name}: {missing}; {_ADD_A_ROW}"
        ) from None
    needed = {path: matrix_in for roles, path in family.matrices if roles != path}
    if family.experts is not None:
        needed |= {family.experts.path: module_in, family.experts.router: module_in}
    for path, found_in in needed.items():
        if all(found_in(layer, path) is None for layer in layers):
            raise ModelError(
                f"the model is not laid out as {family.name}: no layer of {family.layers} has"
                f" '{path}'; {_ADD_A_ROW}"
            )


def _inspect(model: nn.Module, model_type: str) -> Family:
    """Read a row off the model: the largest list of modules in its text decoder, and the plain
    linears that its layers have, all or some of them.
    """
    begin, decoder = text_decoder(model)
    lists = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    if not lists:
        raise ModelError(f"model type '{model_type}' has no list of decoder layers; {_ADD_A_ROW}")
    name, layers = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    linears = [
        [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for layer in layers
    ]
    for index, (layer, found) in enumerate(zip(layers, linears, strict=True)):
        held, others = _numbers(layer)
        if not found or held < _MOSTLY * (held + others):
            raise ModelError(
                f"model type '{model_type}' is unknown, and plain linears hold only"
                f" {held / max(held + others, 1):.0%} of layer {index}:"
                f" {_holder(layer)} holds most of the rest; {_ADD_A_ROW}"
            )
    paths = list(dict.fromkeys(path for found in linears for path in found))
    for path in paths:
        having = [index for index, found in enumerate(linears) if path in found]
        if "cross" in path and len(having) < len(layers):
            raise ModelError(
                f"model type '{model_type}' is unknown, and its layers differ in kind: layer"
                f" {having[0]} has '{path}', which text alone does not run; {_ADD_A_ROW}"
            )
    attention = tuple((path, path) for path in paths if "attn" in path or "attention" in path)
    mlp = tuple((path, path) for path in paths if (path, path) not in attention)
    return Family(
        f"{model_type} (by inspection)",
        (model_type,),
        ".".join(filter(None, (begin, name))),
        attention,
        mlp,
    )


def _numbers(layer: nn.Module) -> tuple[int, int]:
    """(numbers of a layer's linears, all others). A low-rank pair counts as the matrix it stands
    for, or a compressed layer would be understood no more.
    """
    held = others = 0
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            held += module.in_features * module.out_features
        else:
            others += sum(p.numel() for p in module.parameters(recurse=False))
    return held, others


def _holder(layer: nn.Module) -> str:
    """The class that holds most of a layer's numbers beside its plain linears."""
    sizes = Counter[str]()
    for module in layer.modules():
        if not isinstance(module, nn.Linear):
            sizes[type(module).__name__] += sum(p.numel() for p in module.parameters(recurse=False))
    return sizes.most_common(1)[0][0]
