"""What the methods share that set weights to zero and keep the shapes: how many weights, where they
may lie, and in which order. A method gives the statistic, and the new numbers of a matrix.

1. One sweep of the dense model: how redundant its layers are.
2. Go through the layers, first to last, with the model as it is now, so the inputs of a layer come
   from the pruned layers before it. One layer's statistics are in memory at a time, and the states
   in front of it. `one_shot`: the first sweep collects those of all layers, of the dense model.
3. The matrices of one layer are pruned by what they read before any of them was.

`sparsity` is a share, or N:M: N of every M weights next to each other in a row are zero. Zeros are
numbers too: matrices keep their shapes, so nothing becomes smaller, and nothing faster without
kernels for sparse matrices.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Rewrite, Step
from grasp.core.fields import Share, flag
from grasp.core.held import passes
from grasp.core.layer import Linear
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.methods.base import Plan
from grasp.methods.scope import Scope
from grasp.stages.operations import Operations, total
from grasp.stages.statistics import Similarity

Pattern = Literal["2:4", "4:8"]
"""Half of the weights each: other ones mean different things to different papers."""
GROUPS: dict[float | str, int] = {"2:4": 4, "4:8": 8}
"""Pattern -> of how many weights next to each other half are zero."""
Prune = Callable[[Linear], Tensor]
"""Gives the new numbers (out, in) of a matrix."""


@dataclass(frozen=True, kw_only=True)
class Sparse(Scope):
    """Base of the methods that zero weights: subclasses give `statistic`, `pruner` and
    `statistic_bytes`.
    """

    sparsity: Share | Pattern = flag(
        0.5,
        "Share of the weights to zero, or where half of them go: 2:4 or 4:8, of every 4 or 8 next"
        " to each other.",
        metavar="SHARE|2:4|4:8",
    )
    one_shot: bool = flag(
        False, "Go by the inputs of the dense model, in one sweep instead of layer by layer."
    )

    # --- what a method gives

    @abstractmethod
    def statistic(self, linears: Sequence[Linear], decoder: Decoder) -> Collector:
        """What to collect of the inputs of these matrices."""

    @abstractmethod
    def statistic_bytes(self, linears: Sequence[Linear]) -> int:
        """What that takes at most, and what is made of it."""

    @abstractmethod
    def operations_a_token(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        """Of what `statistic` adds up."""

    @abstractmethod
    def operations_once(self, linear: Linear) -> Operations:
        """Of pruning a matrix."""

    @abstractmethod
    def pruner(self, stats: Statistics) -> Prune:
        """Prunes matrices whose statistics are in `stats`, one after another."""

    # --- what is the same for all

    def check(self, decoder: Decoder) -> None:
        super().check(decoder)
        group = self.group or 1
        for linear in self.linears(decoder, self.possible_layers(decoder)):
            if linear.shape[1] % group:
                raise RecipeError(
                    f"--sparsity {self.sparsity}: '{linear.path}' has {linear.shape[1]} inputs, not"
                    f" a multiple of {group}; take a share such as 0.5, or leave it out: --exclude"
                )

    def plan(self, decoder: Decoder) -> Plan:
        layers = sorted(self.planned_layers(decoder)) if self.share else []
        linears = self.linears(decoder, layers)
        together = [layers] if self.one_shot else [[layer] for layer in layers]
        return Plan(
            len(layers),
            len(linears),
            decoder.num_parameters(),
            1
            if self.one_shot
            else 1 + math.ceil(passes([(one, one) for one in layers], len(decoder.kept))),
            0,
            max(
                (self.statistic_bytes(self.linears(decoder, some)) for some in together), default=0
            ),
            held_sets=0 if self.one_shot else 1,
            a_token=self.operations_a_token(decoder, linears),
            once=total(self.operations_once(linear) for linear in linears),
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        linears = self.linears(decoder, self.possible_layers(decoder))
        at_once = self.one_shot and self.share > 0
        return [Similarity(), *([self.statistic(linears, decoder)] if at_once else [])]

    def notes(self) -> tuple[str, ...]:
        return (
            "zeros are stored like other numbers: the checkpoint is no smaller than the dense one,"
            " and no faster without kernels for sparse matrices",
        )

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        chosen = self.chosen_layers(runner.decoder, stats) if self.share else []
        prune = self.pruner(stats) if self.one_shot and chosen else None
        for index in sorted(chosen):
            linears = self.linears(runner.decoder, [index])
            if not self.one_shot:
                prune = None  # the statistics of the layer before are gone before new ones come
                asked = [self.statistic(linears, runner.decoder)]
                task = f"statistics, layer {index}"
                prune = self.pruner(runner.sweep(asked, task, layers=(index, index)))
            assert prune is not None
            for linear in linears:
                with runner.holding(index):
                    made = runner.once(linear.path, partial(self._step, linear, prune))
                yield made

    def _step(self, linear: Linear, prune: Prune) -> Step:
        new = prune(linear).to(linear.weight.dtype)
        return Step(Rewrite(linear.path, new, how=f"masked {self._said}"))

    @property
    def share(self) -> float:
        """Of the weights that go."""
        return 0.5 if isinstance(self.sparsity, str) else self.sparsity

    @property
    def group(self) -> int | None:
        """Among how many weights next to each other that share goes; None: any number."""
        return GROUPS.get(self.sparsity)

    @property
    def _said(self) -> str:
        return str(self.sparsity) if self.group else f"{100 * self.share:g} %"


def lowest(scores: Float[Tensor, "*rows n"], share: float) -> Bool[Tensor, "*rows n"]:
    """True at the `share` of every row with the lowest scores, rounded down; of equal ones at the
    first.
    """
    count = math.floor(scores.shape[-1] * share + 1e-9)
    places = scores.sort(dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, places, True)
