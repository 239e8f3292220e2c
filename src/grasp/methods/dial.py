"""One dial in bytes: a method whose budget may choose bits beside ranks and channels.

    --size 90MB                  ranks, channels and bits together, the embedding among them
    --ratio 0.5 --budget bytes --bits 16,8,4
                                 the same as a share of the bytes, with these bits
    --size 90MB --bits 16        no rounding: fewer numbers until they fit
    --size 90MB --activations int8
                                 8 bits are of activations too, and cost what rounding these does
    --size 90MB --layout compressed-tensors
                                 bits alone, as the format compressed-tensors can say them

A rounded matrix costs nats like a dropped singular group (`grasp.stages.sensitivity`), so one
multiplier chooses among all of them (`grasp.methods.bits`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from grasp.core import compressed_tensors
from grasp.core.compressed_tensors import COMPRESSED_TENSORS, GRASP, LAYOUTS, alike
from grasp.core.decoder import Decoder
from grasp.core.edits import Step
from grasp.core.fields import flag, shortened
from grasp.core.layer import Linear
from grasp.core.records import Allocation, Statistics
from grasp.core.runner import Runner
from grasp.core.sayable import check_sayable
from grasp.core.sizes import at_least, bytes_of
from grasp.errors import RecipeError
from grasp.methods.bits import InWidths, Offered, in_widths
from grasp.methods.components import Problem
from grasp.methods.costs import Costs
from grasp.methods.low_rank import LowRank, carried_out
from grasp.methods.rounding import offered_inside, offered_outside, roundings, shapes_at
from grasp.stages import operations
from grasp.stages.narrowing import AXES
from grasp.stages.operations import Operations, total
from grasp.stages.rounding import GROUPS, PIVOTED_BITS, ROWS, Width, widths
from grasp.stages.sensitivity import Sensitivities, Sensitivity

logger = logging.getLogger(__name__)

BITS = (16, 8, 6, 5, 4, 3)


@dataclass(frozen=True, kw_only=True)
class Dial(LowRank):
    """Base of the low-rank methods that can choose bits, too."""

    size: str | None = flag(
        None,
        "Instead of --ratio: what the weights may take in the file, e.g. 90MB; ranks, channels and"
        " bits together.",
    )
    bits: tuple[int, ...] | None = flag(
        None,
        "Bits that weights may have where the budget is in bytes: all of"
        f" {','.join(map(str, BITS))} with --size, else 16, no rounding.",
        words=BITS,
        metavar="BITS,...",
    )

    group_sizes: tuple[int, ...] = flag(
        GROUPS,
        "Weights that may share a scale, below 8 bits; servers' kernels may ask for one of them.",
        words=(32, 64, 128, 256),
        metavar="SIZE,...",
    )
    activations: str = flag(
        "float",
        "float (as they are), or int8: where a dense matrix has 8 bits, its inputs too, with one"
        " scale a token; not those of fewer bits, of pairs, of embedding and head.",
        words=("float", "int8"),
    )
    layout: str = flag(
        GRASP,
        f"{COMPRESSED_TENSORS}: bits alone, and only those that `grasp export --format"
        f" {COMPRESSED_TENSORS}` writes, for servers' own kernels: 16, 8, 4 without minima.",
        words=LAYOUTS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.group_sizes or len(set(self.group_sizes)) < len(self.group_sizes):
            said = ",".join(map(str, self.group_sizes))
            raise RecipeError(f"--group-sizes {said}: name at least one, and none twice")
        if self.size is not None and not bytes_of(self.size):
            raise RecipeError(
                f"--size {shortened(self.size)}: not a size; write it like 90MB or 4.5GB"
            )
        if self.size is not None and self.budget == "latency":
            raise RecipeError(f"--size {self.size}: is in bytes; leave --budget {self.budget} out")
        if self.rounds_activations and 8 not in self.offered_bits:
            way = "allow them in --bits" if self.bits is not None else "give --size"
            raise RecipeError(
                f"--activations {self.activations}: goes with weights in 8 bits; {way}, or leave"
                " --activations out"
            )
        if self.for_servers:
            self._check_layout()
        if self.bits is None:
            return
        if not self.bits or len(set(self.bits)) < len(self.bits):
            allowed = ", ".join(map(str, BITS))
            raise RecipeError(f"{self.said_bits}: name at least one of {allowed}, and none twice")
        if self.rounds_weights and self.unit != "bytes":
            raise RecipeError(
                f"{self.said_bits}: bits are weighed in bytes; give --size, or --budget bytes"
            )

    def _check_layout(self) -> None:
        """Raise `RecipeError` for what --layout compressed-tensors has no words for."""
        said, bits = f"--layout {self.layout}", compressed_tensors.BITS
        groups = compressed_tensors.GROUPS
        if not self.rounds_weights:
            raise RecipeError(f"{said}: is about bits; give --size, or --budget bytes and --bits")
        if odd := [one for one in self.offered_bits if one not in bits]:
            raise RecipeError(
                f"{said} --bits {odd[0]}: it has {', '.join(map(str, bits))}; take some of these"
            )
        if odd := [size for size in self.group_sizes if size not in groups]:
            raise RecipeError(
                f"{said} --group-sizes {odd[0]}: it has {', '.join(map(str, groups))}; take some"
                " of these"
            )

    @property
    def for_servers(self) -> bool:
        """Whether the result is one that `grasp export --format compressed-tensors` can write."""
        return self.layout == COMPRESSED_TENSORS

    @property
    def said_bits(self) -> str:
        """The flag that asks for bits, as it was given."""
        if self.bits is None:
            return f"--size {self.size}"
        return f"--bits {','.join(map(str, self.bits))}"

    @property
    def offered_bits(self) -> tuple[int, ...]:
        """Bits that weights may have."""
        if self.bits is not None or self.size is None:
            return self.bits or (16,)
        return compressed_tensors.BITS if self.for_servers else BITS

    @property
    def offered_widths(self) -> tuple[Width, ...]:
        """Ways to store a matrix that is rounded."""
        return widths(
            self.offered_bits, self.group_sizes, self.for_servers, self.rounds_activations
        )

    @property
    def rounds_weights(self) -> bool:
        return any(bits < 16 for bits in self.offered_bits)

    @property
    def rounds_activations(self) -> bool:
        """Whether 8 bits are of activations too."""
        return self.activations == "int8"

    @property
    def asked_sizes(self) -> dict[str, object]:
        return {**super().asked_sizes, "--size": self.size}

    @property
    def unit(self) -> str:
        return super().unit if self.size is None else "bytes"

    @property
    def asked_bytes(self) -> int | None:
        return None if self.size is None else bytes_of(self.size)

    def check(self, decoder: Decoder) -> None:
        super().check(decoder)
        if self.for_servers:
            check_sayable(decoder, f"--layout {self.layout}", "leave --layout out")

    def most_parameters(self, decoder: Decoder, linears: Sequence[Linear]) -> int | None:
        return None if self.in_16_bits else super().most_parameters(decoder, linears)

    @property
    def in_16_bits(self) -> bool:
        return self.size is not None or self.rounds_weights

    def at_ratio(self, ratio: float) -> Self:
        if self.size is None:
            return super().at_ratio(ratio)
        return dataclasses.replace(
            self, ratio=ratio, size=None, budget="bytes", bits=self.offered_bits
        )

    def spend(self, costs: Costs, dense: float) -> float:
        if self.asked_bytes is None:
            return super().spend(costs, dense)
        return self.asked_bytes - (costs.whole - dense)

    def target(self, costs: Costs, problem: Problem) -> float:
        if self.asked_bytes is None:
            return super().target(costs, problem)
        spend, least = self.spend(costs, problem.dense), problem.least
        if spend < least:
            smallest = self.asked_bytes + least - spend
            raise RecipeError(
                f"--size {self.size}: cannot be reached; the smallest reachable is"
                f" {at_least(smallest)} (all as small as can be)"
            )
        return spend

    # --- bits

    def of_sensitivities(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        """What the prices of rounding these matrices take in a sweep, a token."""
        if not self.rounds_weights:
            return {}
        return operations.sensitivities(decoder, linears, self.rounds_activations)

    def of_rounding(self, linears: Sequence[Linear]) -> Operations:
        """What pricing and rounding these matrices once takes."""
        if not self.rounds_weights:
            return {}
        count = len(self.offered_widths)
        return total(operations.rounding(one.shape, ROWS, count) for one in linears)

    def outside(self, runner: Runner) -> dict[str, Offered]:
        """The widths of what is outside the layers: the embedding, and a head of its own."""
        if not self.rounds_weights or self.for_servers:
            return {}
        return offered_outside(runner, self.offered_bits, self.group_sizes)

    def in_widths(
        self,
        decoder: Decoder,
        stats: Statistics,
        problem: Problem,
        outside: Mapping[str, Offered],
    ) -> InWidths:
        """The problem with a width for every matrix; where none is rounded, the same problem."""
        if not self.rounds_weights:
            return InWidths(problem, problem)
        found: Mapping[str, Sensitivity] = stats[Sensitivities.name]
        offered = offered_inside(
            decoder, found, self.offered_widths, 16 in self.offered_bits, self.for_servers
        )
        together = alike(offered) if self.for_servers else ()
        names = [name for name in problem.components if name.rpartition(" ")[2] in AXES]
        narrower = {name: partial(shapes_at, decoder, name) for name in names}
        pivoted = self.storage == "pivoted"
        return in_widths(problem, offered, narrower, pivoted, outside, together)

    def carried_out(
        self, runner: Runner, stats: Statistics, offer: InWidths, chosen: Allocation
    ) -> Iterator[Step]:
        """The edits of all that becomes smaller, then those that round."""
        rounded = offer.rounded(chosen)
        found = [how.width.rounds_activations for how in rounded.values()]
        if self.rounds_activations and not any(found):
            logger.warning(
                "--activations %s: none is, since weights in other widths cost less; --bits 16,8"
                " leaves no other width",
                self.activations,
            )
        plain = {path for path, how in rounded.items() if how.width.bits < PIVOTED_BITS}
        yield from carried_out(runner, offer.of, offer.sizes(chosen), plain)
        if rounded:
            yield from roundings(runner, stats[Sensitivities.name], rounded)
