"""What a budget counts: numbers, bytes, or time measured here."""

from __future__ import annotations

from dataclasses import dataclass

from grasp.core.decoder import Decoder
from grasp.stages import budget as budgets
from grasp.stages.budget import Cost, Costs
from grasp.stages.latency import Latency

__all__ = ["BUDGETS", "Costs", "Storage", "Time", "numbers_of"]

BUDGETS = ("params", "bytes", "latency")


@dataclass(frozen=True)
class Storage:
    """Numbers (`width` 0), or bytes of `width` each. A pivoted pair's places, 4 bytes a row, count
    among bytes only. `layers`: numbers of each layer beside its matrices.
    """

    whole: float
    layers: dict[int, int]
    width: int
    pivoted: bool

    @classmethod
    def of_model(cls, decoder: Decoder, in_bytes: bool, pivoted: bool) -> Storage:
        """Of the model as it is now."""
        layers = {}
        for layer in decoder.layers():
            matrices = sum(linear.parameter.numel() for linear in layer.linears.values())
            numbers = sum(one.numel() for one in layer.module.parameters())
            layers[layer.index] = numbers - matrices
        whole = decoder.num_bytes() if in_bytes else decoder.num_parameters()
        return cls(float(whole), layers, decoder.dtype.itemsize if in_bytes else 0, pivoted)

    def of(self, path: str, spread: bool = False) -> Cost:
        size = numbers_of(self.pivoted)
        if not self.width:
            return size
        places = 4 if self.pivoted else 0
        return lambda shape, rank: (
            self.width * size(shape, rank) + (0 if rank is None else places * shape[0])
        )

    def layer(self, index: int, heads: float = 1.0, channels: float = 1.0) -> float:
        return float(self.layers[index] * max(self.width, 1))

    def beside(self, biases: int, places: int) -> float:
        return float(self.width * biases + 4 * places if self.width else biases)


@dataclass(frozen=True)
class Time:
    """Shares of the time that the model takes as it is now: half a decode step, half a prompt."""

    latency: Latency
    whole: float = 1.0

    def of(self, path: str, spread: bool = False) -> Cost:
        return self.latency.of(path, spread)

    def layer(self, index: int, heads: float = 1.0, channels: float = 1.0) -> float:
        return self.latency.layer(index, heads, channels)

    def beside(self, biases: int, places: int) -> float:
        return 0.0  # it is in the time of the matrix


def numbers_of(pivoted: bool) -> Cost:
    """How many numbers a matrix takes at a rank."""
    return budgets.pivoted_parameters if pivoted else budgets.parameters
