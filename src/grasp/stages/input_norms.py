"""How large the inputs of a matrix are, feature by feature."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import Tensor, nn

from grasp.core.collector import Collector
from grasp.core.layer import Layer
from grasp.core.linalg import wide
from grasp.errors import NumericsError


class _OfInputs(Collector):
    """Looks at the inputs of the matrices at `paths`, padding masked; what it adds up of each
    block's is up to the subclass.
    """

    def __init__(self, paths: Iterable[str]):
        super().__init__()
        self.paths = tuple(paths)

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        for linear in layer.linears.values():
            if linear.path in self.paths:
                hook = linear.module.register_forward_pre_hook(self._adding(linear.path))
                undo.callback(hook.remove)

    def _adding(self, path: str) -> Callable[..., None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._take(path, wide(self._tokens(inputs[0])))

        return add

    @abstractmethod
    def _take(self, path: str, inputs: Tensor) -> None:
        """A matrix's inputs (tokens, in) of one block, in float32 or wider."""

    def _checked(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of every matrix, which must be there and finite."""
        for path in self.paths:
            if path not in sums or not bool(torch.isfinite(sums[path]).all()):
                raise NumericsError(
                    f"the inputs of '{path}' are {'not finite' if path in sums else 'missing'};"
                    " try --dtype float32"
                )
        return {path: sums[path] for path in self.paths}


class InputNorms(_OfInputs):
    """`||x_j||_2` of every input feature j over all real tokens. Table: matrix path -> (in,) in
    float64. Sums: path -> (in,), the squares.
    """

    name: ClassVar[str] = "input_norms"

    def _take(self, path: str, inputs: Tensor) -> None:
        self._add(path, inputs.square().sum(0).to("cpu", torch.float64))

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {path: total.sqrt() for path, total in self._checked(sums).items()}


class InputMeans(_OfInputs):
    """Mean of `|x_j|` of every input feature j over all real tokens. Table: matrix path -> (in,) in
    float64. Sums: path -> (in,), and "tokens.PATH".
    """

    name: ClassVar[str] = "input_means"

    def _take(self, path: str, inputs: Tensor) -> None:
        self._add(path, inputs.abs().sum(0).to("cpu", torch.float64))
        self._add(f"tokens.{path}", torch.tensor(len(inputs)))

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = self._checked(sums)
        return {path: total / sums[f"tokens.{path}"] for path, total in found.items()}
