"""How large the inputs of a matrix are, feature by feature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import ClassVar

import torch
from torch import Tensor, nn

from grasp.core.collector import Collector
from grasp.core.layer import Layer
from grasp.core.linalg import wide
from grasp.errors import NumericsError


class InputNorms(Collector):
    """`||x_j||_2` of every input feature j over all real tokens. Table: matrix path -> (in,) in
    float64. Sums: path -> (in,), the squares.
    """

    name: ClassVar[str] = "input_norms"

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
            squares = wide(self._tokens(inputs[0])).square().sum(0)
            self._add(path, squares.to("cpu", torch.float64))

        return add

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        for path in self.paths:
            if path not in sums or not bool(torch.isfinite(sums[path]).all()):
                raise NumericsError(
                    f"the inputs of '{path}' are {'not finite' if path in sums else 'missing'};"
                    " try --dtype float32"
                )
        return {path: sums[path].sqrt() for path in self.paths}
