"""How fast this machine is at what compressions are made of (`grasp.stages.operations`), measured
in a second or two: on the device and in the dtype of the run, at shapes like the model's, as busy
as the machine is.

Each kind is run once, then again until `LONG` is over; a mean, since a run also meets what else the
machine does. Decompositions run one on every core, as in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, silu

from grasp.core.clock import clock_of
from grasp.core.decoder import Decoder
from grasp.core.sharing import over_cores
from grasp.stages.curvature import exact_products
from grasp.stages.operations import Kind, Operations

LONG = 0.1
"""Seconds that a kind is looked at."""
SIDE, WIDEST, ROWS = 576, 2048, 512
"""The largest square that is decomposed, side of a matrix, and tokens: larger ones are no faster an
operation.
"""
FEWEST = 8
"""Tokens that the products of passes begin with: where the device has no units for the dtype, more
would take too long.
"""


@dataclass(frozen=True)
class Speed:
    """`rates`: of every kind, operations a second."""

    rates: Mapping[Kind, float]

    def seconds(self, work: Operations) -> float:
        """How long this takes, one after the other."""
        return sum(count / self.rates[kind] for kind, count in work.items())

    @classmethod
    def measured(
        cls, decoder: Decoder, dtype: torch.dtype, device: torch.device, seq_len: int
    ) -> Speed:
        """Of this machine, for runs of that model (it may be empty) in `dtype` on `device`."""
        layer = next(iter(decoder.layers()))
        shapes = [tuple(min(n, WIDEST) for n in one.shape) for one in layer.linears.values()]
        width = min(decoder.config.hidden_size, WIDEST)
        shapes = shapes or [(width, width)]
        side, rows = min(SIDE, width), min(seq_len, ROWS)
        look = _Look(device)
        rates: dict[Kind, float] = {"pass": look.passes(shapes, dtype, rows)}
        rates["touch"] = look.touching(max(map(max, shapes)), dtype, rows)
        rates["sum"] = look.sums(width, dtype, rows)
        square = torch.randn(side, side)
        square = square @ square.mT / side + torch.eye(side)
        single, double = square.to(device), _double(square.to(device))
        rates["svd"] = side**3 * look.rate(lambda: torch.linalg.svd(single))
        rates["single"] = 2 * side**3 * look.on_all_cores(lambda: single @ single)
        rates["double"] = 2 * side**3 * look.on_all_cores(lambda: double @ double)
        rates["eigh"] = side**3 * look.on_all_cores(lambda: torch.linalg.eigh(double))
        return cls(rates)


class _Look:
    """Times calls on a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clock = clock_of(device)

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        begin = self.clock.mark()
        call()
        return max(self.clock.seconds(begin, self.clock.mark()), 1e-9)

    def rate(self, call: Callable[[], object]) -> float:
        """Calls a second. One that takes `LONG` at its first is not made again."""
        spent, count = self.once(call), 1
        if spent > LONG:
            return 1 / spent
        spent, count = 0.0, 0
        while spent < LONG:
            spent, count = spent + self.once(call), count + 1
        return count / spent

    def on_all_cores(self, call: Callable[[], object]) -> float:
        """The same with a call on every core at once, of all of them."""
        threads = max(torch.get_num_threads(), 1)
        return threads * self.rate(lambda: list(over_cores(lambda _: call(), range(threads))))

    @torch.no_grad()
    def passes(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, rows: int) -> float:
        """Operations a second of the products of a layer, with rows as far as there is time."""
        weights = [torch.ones(*shape, dtype=dtype, device=self.device) for shape in shapes]
        operations = 2 * sum(weight.numel() for weight in weights)
        seen = min(FEWEST, rows)
        while True:
            inputs = [
                torch.ones(seen, one.shape[1], dtype=dtype, device=self.device) for one in weights
            ]

            def layer(inputs: list[torch.Tensor] = inputs) -> None:
                for given, weight in zip(inputs, weights, strict=True):
                    linear(given, weight)

            if seen == rows or self.once(layer) > LONG:
                return seen * operations * self.rate(layer)
            seen = min(4 * seen, rows)

    def touching(self, width: int, dtype: torch.dtype, rows: int) -> float:
        """Numbers a second that go through memory, in the functions between products."""
        given = torch.ones(rows, width, dtype=dtype, device=self.device)
        made = torch.empty_like(given)  # pages that are new each time would count, as they do not
        return given.numel() * self.rate(lambda: torch.mul(silu(given, inplace=True), 3, out=made))

    def sums(self, width: int, dtype: torch.dtype, rows: int) -> float:
        """Operations a second of sums of outer products."""
        given = torch.ones(rows, width, dtype=torch.float32, device=self.device)
        total = torch.zeros(width, width, device=self.device)
        with exact_products(dtype):
            return 2 * rows * width**2 * self.rate(lambda: total.addmm_(given.mT, given, beta=0))


def _double(square: torch.Tensor) -> torch.Tensor:
    """In float64, which Apple's devices lack."""
    return (square.cpu() if square.device.type == "mps" else square).double()
