"""The frozen records that travel between the stages. None of them knows a model, a method or a
file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grasp.errors import NumericsError


@dataclass(frozen=True)
class Calibration:
    """A calibration set: fixed blocks of token ids.

    `ids` (num_blocks, seq_len) int64; `mask` (num_blocks, seq_len) bool, True on real tokens, or
    None where every token is real. `source` says where the text came from, `seed` drew the places.
    """

    ids: Tensor
    source: str
    seed: int = 0
    mask: Tensor | None = None
    text_hash: str = ""

    @property
    def num_blocks(self) -> int:
        return self.ids.shape[0]

    @property
    def seq_len(self) -> int:
        return self.ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Those that are real."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def ids_hash(self) -> str:
        """sha256 of the token ids (and of the mask, if any): two runs with equal hashes saw the
        same tokens.
        """
        digest = hashlib.sha256(self.ids.numpy().astype("<i8").tobytes())
        if self.mask is not None:
            digest.update(self.mask.numpy().tobytes())
        return digest.hexdigest()

    def recipe(self) -> dict[str, Any]:
        """The flags that draw these blocks again."""
        return {
            "data": self.source,
            "num_samples": self.num_blocks,
            "seq_len": self.seq_len,
            "seed": self.seed,
        }

    def to_json(self) -> dict[str, Any]:
        """Provenance, for the manifest."""
        return {
            "source": self.source,
            "num_samples": self.num_blocks,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "ids_sha256": self.ids_hash,
            "text_sha256": self.text_hash,
        }


@dataclass(frozen=True)
class Text:
    """A text source: its rows (documents, lines) and what goes between them where they are read as
    one text.
    """

    name: str
    rows: tuple[str, ...]
    join: str

    @property
    def whole(self) -> str:
        """All of it as one text."""
        return self.join.join(self.rows)

    @property
    def sha256(self) -> str:
        """Hash of the whole."""
        digest = hashlib.sha256()
        for number, row in enumerate(self.rows):
            digest.update(self.join.encode() if number else b"")
            # encoded whole, a large text would be in memory twice
            for start in range(0, len(row), 1 << 20):
                digest.update(row[start : start + (1 << 20)].encode("utf-8", "replace"))
        return digest.hexdigest()

    @property
    def rule(self) -> str:
        """How the rows were joined, for people."""
        return (
            "read whole"
            if len(self.rows) == 1
            else f"{len(self.rows):,} rows joined by {self.join!r}"
        )


@dataclass(frozen=True)
class Statistics:
    """What one sweep over a calibration set measured: one table per collector, made of its sums.

    `tables[name]` maps a layer index or a matrix path to a tensor or a record. `loss` is the mean
    cross-entropy in nats a token, None after a sweep without a loss.
    """

    tables: Mapping[str, Mapping[Any, Any]]
    num_tokens: int
    loss: float | None = None

    def __getitem__(self, name: str) -> Mapping[Any, Any]:
        try:
            return self.tables[name]
        except KeyError:
            raise KeyError(
                f"the sweep did not collect '{name}'; it has {sorted(self.tables)}"
            ) from None


@dataclass(frozen=True)
class Curvature:
    """How a matrix W (out, in) may change before the loss rises: sums over tokens, kept on the
    shorter side of W.

    With x the input and d the gradient of the summed loss at the output: tall (in <= out) `near` =
    sum xx', `far` = W' (sum dd') W, both (in, in); wide `near` = sum dd', `far` = W (sum xx') W',
    both (out, out). `input_square` = sum |x|^2, `gradient_square` = sum |d|^2. X is summed over
    `input_tokens`, D over `gradient_tokens`. Matrices that read the same input share one tensor.
    After forward passes alone the sums of d are a scalar 0. `inputs` = sum xx' (in, in) of a wide
    matrix where that was asked for; `far` is a scalar 0 then. Sums over disjoint tokens add up.
    """

    near: Tensor
    far: Tensor
    input_square: float
    gradient_square: float
    input_tokens: int
    gradient_tokens: int
    inputs: Tensor | None = None

    def __add__(self, other: Curvature) -> Curvature:
        return Curvature(
            self.near + other.near,
            self.far + other.far,
            self.input_square + other.input_square,
            self.gradient_square + other.gradient_square,
            self.input_tokens + other.input_tokens,
            self.gradient_tokens + other.gradient_tokens,
            None if self.inputs is None or other.inputs is None else self.inputs + other.inputs,
        )


@dataclass(frozen=True)
class Redundancy:
    """How little each decoder layer changes its input. Lower = more redundant.

    `scores`: layer index -> block influence in [0, 2] (kind "bi"), or, for kind "angular", the
    angular distance in [0, 1] of the layer alone. `span_distance` (num_layers + 1, num_layers + 1):
    for kind "angular", the distance between the inputs of layers i and j; the last row and column
    stand for the output of the last layer.
    """

    kind: str
    scores: Mapping[int, float]
    span_distance: Tensor | None = None

    def lowest(self, count: int) -> tuple[int, ...]:
        """The `count` most redundant layers in order of index: the lowest scores, or the closest
        contiguous span.
        """
        layers = list(self.scores)
        if self.span_distance is None:
            return tuple(sorted(sorted(layers, key=lambda i: (self.scores[i], i))[:count]))
        starts = range(len(layers) - count + 1)
        best = min(starts, key=lambda i: float(self.span_distance[i, i + count]))  # type: ignore[index]
        return tuple(layers[best : best + count])


@dataclass(frozen=True)
class Attribution:
    """The importance of every singular group of one matrix. Higher = keep. All tensors are (k,),
    ordered by falling sigma.
    """

    path: str
    score: str
    scores: Tensor
    singular_values: Tensor

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.scores).all()):
            raise NumericsError(
                f"{self.path}: attribution scores are not finite; check the model's weights and"
                " dtype"
            )


@dataclass(frozen=True)
class Allocation:
    """The size of every component that was chosen, by name: the rank of a matrix, the channels of
    an MLP. None: it stays as it is.
    """

    sizes: Mapping[str, int | None]
