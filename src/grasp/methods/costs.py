"""What a budget counts: numbers, bytes, or time measured here."""

from __future__ import annotations

from dataclasses import dataclass

from grasp.core.decoder import Decoder
from grasp.stages.latency import Latency
from grasp.stages.options import Cost, Costs, parameters, pivoted_parameters

__all__ = ["BUDGETS", "Costs", "Storage", "Time", "numbers_of"]

BUDGETS = ("params", "bytes", "latency")
INDEX = 120
"""Bytes that the file's index takes a tensor, about."""


@dataclass(frozen=True)
class Storage:
    """Numbers (`width` 0), or bytes of `width` each. A pivoted pair's places, 4 bytes a row, count
    among bytes only. `layers`: numbers of each layer beside its matrices. `index`: bytes that a
    tensor takes in the file beside its numbers, where they count.
    """

    whole: float
    layers: dict[int, int]
    width: int
    pivoted: bool
    index: int = 0

    @classmethod
    def of_model(
        cls, decoder: Decoder, in_bytes: bool, pivoted: bool, in_16_bits: bool = False
    ) -> Storage:
        """Of the model as it is now; or the file that it will be, with numbers in 16 bits."""
        layers = {}
        for layer in decoder.layers():
            matrices = sum(linear.parameter.numel() for linear in layer.linears.values())
            numbers = sum(one.numel() for one in layer.module.parameters())
            layers[layer.index] = numbers - matrices
        if not in_bytes:
            return cls(float(decoder.num_parameters()), layers, 0, pivoted)
        if not in_16_bits:
            return cls(float(decoder.num_bytes()), layers, decoder.dtype.itemsize, pivoted)
        whole = decoder.num_bytes() * 2 / decoder.dtype.itemsize + INDEX * decoder.num_tensors()
        return cls(whole, layers, 2, pivoted, INDEX)

    def of(self, path: str, spread: bool = False) -> Cost:
        size = numbers_of(self.pivoted)
        if not self.width:
            return size
        places, tensors = (4, 3) if self.pivoted else (0, 2)

        def cost(shape: tuple[int, int], rank: int | None) -> float:
            numbers = self.width * size(shape, rank)
            if rank is None:
                return numbers + self.index
            return numbers + places * shape[0] + tensors * self.index

        return cost

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
    return pivoted_parameters if pivoted else parameters
