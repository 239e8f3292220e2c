"""Whether a model is one that the format compressed-tensors can hold, but for its bits."""

from __future__ import annotations

from typing import Any

from torch import nn

from grasp.core.decoder import Decoder
from grasp.core.experts import mixture
from grasp.core.layer import matrix_in
from grasp.core.layers.structure_grasp import Record, structure_of
from grasp.errors import RecipeError


def check_sayable(decoder: Decoder, flag: str, way_out: str) -> None:
    """Raise `RecipeError`, beginning with `flag`, where something of the model but bits is beyond
    the format: pairs, MLPs of several widths, matrices that are no `nn.Linear`, experts (they keep
    16 bits, and transformers 5.23 drops dense experts beside rounded linears when it reads them).
    """
    for path, record in structure_of(decoder.model).items():
        inner = record.get("of") if record["kind"] == "quantized" else record
        if inner is not None:
            raise RecipeError(f"{flag}: '{path}' {_beyond(inner)}; {way_out}")
    for layer in decoder.layers():
        if mixture(decoder, layer.index) is not None:
            raise RecipeError(
                f"{flag}: layer {layer.index} has experts, which keep 16 bits, and transformers"
                f" cannot read such a file; {way_out}"
            )
        for _, name in decoder.family.matrices:
            module: Any = matrix_in(layer.module, name)
            kind = getattr(module, "replaced", type(module))
            if module is not None and not issubclass(kind, nn.Linear):
                raise RecipeError(
                    f"{flag}: '{name}' of every layer is a {kind.__name__}, and the format has"
                    f" linears alone; {way_out}"
                )


def _beyond(record: Record) -> str:
    """What a record asks for that the format has no words for."""
    if record["kind"] == "low-rank":
        return "is a low-rank pair, which the format cannot hold"
    if record["kind"] == "narrow":
        return "is narrower than the config says, which the format cannot hold"
    return f"is of the kind '{record['kind']}', which the format cannot hold"
