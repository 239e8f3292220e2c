"""How near a changed model stays to the original: the cosine between their last hidden states.

The last hidden state is what the body of a model gives to its head, behind the final norm. Of one
block (a sample) all of it is one vector, padding left out; what counts is the mean over the blocks
of `cos(h, h')`, in [-1, 1], high = near (LaCo, arXiv 2402.11187, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.core.collector import Collector
from grasp.core.layer import Layer
from grasp.errors import NumericsError


class LastHidden(Collector):
    """The last hidden state of every block. Table: block -> (batch, seq, width), 0 at padding;
    `Closeness` compares with it. Sums: "BLOCK".
    """

    name: ClassVar[str] = "last_hidden"

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        """The layers are not looked at."""

    def end(self, hidden: Tensor) -> None:
        padding = torch.tensor(False) if self.mask is None else ~self.mask.bool()[..., None]
        self._add(str(self.block), hidden.masked_fill(padding.to(hidden.device), 0))

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[int, Tensor]:
        if not sums:
            raise NumericsError("the body of the model gave no last hidden state during the sweep")
        for block, value in sums.items():
            if not bool(torch.isfinite(value).all()):
                raise NumericsError(
                    f"calibration block {block}: the last hidden state is not finite; try --dtype"
                    " float32"
                )
        return {int(block): sums[block] for block in sorted(sums, key=int)}


class Closeness(Collector):
    """The mean over blocks of the cosine between the last hidden state and that in `reference`, a
    table of `LastHidden`. Table: "cosine" -> number. Sums: "cosine", "blocks".
    """

    name: ClassVar[str] = "closeness"

    def __init__(self, reference: Mapping[int, Tensor]):
        super().__init__()
        self.reference = reference

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        """The layers are not looked at."""

    def end(self, hidden: Tensor) -> None:
        before = self._tokens(self.reference[self.block].to(hidden.device))
        self._add("cosine", cosine(self._tokens(hidden), before))
        self._add("blocks", torch.tensor(1))

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        """A model whose states are not finite is as far away as can be: -1."""
        found = float(sums["cosine"]) / int(sums["blocks"])
        return {"cosine": -1.0 if math.isnan(found) else found}


def cosine(
    one: Float[Tensor, "tokens width"], other: Float[Tensor, "tokens width"]
) -> Float[Tensor, ""]:
    """Of two states of a block, each as one vector; float64, and never above 1."""
    one, other = one.double().flatten(), other.double().flatten()
    norms = (one @ one).sqrt() * (other @ other).sqrt()
    return ((one @ other) / norms.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)
