"""Narrowed layers with zeros in the place of what went, up to one width for all of them: what an
ordinary checkpoint of the architecture can hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grasp.core.axes import AXES, Sizes
from grasp.core.decoder import Decoder
from grasp.core.edits.cuts import sizes_of
from grasp.core.edits.slicing import check_unsliced
from grasp.core.families import Family
from grasp.core.layer import is_low_rank, is_quantized
from grasp.core.layers.reading_grasp import features, record_of
from grasp.core.layers.structure_grasp import Record, structure_of


def is_narrowed(record: Record | None) -> bool:
    """Whether a record, or one inside it, is of a matrix that became narrow."""
    return record is not None and (record["kind"] == "narrow" or is_narrowed(record.get("of")))


def widths(decoder: Decoder) -> dict[int, Sizes]:
    """The axes of every layer as it is now; empty where nothing in the model is narrow."""
    if not any(is_narrowed(record) for record in structure_of(decoder.model).values()):
        return {}
    return {index: sizes_of(decoder, index) for index in decoder.kept}


def widest(decoder: Decoder, layers: dict[int, Sizes]) -> Sizes:
    """The axes that every layer can have: the heads of the config, the channels of the widest."""
    own, channels = Sizes.of(decoder.config), max(sizes.channels for sizes in layers.values())
    return replace(own, channels=channels or own.channels)


def shape(family: Family, path: str, sizes: Sizes) -> tuple[int, int]:
    """(out, in) of the matrix at `path` inside a layer of these sizes."""
    roles = _roles(family, path)
    rows = sum(sizes.length(AXES[role][0]) for role in roles)
    return rows, sizes.length(AXES[roles[0]][1])


@torch.no_grad()
def whole(module: Any) -> tuple[Tensor, Tensor | None]:
    """(W (out, in), b (out) or None) that one of our modules stands for, in its dtype; products are
    taken in float32.
    """
    dtype, bias = module.weight.dtype, module.bias
    if is_low_rank(module):
        module.joint = None
        return module.float().product().to(dtype), None if bias is None else bias.to(dtype)
    matrix, (fan_in, fan_out) = module.weight, features(module)
    if module.in_places is not None:
        wide = matrix.new_zeros(len(matrix), fan_in)
        matrix = wide.index_copy(1, module.in_places.long(), matrix)
    if module.out_places is not None:
        places = module.out_places.long()
        matrix = matrix.new_zeros(fan_out, fan_in).index_copy(0, places, matrix)
        bias = None if bias is None else bias.new_zeros(fan_out).index_copy(0, places, bias)
    return matrix, bias


def widened(
    family: Family, path: str, matrix: Tensor, bias: Tensor | None, here: Sizes, there: Sizes
) -> tuple[Tensor, Tensor | None]:
    """W (out, in) and b (out) of a layer of the sizes `here` in one of the sizes `there`: zeros
    behind each axis.

    A head or channel of zeros adds nothing: its columns in o and down are zeros too.
    """
    roles = _roles(family, path)
    old = torch.cat([family.rows(role, here) for role in roles])
    new = torch.cat([family.rows(role, there, _units(here, AXES[role][0])) for role in roles])
    columns = family.columns(roles[0], there, _units(here, AXES[roles[0]][1]))
    found = matrix.new_zeros(shape(family, path, there))
    found[new[:, None], columns] = matrix[old]
    if bias is None:
        return found, None
    wide = bias.new_zeros(len(found))
    wide[new] = bias[old]
    return found, wide


def _units(sizes: Sizes, axis: str) -> range:
    return range(sizes.units(axis)[0])


def _roles(family: Family, path: str) -> list[str]:
    return next(roles for roles, place in family.matrices if place == path).split("+")


def dense_parameters(decoder: Decoder) -> int:
    """Numbers the model stores once its pairs are multiplied out and its layers filled up. Raises
    `ModelError` where that cannot be.
    """
    check_unsliced(decoder, "no ordinary model holds it; export it as onnx or openvino")
    layers, size = widths(decoder), decoder.num_parameters()
    there = widest(decoder, layers) if layers else None
    for path, module in decoder.model.named_modules():
        record = record_of(module)
        if record is None or record["kind"] == "experts" or _is_dense(record):
            continue
        fan_in, rows = features(module)
        if there is not None:
            rows, fan_in = shape(decoder.family, decoder.locate(path)[1], there)
        size += rows * fan_in + (0 if module.bias is None else rows)
        size -= _numbers(module)
    return size


def _is_dense(record: Record) -> bool:
    """Whether it is of a whole matrix in few bits."""
    return record["kind"] == "quantized" and "of" not in record


def _numbers(module: Any) -> int:
    """Those that a module of ours stores, however few bits each takes."""
    if is_quantized(module):
        return int(module.num_parameters())
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
