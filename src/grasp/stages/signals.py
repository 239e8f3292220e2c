"""The directions of the hidden states, as norms hand them to what reads them, and the best few."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from grasp.core.collector import Collector
from grasp.core.edits.slicing import HEAD, Norm, Place
from grasp.core.layer import Layer
from grasp.errors import NumericsError

DAMPING = 0.01
"""Of the mean diagonal, added to the diagonal: it keeps directions, and makes a rank full."""


class Signals(Collector):
    """`C = sum zz'` of the hidden states at places, over all real tokens, with z what the norm
    there makes of them before its weight: their root mean square is 1, and with a LayerNorm their
    mean 0. Table: place -> C (hidden, hidden) in float64. Sums: "LAYER.BLOCK".
    """

    name: ClassVar[str] = "signals"

    def __init__(self, norms: Mapping[Place, tuple[Norm, str]]):
        """`norms`: by place, what the norm does, and its path inside the layer (unused before the
        head, whose states are the layer's output).
        """
        super().__init__()
        self.norms = dict(norms)

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        for place, (norm, path) in self.norms.items():
            if place.layer != layer.index:
                continue
            key = f"{place.layer}.{place.block}"
            if place.block == HEAD:
                handle = layer.module.register_forward_hook(self._seeing_output(key, norm))
            else:
                module = layer.module.get_submodule(path)
                handle = module.register_forward_pre_hook(self._seeing_input(key, norm))
            undo.callback(handle.remove)

    def _seeing_input(self, key: str, norm: Norm) -> Any:
        def hook(_module: nn.Module, args: Any) -> None:
            self._take(key, norm, args[0])

        return hook

    def _seeing_output(self, key: str, norm: Norm) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._take(key, norm, output[0] if isinstance(output, tuple) else output)

        return hook

    def _take(self, key: str, norm: Norm, states: Tensor) -> None:
        signal = normed(self._tokens(states).double(), norm.eps, norm.centred)
        self._add(key, signal.mT @ signal)

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[Place, Tensor]:
        found = {}
        for place in self.norms:
            key = f"{place.layer}.{place.block}"
            if key not in sums or not bool(torch.isfinite(sums[key]).all()):
                raise NumericsError(
                    f"layer {place.layer}: the states that its {place.block} reads are"
                    f" {'not finite' if key in sums else 'missing'}; try --dtype float32"
                )
            found[place] = sums[key]
        return found


def normed(
    states: Float[Tensor, "tokens d"], eps: float, centred: bool
) -> Float[Tensor, "tokens d"]:
    """What a norm without a weight makes of states."""
    if centred:
        states = states - states.mean(-1, keepdim=True)
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)


def principal(gram: Float[Tensor, "d d"], width: int) -> Float[Tensor, "d width"]:
    """The `width` orthonormal directions that hold most of a signal with `sum zz'` = `gram`, most
    first: the eigenvectors of the largest eigenvalues, in float64. Raises `NumericsError`.
    """
    damped = gram.double() + DAMPING * gram.diagonal().mean() * torch.eye(
        len(gram), dtype=torch.float64, device=gram.device
    )
    try:
        vectors = torch.linalg.eigh((damped + damped.mT) / 2)[1].flip(1)
    except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
        raise NumericsError(f"the eigenvalue decomposition failed: {failure}") from failure
    # a sign of its own for each, whatever the library gives
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0))[:, :width].contiguous()
