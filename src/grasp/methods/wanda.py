"""Wanda: A Simple and Effective Pruning Approach for Large Language Models (Sun et al., arXiv
2306.11695): pruning by weights and activations.

1. Go through the layers, first to last. Sweep the calibration set on the model as it is now, so the
   inputs of a layer come from the pruned layers before it (`one_shot`: all from the dense model).
2. The score of a weight is `|W_ij| ||x_j||_2`, with x_j its input over all tokens.
3. In every row (one output), zero the `sparsity` share with the lowest scores; or the lowest N of
   every M weights next to each other (`pattern` N:M). What is left is not updated.

Zeros are numbers too: the matrices keep their shapes, so nothing becomes smaller, and nothing
faster without kernels for sparse matrices. The matrices of one layer are scored together, as in the
published code, which hands the hidden states from layer to layer; we sweep the whole model once a
layer, for the same statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Rewrite, Step
from grasp.core.fields import Share, flag
from grasp.core.linalg import wide
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.methods.base import Plan
from grasp.methods.scope import Scope
from grasp.stages.input_norms import InputNorms
from grasp.stages.statistics import Similarity

GROUPS = {"unstructured": None, "2:4": 4, "4:8": 8}
"""Pattern -> of how many weights next to each other half are zero; None: of the whole row."""


@dataclass(frozen=True, kw_only=True)
class Wanda(Scope):
    """Zero the weights of every row with the least |weight| times norm of its input. The model
    keeps its size: zeros are stored.
    """

    name: ClassVar[str] = "wanda"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.11695"

    sparsity: Share | None = flag(None, "Share of every row's weights to zero (default 0.5).")
    pattern: str = flag(
        "unstructured",
        "Where the zeros may lie: unstructured (anywhere in a row), or 2:4 and 4:8 (half of every 4"
        " or 8 weights next to each other).",
        words=tuple(GROUPS),
    )
    one_shot: bool = flag(
        False, "Score all layers on the dense model, in one sweep instead of one a layer."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None and self.pattern != "unstructured":
            raise RecipeError(
                f"--sparsity {self.sparsity}: --pattern {self.pattern} says already how many zeros"
                " there are; give one"
            )

    def check(self, decoder: Decoder) -> None:
        super().check(decoder)
        group = GROUPS[self.pattern] or 1
        for linear in self.linears(decoder, self.possible_layers(decoder)):
            if linear.shape[1] % group:
                raise RecipeError(
                    f"--pattern {self.pattern}: '{linear.path}' has {linear.shape[1]} inputs, not a"
                    f" multiple of {group}; take unstructured, or leave it out: --exclude"
                )

    def plan(self, decoder: Decoder) -> Plan:
        layers = self.planned_layers(decoder)
        linears = self.linears(decoder, layers) if self._share else []
        sweeps = 1 if self.one_shot else max(len(layers), 1)
        norms = 8 * sum(linear.shape[1] for linear in linears)
        return Plan(len(layers), len(linears), decoder.num_parameters(), sweeps, 0, norms)

    def needs(self, decoder: Decoder) -> list[Collector]:
        linears = self.linears(decoder, self.possible_layers(decoder))
        return [Similarity(), InputNorms(linear.path for linear in linears)]

    def notes(self) -> tuple[str, ...]:
        return (
            "zeros are stored like other numbers: the checkpoint is no smaller than the dense one,"
            " and no faster without kernels for sparse matrices",
        )

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        layers = sorted(self.chosen_layers(runner.decoder, stats)) if self._share else []
        for index in layers:
            linears = self.linears(runner.decoder, [index])
            if index != layers[0] and not self.one_shot:
                norms = InputNorms(linear.path for linear in linears)
                stats = runner.sweep([norms], f"statistics, layer {index}")
            for linear in linears:
                with runner.holding(index):
                    weight = linear.weight
                    kept = self.mask(weight, stats[InputNorms.name][linear.path])
                yield Step(Rewrite(linear.path, weight * kept, how=self._how))

    def mask(
        self, weight: Float[Tensor, "out in"], norms: Float[Tensor, "in"]
    ) -> Bool[Tensor, "out in"]:
        """True where a weight stays. Of equal scores the first goes."""
        scores = wide(weight).abs() * norms.to(weight.device, torch.float32)
        rows = scores.unflatten(1, (-1, GROUPS[self.pattern] or scores.shape[1]))
        count = math.floor(rows.shape[-1] * self._share + 1e-9)
        lowest = rows.sort(dim=-1, stable=True).indices[..., :count]
        return torch.ones_like(rows, dtype=torch.bool).scatter(-1, lowest, False).view_as(scores)

    @property
    def _share(self) -> float:
        """Of the weights that go."""
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def _how(self) -> str:
        is_free = GROUPS[self.pattern] is None
        return f"masked {f'{100 * self._share:g} %' if is_free else self.pattern}"
