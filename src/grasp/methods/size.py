"""How much low-rank pairs may take together: a share of the model, or of the chosen matrices, of
numbers, bytes or time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grasp.core.decoder import Decoder
from grasp.core.fields import RankMultiple, Share, Speedup, flag
from grasp.core.layer import Linear
from grasp.errors import RecipeError
from grasp.methods.base import Method, check_one_size, check_rank_multiple, ratio_unreachable
from grasp.methods.costs import BUDGETS, Costs, Storage, Time
from grasp.stages.latency import Latency

STORAGES = ("pivoted", "pair")
STORED = "How a product is stored: pivoted (rank² fewer numbers) or pair (two thin matrices)."


@dataclass(frozen=True, kw_only=True)
class Size(Method):
    """Base of the methods that store matrices as low-rank pairs."""

    ratio: Share | None = flag(None, "Share of ALL parameters to remove.")
    retain_ratio: Share | None = flag(
        None, "Instead of --ratio: share of the chosen matrices' parameters to keep."
    )
    speedup: Speedup | None = flag(
        None, "Instead of --ratio: times faster, e.g. 1.3, as measured here (--budget latency)."
    )
    budget: str = flag(
        "params",
        "What the ratio is a share of: params, bytes, or latency (half decode time, half prefill"
        " time, measured here).",
        words=BUDGETS,
    )
    storage: str = flag("pair", STORED, words=STORAGES)
    rank_multiple: RankMultiple = flag(
        1, "Round ranks down to a multiple of this, e.g. 8 for hardware."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_size(self.name, self.asked_sizes)

    @property
    def asked_sizes(self) -> dict[str, object]:
        """The flags that say how small, one of which is given."""
        return {
            "--ratio": self.ratio,
            "--retain-ratio": self.retain_ratio,
            "--speedup": self.speedup,
        }

    @property
    def share(self) -> float | None:
        """What is to be removed, of the whole model in the budget's unit."""
        return self.ratio if self.speedup is None else 1 - 1 / self.speedup

    @property
    def unit(self) -> str:
        """What the budget counts, one of `BUDGETS`."""
        return self.budget if self.speedup is None else "latency"

    @property
    def measures_time(self) -> bool:
        return self.unit == "latency"

    def check_size(self, decoder: Decoder, linears: Sequence[Linear]) -> None:
        """Raise `RecipeError` where these matrices, all that may be edited, cannot meet the
        size.
        """
        check_rank_multiple(self.rank_multiple, linears)
        if self.share is None or self.unit == "latency":
            return
        costs = self.costs(decoder)
        largest = self.most_saved(decoder, linears, costs) / costs.whole
        if self.share > largest:
            hint = "all chosen matrices as small as can be; take more --layers or --projections"
            raise self.unreachable(largest, hint)

    def most_saved(self, decoder: Decoder, linears: Sequence[Linear], costs: Costs) -> float:
        """What these matrices save where they are as small as can be, in the budget's unit."""
        at = [(costs.of(linear.path), linear.shape) for linear in linears]
        return sum((cost(shape, None) - cost(shape, 0) for cost, shape in at), 0.0)

    def unreachable(self, largest: float, hint: str) -> RecipeError:
        """The error for a size beyond `largest`, the most of the whole model that can go."""
        if self.speedup is None:
            assert self.ratio is not None
            return ratio_unreachable(self.ratio, largest, hint)
        most = int(1e3 / (1 - largest)) / 1e3 if largest < 1 else math.inf
        return RecipeError(
            f"--speedup {self.speedup}: cannot be reached; the largest reachable is {most} ({hint})"
        )

    def costs(self, decoder: Decoder) -> Costs:
        """What parts of the model cost, in the unit of the budget. Time is measured now, on the
        model as it is.
        """
        pivoted = self.storage == "pivoted"
        if self.unit == "latency":
            return Time(Latency(decoder, pivoted))
        return Storage.of_model(decoder, self.unit == "bytes", pivoted, self.in_16_bits)

    def spend(self, costs: Costs, dense: float) -> float:
        """What the parts that may be smaller may cost together, which cost `dense` now."""
        if self.retain_ratio is not None:
            return self.retain_ratio * dense
        assert self.share is not None
        return dense - self.share * costs.whole

    def most_parameters(self, decoder: Decoder, linears: Sequence[Linear]) -> int | None:
        """The most that the model will hold; None where it follows from times not yet measured."""
        total, sizes = decoder.num_parameters(), sum(math.prod(linear.shape) for linear in linears)
        gone = (
            self.share
            if self.share is not None
            else (1 - (self.retain_ratio or 0.0)) * sizes / total
        )
        return None if self.unit == "latency" else math.floor((1 - gone) * total)
