"""A compression method of your own, in one file. The package need not be edited to run it:

    grasp compress smollm2 small --plugin examples/own_method.py --method my-method --strength 0.5

This one is magnitude pruning (Han et al., arXiv 1506.02626): the numbers of every matrix that are
nearest to 0 become 0. The model keeps its size; for a smaller one, yield other edits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Rewrite, Step
from grasp.core.fields import Share, flag
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.methods.base import Method, Plan


@dataclass(frozen=True, kw_only=True)
class MyMethod(Method):
    """Set the smallest numbers of every matrix to 0."""

    name: ClassVar[str] = "my-method"  # what --method calls it
    paper: ClassVar[str] = "https://arxiv.org/abs/1506.02626"

    # Every field is a flag: this one is --strength.
    strength: Share = flag(0.5, "Share of every matrix that becomes 0.")

    def plan(self, decoder: Decoder) -> Plan:
        """What will be done, from the shapes alone: for --dry-run and for the progress."""
        edits = sum(len(layer.linears) for layer in decoder.layers())
        return Plan(decoder.num_layers, edits, decoder.num_parameters(), 0, 0)

    def needs(self, decoder: Decoder) -> list[Collector]:
        """Statistics of the calibration text (grasp.stages.statistics); weights are enough here."""
        return []

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        """One edit a matrix. Each is carried out before the next is asked for."""
        for layer in runner.decoder.layers():
            with runner.holding(layer.index):  # the weights of this layer are in memory
                for linear in layer.linears.values():
                    size = linear.weight.float().abs()  # (out, in)
                    count = int(self.strength * size.numel())
                    if count:
                        mask = size > size.flatten().kthvalue(count).values
                        yield Step(Rewrite(linear.path, linear.weight * mask, how="pruned"))
