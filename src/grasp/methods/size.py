"""How much low-rank pairs may take together: a share of the model, or of the chosen matrices, of
numbers, bytes or time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grasp.core.decoder import Decoder
from grasp.core.fields import RankMultiple, Share, flag
from grasp.core.layer import Linear
from grasp.errors import RecipeError
from grasp.methods.base import Method, check_rank_multiple, ratio_unreachable
from grasp.stages import budget as budgets
from grasp.stages.latency import Latency

BUDGETS, STORAGES = ("params", "bytes", "latency"), ("pivoted", "pair")
STORED = "How a product is stored: pivoted (rank² fewer numbers) or pair (two thin matrices)."


@dataclass(frozen=True, kw_only=True)
class Size(Method):
    """Base of the methods that store matrices as low-rank pairs."""

    ratio: Share | None = flag(None, "Share of ALL parameters to remove.")
    retain_ratio: Share | None = flag(
        None, "Instead of --ratio: share of the chosen matrices' parameters to keep."
    )
    budget: str = flag(
        "params",
        "What the share is of: params, bytes, or latency (decode time measured here, of the chosen"
        " matrices).",
        words=BUDGETS,
    )
    storage: str = flag("pair", STORED, words=STORAGES)
    rank_multiple: RankMultiple = flag(
        1, "Round ranks down to a multiple of this, e.g. 8 for hardware."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [
            name
            for name, value in (("--ratio", self.ratio), ("--retain-ratio", self.retain_ratio))
            if value is not None
        ]
        if len(given) != 1:
            said = "got both" if given else "none was given"
            raise RecipeError(
                f"--method {self.name}: say how much to compress with one of --ratio,"
                f" --retain-ratio; {said}"
            )

    def check_size(self, decoder: Decoder, linears: Sequence[Linear]) -> None:
        """Raise `RecipeError` where these matrices, all that may be edited, cannot meet the
        size.
        """
        check_rank_multiple(self.rank_multiple, linears)
        if self.ratio is None or self.budget == "latency":
            return
        cost = self.cost(decoder)
        saved = sum(cost(linear.shape, None) - cost(linear.shape, 0) for linear in linears)
        largest = saved / (
            decoder.num_parameters() if self.budget == "params" else decoder.num_bytes()
        )
        if self.ratio > largest:
            hint = "all chosen matrices at rank 0; take more --layers or --projections"
            raise ratio_unreachable(self.ratio, largest, hint)

    def cost(self, decoder: Decoder) -> budgets.Cost:
        """What a matrix costs at a rank, in the unit of the budget."""
        if self.budget == "latency":
            return Latency(decoder.device, decoder.dtype, self.storage == "pivoted")
        size = self.numbers
        if self.budget == "params":
            return size
        width = decoder.dtype.itemsize
        places = 4 if self.storage == "pivoted" else 0
        return lambda shape, rank: (
            width * size(shape, rank) + (0 if rank is None else places * shape[0])
        )

    @property
    def numbers(self) -> budgets.Cost:
        """How many numbers a matrix takes at a rank."""
        return budgets.pivoted_parameters if self.storage == "pivoted" else budgets.parameters

    def spend(self, decoder: Decoder, dense: float) -> float:
        """What the chosen matrices may cost together, which cost `dense` now."""
        if self.retain_ratio is not None:
            return self.retain_ratio * dense
        assert self.ratio is not None
        whole = {
            "params": decoder.num_parameters(),
            "bytes": decoder.num_bytes(),
            "latency": dense,
        }[self.budget]
        return dense - self.ratio * whole

    def most_parameters(self, decoder: Decoder, linears: Sequence[Linear]) -> int | None:
        """The most that the model will hold; None where it follows from times not yet measured."""
        total, sizes = decoder.num_parameters(), sum(math.prod(linear.shape) for linear in linears)
        gone = (
            self.ratio
            if self.ratio is not None
            else (1 - (self.retain_ratio or 0.0)) * sizes / total
        )
        return None if self.budget == "latency" else math.floor((1 - gone) * total)
