"""What a whole sublayer or layer is worth: the loss without it, to second order.

With `out` what it adds to the residual stream and d the gradient of the loss there, leaving it out
costs about `1/2 E[(d' out)^2]` nats a token: the same Fisher term as for matrices, for the change
`-out` of one vector a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grasp.core.collector import Collector, ask_for_gradients_at
from grasp.core.families import Family
from grasp.core.layer import Layer
from grasp.core.linalg import wide
from grasp.errors import ModelError, NumericsError

ATTENTION, MLP = "attention", "mlp"
READERS = {ATTENTION: "o", MLP: "down"}
"""Sublayer -> the role of its last matrix."""


class LayerLosses(Collector):
    """Of every layer and sublayer, what is lost without it. Table: "3" (layer 3), "3 attention" or
    "3 mlp" -> nats a token. Sums: the same names, the sum of (d' out)^2, and "tokens NAME".
    """

    name: ClassVar[str] = "layer_losses"
    backward: ClassVar[bool] = True

    def __init__(self, family: Family):
        super().__init__()
        self.family = family

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        ask_for_gradients_at(layer, undo)
        handle = layer.module.register_forward_hook(self._of_layer(layer), with_kwargs=True)
        undo.callback(handle.remove)
        for name, module in self._sublayers(layer):
            hook = self._of_sublayer(f"{layer.index} {name}")
            undo.callback(module.register_forward_hook(hook).remove)

    def _sublayers(self, layer: Layer) -> Iterator[tuple[str, nn.Module]]:
        """(name, module whose output is added to the residual stream): the last matrix, or the norm
        behind it.
        """
        after = self.family.norms.after or (None, None)
        for (name, role), norm in zip(READERS.items(), after, strict=True):
            try:
                yield name, layer.module.get_submodule(norm or self.family.path(role))
            except (AttributeError, ModelError):  # this layer, or this family, has none
                continue

    def _of_layer(self, layer: Layer) -> Callable[..., None]:
        def forward(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            after = output[0] if isinstance(output, tuple) else output
            before = args[0] if args else kwargs["hidden_states"]
            self._watch(str(layer.index), after, self._tokens(after) - self._tokens(before))

        return forward

    def _of_sublayer(self, name: str) -> Callable[..., None]:
        def forward(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            self._watch(name, output, self._tokens(output))

        return forward

    def _watch(self, name: str, output: Tensor, added: Tensor) -> None:
        """Once the gradient at `output` comes, add what leaving out `added` (tokens, width)
        costs.
        """
        if output.requires_grad:
            output.register_hook(lambda grad: self._see(name, self._tokens(grad), added))

    def _see(self, name: str, gradients: Tensor, added: Tensor) -> None:
        products = (wide(gradients) * wide(added)).sum(1)
        self._add(name, products.square().sum().double())
        self._add(f"tokens {name}", torch.tensor(len(products)))

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        found = {
            name: float(total) / max(int(sums[f"tokens {name}"]), 1) / 2
            for name, total in sums.items()
            if not name.startswith("tokens ")
        }
        if not found or not all(map(math.isfinite, found.values())):
            raise NumericsError(
                "the losses of the layers are missing or not finite; try --dtype float32"
            )
        return found
