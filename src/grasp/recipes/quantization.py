"""How weights are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grasp.core.compressed_tensors import COMPRESSED_TENSORS, GRASP, LAYOUTS
from grasp.core.fields import REQUIRED, flag
from grasp.recipes.part import Part


@dataclass(frozen=True, kw_only=True)
class QuantizationRecipe(Part):
    """Bits, and what of the arithmetic is rounded."""

    title: ClassVar[str] = "Rounding"

    bits: int = flag(
        REQUIRED,
        "8 (one scale a row), or 6, 5, 4, 3 (a scale and a minimum for every group of numbers of a"
        " row; not pivoted pairs), for every linear of the decoder layers, dense or low-rank.",
        words=(8, 6, 5, 4, 3),
    )
    activations: str = flag(
        "float",
        "float (as they are), or int8: what each product reads in 8 bits too, with one scale a"
        " token (--bits 8).",
        words=("float", "int8"),
    )
    group_size: int = flag(
        32,
        "Numbers that share a scale (fewer than 8 bits); what the 4-bit kernels of torch take.",
        words=(32, 64, 128, 256),
    )
    embeddings: int = flag(
        16,
        "Bits of the embedding and of the output layer: 16 (as they are), 8 (one scale a row), 6 or"
        " 4 (with groups). Tied ones are stored once.",
        words=(16, 8, 6, 4),
    )
    layout: str = flag(
        GRASP,
        f"{COMPRESSED_TENSORS}: only what `grasp export --format {COMPRESSED_TENSORS}` writes, for"
        " servers' own kernels: 8 bits, or 4 without minima; no pairs.",
        words=LAYOUTS,
    )
