"""The statistics a sweep can collect. Sums are kept in float32 or wider, whatever the model's
dtype.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from grasp.core.collector import Collector, ask_for_gradient
from grasp.core.layer import Layer, Linear
from grasp.core.linalg import wide
from grasp.errors import NumericsError


def _hidden(value: Any) -> Tensor:
    """The hidden states (batch, seq, width) among a layer's positional arguments or outputs."""
    return (value[0] if isinstance(value, tuple) else value).detach()


class Similarity(Collector):
    """Mean cosine between a layer's input and its own output over all real tokens (paper, section
    3.1). Table: layer -> scalar.

    Taken at the layer itself: the last entry of `output_hidden_states` is after the final norm and
    mis-scores the last layer. Sums: "cosine.LAYER", "tokens.LAYER".
    """

    name: ClassVar[str] = "similarity"

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            before = _hidden(args or kwargs["hidden_states"]).float()
            after = _hidden(output).float()
            cosine = cosine_similarity(before, after, dim=-1).double()  # batch, seq
            if self.mask is not None:
                cosine = cosine[self.mask]
            self._add(f"cosine.{layer.index}", cosine.sum())
            self._add(f"tokens.{layer.index}", torch.tensor(cosine.numel()))

        undo.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[int, Tensor]:
        layers = sorted(int(key.split(".")[1]) for key in sums if key.startswith("cosine."))
        return {layer: sums[f"cosine.{layer}"] / sums[f"tokens.{layer}"] for layer in layers}


class AngularDistance(Collector):
    """Angular distance `arccos(cos) / pi` between the inputs of every two layers, at the last real
    token of each block.

    (Gromov et al., arXiv 2403.17887.) Table: "distance" -> (num_layers + 1, num_layers + 1),
    "layers" -> their indices; the last row and column are the output of the last layer. Keeps one
    vector a layer and block, never the hidden states. Sums: "input.LAYER.BLOCK" (batch, width), and
    "output.LAYER.BLOCK" of the last layer seen so far.
    """

    name: ClassVar[str] = "angular_distance"

    def __init__(self) -> None:
        super().__init__()
        self.last = 0

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        self.last = max(self.last, layer.index)

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            place = f"{layer.index}.{self.block}"
            self._add(f"input.{place}", self._last_token(args or kwargs["hidden_states"]))
            if layer.index == self.last:
                self._add(f"output.{place}", self._last_token(output))

        undo.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)

    def _last_token(self, value: Any) -> Tensor:
        hidden = _hidden(value)
        if self.mask is None:
            return hidden[:, -1]
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        return hidden[torch.arange(hidden.shape[0]), (self.mask * positions).argmax(dim=1)]

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        places = [key.split(".")[1:] for key in sums if key.startswith("input.")]
        if not places:
            raise NumericsError("no decoder layer ran during the sweep")
        layers = sorted({int(layer) for layer, _ in places})
        blocks = sorted({int(block) for _, block in places})
        total, count = torch.zeros(len(layers) + 1, len(layers) + 1, dtype=torch.float64), 0
        for block in blocks:
            states = [sums[f"input.{layer}.{block}"] for layer in layers]
            states.append(sums[f"output.{layers[-1]}.{block}"])
            # batch, layers + 1, width
            unit = torch.nn.functional.normalize(
                torch.stack([state.cpu().double() for state in states], dim=1), dim=-1
            )
            total += (unit @ unit.mT).clamp(-1, 1).arccos().sum(0) / math.pi
            count += len(unit)
        return {"distance": total / count, "layers": torch.tensor(layers)}


class _OfGradients(Collector):
    """Asks for the gradients of the matrices at `paths`; what it adds up of each block's is up to
    the subclass.
    """

    backward: ClassVar[bool] = True

    def __init__(self, paths: Iterable[str]):
        super().__init__()
        self.paths = tuple(paths)

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        for linear in layer.linears.values():
            if linear.path in self.paths:
                ask_for_gradient(linear.parameter, undo)
                undo.callback(linear.parameter.register_hook(self._taking(linear)).remove)

    def _taking(self, linear: Linear) -> Any:
        return lambda grad: self._take(linear.path, linear.oriented(grad.detach()))

    @abstractmethod
    def _take(self, path: str, grad: Tensor) -> None:
        """A matrix's gradient (out, in) of one block."""

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for path in self.paths:
            if path not in sums or not bool(torch.isfinite(sums[path]).all()):
                raise NumericsError(
                    f"the gradient of '{path}' is {'not finite' if path in sums else 'missing'};"
                    " try --dtype float32"
                )
        return {path: sums[path] for path in self.paths}


class WeightGrad(_OfGradients):
    """`G = dL/dW` (out, in) of the chosen matrices, the loss summed over the whole set. Table: path
    -> G in float32 or wider. Sums: the same.
    """

    name: ClassVar[str] = "weight_grad"

    def _take(self, path: str, grad: Tensor) -> None:
        self._add(path, grad)


class FeatureFisher(_OfGradients):
    """How much the loss depends on the weights that read each input feature: the diagonal of the
    empirical Fisher information, summed over outputs.

    Table: path -> (in,) in float64, `f_j = sum over blocks of sum_i (dL_s/dW_ij)^2`, where L_s is
    the loss of block s alone, summed over its tokens. Sums: the same.
    """

    name: ClassVar[str] = "feature_fisher"

    def _take(self, path: str, grad: Tensor) -> None:
        self._add(path, wide(grad).square().sum(0).to("cpu", torch.float64))


class SquaredGrad(_OfGradients):
    """The squares of every block's `G_s` (out, in), summed over the blocks. Table: path -> that in
    float32 or wider. Sums: the same.
    """

    name: ClassVar[str] = "squared_grad"

    def _take(self, path: str, grad: Tensor) -> None:
        self._add(path, wide(grad).square())


class VectorGrad(_OfGradients):
    """`W o G` summed over each row and over each column, where G is as for `WeightGrad`: what the
    loss loses, to first order, where that row or column is zero.

    Table: path -> (out + in,), rows first, in float64. Sums: the same; since they are linear in G,
    no matrix is kept.
    """

    name: ClassVar[str] = "vector_grad"

    def _taking(self, linear: Linear) -> Any:
        def take(grad: Tensor) -> None:
            product = wide(linear.weight) * wide(linear.oriented(grad.detach()))
            self._take(linear.path, torch.cat([product.sum(1), product.sum(0)]).double())

        return take

    def _take(self, path: str, grad: Tensor) -> None:
        self._add(path, grad)


class GroupGrad(_OfGradients):
    """Per-sample sums of every singular group's `g_k = sigma_k u_k' G_s v_k`, where G_s is the
    gradient of block s alone.

    Table: path -> (3, k): sum of g, sum of |g|, sum of g squared over the blocks. Sums: the same.
    Needs the decompositions beforehand.
    """

    name: ClassVar[str] = "group_grad"

    def __init__(self, groups: Mapping[str, tuple[Tensor, Tensor, Tensor]]):
        super().__init__(groups)
        self.groups = groups

    def _take(self, path: str, grad: Tensor) -> None:
        u, s, vh = self.groups[path]
        g = s * ((u.T @ grad.to(u.dtype)) * vh).sum(1)
        self._add(path, torch.stack([g, g.abs(), g.square()]).double())
