"""A decoder layer and its matrices, as the sweeps and the methods see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Linear:
    """One matrix of a decoder layer. `path` is its module path in the model as loaded, `layer` its
    layer's index.
    """

    path: str
    layer: int
    name: str
    module: nn.Module

    @property
    def transposed(self) -> bool:
        """True for GPT-2's Conv1D, which stores its weight (in, out)."""
        return not isinstance(self.module, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """W (out_features, in_features), a view of the parameter."""
        return self.oriented(self.parameter.detach())

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """b (out_features), where there is one."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def is_tall(self) -> bool:
        """Whether there are at least as many outputs as inputs."""
        return self.shape[0] >= self.shape[1]

    def oriented(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like the parameter (its gradient, say) turned to (out, in)."""
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its index in the model as loaded, its module, and by path inside the layer
    those of its family's matrices that it has, as far as they are dense.
    """

    index: int
    module: nn.Module
    linears: dict[str, Linear]


def module_in(layer: nn.Module, path: str) -> nn.Module | None:
    """The module at a path of a layer; None where the layer lacks it."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def matrix_in(layer: nn.Module, path: str) -> nn.Module | None:
    """The module that keeps a matrix of a layer, dense or not; None where the layer lacks it."""
    module = module_in(layer, path)
    if module is None:
        return None
    if is_low_rank(module) or is_quantized(module):
        return module
    weight = getattr(module, "weight", None)
    return module if isinstance(weight, Tensor) and weight.dim() == 2 else None


def is_low_rank(module: nn.Module) -> bool:
    """True for a low-rank pair, from the package or from the copy a checkpoint carries."""
    return type(module).__name__ == "LowRankLinear"


def is_quantized(module: nn.Module) -> bool:
    """True for a linear, pair, embedding or head in few bits, from the package or from the copy a
    checkpoint carries.
    """
    return type(module).__name__ in ("QuantizedLinear", "QuantizedEmbedding", "QuantizedHead")


def is_narrow(record: dict[str, Any]) -> bool:
    """True for the record of an ordinary linear that only became smaller."""
    return record["kind"] == "narrow" and not record.keys() & {"scattered", "gathered", "of"}


def is_scattered(module: nn.Module) -> bool:
    """True for a linear that lost outputs and no inputs, with zeros in their place."""
    name, gaps = type(module).__name__, getattr(module, "out_places", None)
    return name == "NarrowLinear" and gaps is not None and module.in_places is None


def is_dense(module: nn.Module) -> bool:
    """True for an ordinary linear, also one that only became smaller (`NarrowLinear`)."""
    return not hasattr(module, "record") or bool(getattr(module, "is_plain", False))
