"""Windows of neighbouring layers: which of them changes its input least, and what goes into it and
comes out of it.

The similarity of the window of n layers that begins with layer j is the mean over tokens of
`cos(h_j, h_{j+n})`, with h_j the input of layer j and h_{j+n} the output of the window's last layer
(never the state behind the final norm); high = redundant (LLM-Streamline, arXiv 2403.19135, section
3.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from grasp.core.collector import Collector
from grasp.core.layer import Layer
from grasp.core.scratch import Scratch
from grasp.errors import NumericsError


def states(args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor]:
    """The hidden states before and behind a layer, (batch, seq, width)."""
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple) else output
    return before.detach(), after.detach()


class WindowSimilarity(Collector):
    """Mean cosine between input and output of every window of `count` of the `layers`. Table: first
    layer -> number. Sums: "cosine.FIRST", "tokens.FIRST".

    Beside them the states of one block wait for their partners, in the model's dtype: `count` of
    them at most, where the layers come in their order.
    """

    name: ClassVar[str] = "window_similarity"

    def __init__(self, layers: Sequence[int], count: int):
        super().__init__()
        self.layers, self.count = list(layers), count
        self._waiting: dict[tuple[int, int], Tensor] = {}

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        begins = self.layers.index(layer.index)
        ends = begins - self.count + 1

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = states(args, kwargs, output)
            if begins + self.count <= len(self.layers):
                self._see(begins, before)
            if ends >= 0:
                self._see(ends, after)

        undo.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)

    def _see(self, place: int, state: Tensor) -> None:
        """One end of the window at `place`; the first that comes waits for the other."""
        other = self._waiting.pop((self.block, place), None)
        if other is None:
            self._waiting[self.block, place] = state
            return
        one, other = self._tokens(state).float(), self._tokens(other).float()
        cosine = cosine_similarity(one, other.to(one.device), dim=-1).double()
        self._add(f"cosine.{self.layers[place]}", cosine.sum().cpu())
        self._add(f"tokens.{self.layers[place]}", torch.tensor(cosine.numel()))

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[int, float]:
        firsts = sorted(int(key.split(".")[1]) for key in sums if key.startswith("cosine."))
        found = {
            first: float(sums[f"cosine.{first}"]) / int(sums[f"tokens.{first}"]) for first in firsts
        }
        for first, similarity in found.items():
            if math.isnan(similarity):
                raise NumericsError(
                    f"layer {first}: the similarity of the window that begins there is not a"
                    " number; try --dtype float32"
                )
        return found


class WindowStates(Collector):
    """What goes into layer `first` and what comes out of layer `last`, of every block. Table:
    "in.BLOCK", "out.BLOCK" -> (batch, seq, width) in float32, kept in `scratch`. Sums: the same.
    """

    name: ClassVar[str] = "window_states"

    def __init__(self, first: int, last: int, scratch: Scratch):
        super().__init__()
        self.first, self.last = first, last
        self.scratch: Scratch = scratch

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before, after = states(args, kwargs, output)
            for end, index, state in (("in", self.first, before), ("out", self.last, after)):
                if layer.index == index:
                    held = self.scratch.zeros(*state.shape, device=state.device)
                    self.sums[f"{end}.{self.block}"] = held.add_(state.to(held.device))

        undo.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for key, value in sums.items():
            if not bool(torch.isfinite(value).all()):
                end, _, block = key.partition(".")
                raise NumericsError(
                    f"calibration block {block}: the states {'before' if end == 'in' else 'behind'}"
                    f" the window of layers {self.first} to {self.last} are not finite; try --dtype"
                    " float32"
                )
        return dict(sums)
