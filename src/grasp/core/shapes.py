"""What the layers of a model are made of, and what is left of it after all edits: the entry
"layers" of `grasp.json`, one a decoder layer of the model as it was loaded.

    {"widths": {"channels": 1536, "kv_groups": 3, "value_dims": 192, "key_dims": 192},
     "mlp": {...},
     "attention": {"self_attn.q_proj":
         {"of": [576, 576], "left": [576, 576], "numbers": 115200, "rank": 100}}}

`of` and `left` are rows and columns of W (out, in), before and after; `numbers` are those that are
stored of it now, without the bias, 0 where the matrix is gone; `rank` is that of a low-rank pair.
`widths` are those before; none are told of a family that was read off the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from grasp.core.axes import Sizes
from grasp.core.decoder import Decoder
from grasp.core.layer import is_low_rank, is_quantized, matrix_in
from grasp.core.layers.reading_grasp import features


class Matrix(NamedTuple):
    """Rows and columns of W (out, in), the numbers that are stored of it, its rank as a pair."""

    rows: int = 0
    columns: int = 0
    numbers: int = 0
    rank: int | None = None


@dataclass(frozen=True)
class Shapes:
    """By layer: its widths, and its matrices by part and path inside the layer."""

    widths: dict[int, dict[str, int]]
    matrices: dict[int, dict[str, dict[str, Matrix]]]

    @classmethod
    def of(cls, decoder: Decoder) -> Shapes:
        """The model as it is now: of layers that are gone, nothing."""
        widths, matrices = {}, {}
        for layer in decoder.layers():
            widths[layer.index] = _widths(decoder, layer.module)
            matrices[layer.index] = _matrices(decoder, layer.module)
        return cls(widths, matrices)

    def beside(self, now: Shapes) -> list[dict[str, Any]]:
        """The manifest's "layers", these being the shapes before and `now` those after."""
        return [
            {
                "widths": self.widths[layer],
                **{
                    part: {
                        path: _told(was, now.matrices.get(layer, {}).get(part, {}).get(path))
                        for path, was in found.items()
                    }
                    for part, found in parts.items()
                },
            }
            for layer, parts in sorted(self.matrices.items())
        ]


def _told(was: Matrix, now: Matrix | None) -> dict[str, Any]:
    now = now or Matrix()
    told: dict[str, Any] = {"of": [was.rows, was.columns], "left": [now.rows, now.columns]}
    told["numbers"] = now.numbers
    return told if now.rank is None else told | {"rank": now.rank}


def _matrices(decoder: Decoder, layer: nn.Module) -> dict[str, dict[str, Matrix]]:
    family = decoder.family
    parts = {"attention": family.attention, "mlp": family.mlp}
    found = {
        part: {
            path: _matrix(module)
            for _, path in matrices
            if (module := matrix_in(layer, path)) is not None
        }
        for part, matrices in parts.items()
    }
    return {part: matrices for part, matrices in found.items() if matrices}


def _matrix(module: Any) -> Matrix:
    columns, rows = features(module)
    if is_quantized(module):
        biases = 0 if module.bias is None else rows
        return Matrix(rows, columns, module.num_parameters() - biases, module.rank)
    if is_low_rank(module):
        numbers = module.weight.numel() + module.weight_in.numel()
        return Matrix(rows, columns, numbers, module.rank)
    shape = module.weight.shape
    rows, columns = shape if isinstance(module, nn.Linear) else shape[::-1]
    return Matrix(rows, columns, module.weight.numel())


def _roles(decoder: Decoder) -> set[str]:
    """What the matrices of the family are for; paths where the family was read off the model."""
    return {role for roles, _ in decoder.family.matrices for role in roles.split("+")}


def _widths(decoder: Decoder, layer: nn.Module) -> dict[str, int]:
    """The widths that can become narrower, of a layer that has them."""
    family, found = decoder.family, {}
    for role in {"down", "o"} & _roles(decoder):
        module = matrix_in(layer, family.path(role))
        if module is None:
            continue
        width = features(module)[0]
        if role == "down":
            found["channels"] = width
            continue
        sizes = Sizes.of(decoder.config)
        groups = width // sizes.head_dim // sizes.group
        dims = groups * sizes.head_dim
        found |= {"kv_groups": groups, "value_dims": dims, "key_dims": dims}
    return found
