"""`grasp.json`, the manifest beside the weights of a checkpoint: how the model was made, and in
which format it is stored.

What other parts of grasp read of it is declared below and checked when it is read. Further entries
are kept as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from grasp.core import documents
from grasp.core.documents import MANIFEST
from grasp.core.edits.log import checked_entries
from grasp.errors import CheckpointError

__all__ = ["FORMAT_VERSION", "MANIFEST", "read_manifest"]

FORMAT_VERSION = 5
"""As in `modeling_grasp` (a test compares them), which is not imported: reading a manifest needs no
torch.
"""

Index = Annotated[int, Meta(ge=0, le=100_000)]
Number = Annotated[int, Meta(ge=0)]


class _Head(Struct):
    format_version: Number


class _Model(Struct):
    source: str
    family: str
    num_layers: Index
    dtype: str


class _Method(Struct):
    name: str
    paper: str
    plugin: str = ""


class _Parameters(Struct):
    before: Annotated[int, Meta(ge=1)]
    after: Annotated[int, Meta(ge=1)]
    ratio: float


class _Calibration(Struct):
    source: str
    num_samples: int
    seq_len: int
    seed: int
    ids_sha256: str
    text_sha256: str = ""


class _Prediction(Struct):
    loss_before: float
    loss_rise: float
    perplexity_ratio: float
    seen_rise: float | UnsetType = UNSET
    low: float | UnsetType = UNSET
    high: float | UnsetType = UNSET


class _Recipe(Struct):
    model: str


class _Text(Struct):
    sources: dict[str, Any] | list[str]
    tokens: Number


class _Training(Struct):
    train: str
    objective: str
    batch_size: Number


class _Look(Struct):
    step: Number
    held_out_loss: float | None = None


class _Best(Struct):
    step: Number
    held_out_loss: float


class _Recovery(Struct):
    recipe: _Training
    data: _Text
    steps: Number
    trained_parameters: Number
    curve: Annotated[list[_Look], Meta(min_length=1)]
    best: _Best
    seconds: dict[str, float]
    checkpoint: str = ""
    command: str = ""
    before: _Recovery | None = None


class _Quantization(Struct):
    scheme: str
    matrices: Number
    share: float
    bytes_before: Number
    bytes_after: Number
    checkpoint: str
    command: str
    group_size: Number | None = None
    embeddings: Number = 16
    activations: str = "float"


Shape = Annotated[list[Number], Meta(min_length=2, max_length=2)]


class _Holding(Struct):
    part: str
    stored: str
    matrices: Number
    bytes: Number


class _Matrix(Struct):
    of: Shape
    left: Shape
    numbers: Number
    rank: Number | None = None


class _Layer(Struct):
    widths: dict[str, Number]
    attention: dict[str, _Matrix] = {}
    mlp: dict[str, _Matrix] = {}


class _Manifest(_Head):
    model: _Model
    method: _Method
    parameters: _Parameters
    edits: list[dict[str, Any]]
    versions: dict[str, str]
    recipe: _Recipe | UnsetType = UNSET
    calibration: _Calibration | UnsetType = UNSET
    redundancy: dict[str, dict[str, float]] | UnsetType = UNSET
    layers: list[_Layer] | UnsetType = UNSET
    prediction: _Prediction | UnsetType = UNSET
    bytes: list[_Holding] | UnsetType = UNSET
    recovery: _Recovery | UnsetType = UNSET
    quantization: _Quantization | UnsetType = UNSET
    seconds: dict[str, float] | UnsetType = UNSET
    notes: list[str] | UnsetType = UNSET


def read_manifest(directory: Path) -> dict[str, Any]:
    """The contents of `grasp.json`. Raises `CheckpointError` where it is missing, damaged or of a
    newer format.
    """
    path, hint = directory / MANIFEST, "the checkpoint is damaged"
    manifest: dict[str, Any] = documents.read_json(path, hint=hint)
    version = documents.check(path, manifest, _Head, hint).format_version
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {version} was written by a newer grasp, this one reads up to"
            f" {FORMAT_VERSION}; run `pip install -U grasp-llm`"
        )
    documents.check(path, manifest, _Manifest, hint)
    manifest["edits"] = checked_entries(path, manifest["edits"], hint)
    return manifest
