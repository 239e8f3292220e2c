"""The statistics a sweep can collect. Sums are kept in float32 or wider, whatever the model's
dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle

from grasp.core.layer import Layer, Linear
from grasp.core.sweep import Collector
from grasp.errors import NumericsError


def _hidden(value: Any) -> Tensor:
    """The hidden states (batch, seq, width) among a layer's positional arguments or outputs."""
    return (value[0] if isinstance(value, tuple) else value).detach()


class Similarity(Collector):
    """Mean cosine between a layer's input and its own output over all real tokens (paper, section
    3.1). Table: layer -> scalar.

    Taken at the layer itself: the last entry of `output_hidden_states` is after the final norm and
    mis-scores the last layer.
    """

    name: ClassVar[str] = "similarity"

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.tokens: dict[int, int] = {}

    def attach(self, layer: Layer) -> list[RemovableHandle]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = _hidden(args or kwargs["hidden_states"]).float()
            after = _hidden(output).float()
            cosine = cosine_similarity(before, after, dim=-1).double()  # batch, seq
            if self.mask is not None:
                cosine = cosine[self.mask]
            self.sums[layer.index] = self.sums.get(layer.index, 0.0) + cosine.sum()
            self.tokens[layer.index] = self.tokens.get(layer.index, 0) + cosine.numel()

        return [layer.module.register_forward_hook(hook, with_kwargs=True)]

    def result(self) -> Mapping[int, Tensor]:
        return {index: total / self.tokens[index] for index, total in self.sums.items()}


class AngularDistance(Collector):
    """Angular distance `arccos(cos) / pi` between the inputs of every two layers, at the last real
    token of each block.

    (Gromov et al., arXiv 2403.17887.) Table: "distance" -> (num_layers + 1, num_layers + 1),
    "layers" -> their indices; the last row and column are the output of the last layer. Keeps one
    vector a layer and block, never the hidden states.
    """

    name: ClassVar[str] = "angular_distance"

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}
        self.last: Tensor | None = None
        self.total: Tensor | None = None
        self.blocks = 0

    def attach(self, layer: Layer) -> list[RemovableHandle]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.states[layer.index] = self._last_token(_hidden(args or kwargs["hidden_states"]))
            self.last = self._last_token(_hidden(output))

        return [layer.module.register_forward_hook(hook, with_kwargs=True)]

    def _last_token(self, hidden: Tensor) -> Tensor:
        if self.mask is None:
            return hidden[:, -1].double()
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return hidden[torch.arange(hidden.shape[0]), (self.mask * positions).argmax(dim=1)].double()

    def end_block(self) -> None:
        if self.last is None:
            raise NumericsError("no decoder layer ran during the sweep")
        # batch, layers + 1, width
        states = torch.stack([*(self.states[i] for i in sorted(self.states)), self.last], dim=1)
        unit = torch.nn.functional.normalize(states, dim=-1)
        distance = (unit @ unit.mT).clamp(-1, 1).arccos().sum(0) / math.pi
        self.total = distance if self.total is None else self.total + distance
        self.blocks += states.shape[0]

    def result(self) -> Mapping[str, Tensor]:
        if self.total is None:
            return {}
        return {"distance": self.total / self.blocks, "layers": torch.tensor(sorted(self.states))}


class _OfGradients(Collector):
    """Asks for the gradients of the matrices at `paths`; what it makes of them after each block is
    up to the subclass.
    """

    backward: ClassVar[bool] = True

    def __init__(self, paths: Iterable[str]):
        self.paths = frozenset(paths)
        self.linears: dict[str, Linear] = {}
        self.sums: dict[str, Tensor] = {}

    def attach(self, layer: Layer) -> list[RemovableHandle]:
        for linear in layer.linears.values():
            if linear.path in self.paths:
                self.linears[linear.path] = linear
                linear.parameter.requires_grad_(True)
        return []


class WeightGrad(_OfGradients):
    """`G = dL/dW` (out, in) of the chosen matrices, the loss summed over the whole set. Table: path
    -> G in float32 or wider.

    For a float32 model autograd itself keeps the sum in `.grad`; a narrower gradient is added to a
    float32 sum after each block.
    """

    name: ClassVar[str] = "weight_grad"

    def end_block(self) -> None:
        for path, linear in self.linears.items():
            grad = linear.parameter.grad
            if grad is not None and torch.finfo(grad.dtype).bits < 32:
                self.sums[path] = self.sums[path].add_(grad) if path in self.sums else grad.float()
                linear.parameter.grad = None

    def result(self) -> Mapping[str, Tensor]:
        table = {}
        for path, linear in self.linears.items():
            grad = self.sums.pop(path) if path in self.sums else linear.parameter.grad
            linear.parameter.grad = None
            if grad is None or not bool(torch.isfinite(grad).all()):
                raise NumericsError(
                    f"the gradient of '{path}' is {'missing' if grad is None else 'not finite'};"
                    " try --dtype float32"
                )
            table[path] = linear.oriented(grad)
        return table


class GroupGrad(_OfGradients):
    """Per-sample sums of every singular group's `g_k = sigma_k u_k' G_s v_k`, where G_s is the
    gradient of block s alone.

    Table: path -> (3, k): sum of g, sum of |g|, sum of g squared over the blocks. Needs the
    decompositions beforehand.
    """

    name: ClassVar[str] = "group_grad"

    def __init__(self, groups: Mapping[str, tuple[Tensor, Tensor, Tensor]]):
        super().__init__(groups)
        self.groups = groups

    def end_block(self) -> None:
        for path, linear in self.linears.items():
            u, s, vh = self.groups[path]
            grad = linear.oriented(linear.parameter.grad).to(u.dtype)  # type: ignore[arg-type]
            g = s * ((u.T @ grad) * vh).sum(1)
            moments = torch.stack([g, g.abs(), g.square()]).double()
            self.sums[path] = self.sums.get(path, 0.0) + moments
            linear.parameter.grad = None

    def result(self) -> Mapping[str, Tensor]:
        return dict(self.sums)
