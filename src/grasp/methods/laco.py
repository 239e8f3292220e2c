"""LaCo: Large Language Model Pruning via Layer Collapse (Yang et al., arXiv 2402.11187, Algorithm
1).

1. Keep the last hidden state of the original model on a few samples (section 3.3): what the body of
   a model gives to its head, behind the final norm; all of a sample is one vector.
2. From the top down, with `m = merge - 1`: merge layers l+1 to l+m into l, by the differences that
   they make, and delete them,

       theta_l* = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l)

   for all matrices of the layer and their biases (section 3.2). The norms stay those of l.
3. Where the mean cosine between the last hidden states of this candidate and of the original is
   above `threshold`, keep it and go on at l - interval, or lower where too few layers are left
   above; else forget it and go on at l - 1.

The published notebook takes each difference from the layer before, so that the sum telescopes to
the weights of the last merged layer; this is the formula of the paper.

How much goes follows from merge, interval and threshold. With `ratio` or `num_layers` they are
searched, the interval excepted, so that the fewest layers go that reach the size. For each number
of layers m that go at a time and divide the number that has to (merge 2 to 7, as in the paper, or
the one given), the threshold is bisected `STEPS` times between -1 and 1 for the highest at which
the rule above gets there, where it stops. Of the results, the one nearest to the original counts.
That compares at most (STEPS m-values (layers)) candidates, none of them twice; two runs that begin
alike share what they have compared, so it is about a third of that.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from msgspec import Meta

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Step
from grasp.core.edits.droppable import check_droppable
from grasp.core.fields import Count, NumLayers, Share, flag
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.methods.base import Method, Plan, check_one_size, ratio_unreachable
from grasp.stages.merging import Candidates, Merge, check_alike, merging
from grasp.stages.statistics import Similarity

logger = logging.getLogger(__name__)

MERGE = 4
"""Layers merged into one where only a threshold is given: the paper's for Llama-2-7B."""
MERGES = (2, 3, 4, 5, 6, 7)
"""Those that a search tries."""
STEPS = 8
"""Bisections of the threshold, to within 2 / 2^8."""

EVERYTHING = -math.inf
"""A threshold below every cosine."""

Similar = Callable[[Sequence[Merge]], float]
"""How near a model with these merges is to the original."""


@dataclass(frozen=True, kw_only=True)
class LaCo(Method):
    """Merge neighbouring layers into one by the sum of their differences, where the last hidden
    state stays near that of the original model.
    """

    name: ClassVar[str] = "laco"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.11187"

    ratio: Share | None = flag(
        None, "Share of ALL parameters to remove; --merge and --threshold are searched for it."
    )
    num_layers: NumLayers | None = flag(
        None, "Remove this many layers; --merge and --threshold are searched for it."
    )
    threshold: Annotated[float, Meta(ge=-1, le=1)] | None = flag(
        None, "Merge wherever the last hidden state keeps a cosine above this, e.g. 0.65."
    )
    merge: Annotated[int, Meta(ge=2, le=10_000)] | None = flag(
        None, f"Layers that become one (default {MERGE}, or searched, {MERGES[0]} to {MERGES[-1]})."
    )
    interval: Count = flag(1, "Layers to go down by after a merge.")
    lowest_layer: NumLayers = flag(0, "The lowest layer that others are merged into.")
    highest_layer: NumLayers | None = flag(
        None, "The highest layer that is merged into another (default: the last)."
    )
    compare_samples: Count = flag(
        5, "Calibration blocks on which a candidate is compared with the original model."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {
            "--ratio": self.ratio,
            "--num-layers": self.num_layers,
            "--threshold": self.threshold,
        }
        check_one_size(self.name, sizes)

    # --- what is asked of it

    def check(self, decoder: Decoder) -> None:
        low, high = self._range(decoder)
        if high not in decoder.kept or low >= high:
            wrong = f"--highest-layer {high}" if self.highest_layer else f"--lowest-layer {low}"
            raise RecipeError(
                f"{wrong}: the model has layers 0 to {decoder.num_layers - 1}; at least two are"
                " needed, from the lowest to the highest"
            )
        if self.merge is not None and self.merge > high - low + 1:
            raise RecipeError(
                f"--merge {self.merge}: only {high - low + 1} layers may be merged, {low} to {high}"
            )
        check_alike(decoder, range(low, high + 1), f"--method {self.name}")
        if self._goal(decoder) != 0:
            width = self._widths(decoder)[0]
            # which layers go is not known yet; the highest stand for all
            check_droppable(decoder, range(high - width + 1, high + 1))

    def plan(self, decoder: Decoder) -> Plan:
        goal, widths = self._goal(decoder), self._widths(decoder)
        gone = max(self._most(decoder, one) for one in widths) if goal is None else goal
        if not gone:
            return Plan(0, 0, decoder.num_parameters(), 1, 0)
        merges = gone // widths[0]
        edits = merges * len(decoder.linears(self.lowest_layer)) + gone
        left = None if goal is None else decoder.num_parameters() - goal * self._size(decoder)
        runs = 1 if goal is None else STEPS * len(widths) / 3
        blocks = runs * len(decoder.kept) * self.compare_samples / 2  # from a layer to the head
        return Plan(
            min(gone + merges, len(decoder.kept)),
            edits,
            left,
            1,
            0,
            forward_blocks=math.ceil(blocks),
            held_blocks=self.compare_samples * (1 + len(decoder.kept)),
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        return [Similarity()]

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        decoder, goal = runner.decoder, self._goal(runner.decoder)
        if goal == 0:
            return
        candidates, widths = Candidates(runner, self.compare_samples), self._widths(decoder)
        similarity = candidates.similarity
        if goal is not None:
            merges = self._search(decoder, widths, goal, similarity)
        else:
            merges = self._walk(decoder, widths[0], self.threshold or 0.0, similarity)
        logger.info(
            "the cosine with the original's last hidden states is %.4f; %d candidates compared",
            similarity(merges),
            len(candidates.known) - 1,
        )
        for merge in merges:
            for edit in merging(runner, merge):
                yield Step(edit)

    # --- Algorithm 1, and the search around it

    def _walk(
        self,
        decoder: Decoder,
        width: int,
        threshold: float,
        similarity: Similar,
        goal: int | None = None,
    ) -> list[Merge]:
        """The merges that are kept, `width` layers going at a time, until `goal` layers are
        gone. With `EVERYTHING` nothing is compared.
        """
        left, kept = list(decoder.kept), list[Merge]()
        low, high = (left.index(layer) for layer in self._range(decoder))
        place = high - width
        while place >= low and (goal is None or len(kept) * width < goal):
            merge = tuple(left[place : place + width + 1])
            if threshold == EVERYTHING or similarity([*kept, merge]) > threshold:
                kept.append(merge)
                del left[place + 1 : place + width + 1]
                high -= width
                place = min(place - self.interval, high - width)
            else:
                place -= 1
        return kept

    def _search(
        self, decoder: Decoder, widths: Sequence[int], goal: int, similarity: Similar
    ) -> list[Merge]:
        """The merges that take `goal` layers away and leave the model nearest to the original."""
        found: list[list[Merge]] = []
        for width in widths:
            reached = self._walk(decoder, width, EVERYTHING, similarity, goal)
            low, high = -1.0, 1.0
            for _ in range(STEPS):
                threshold = (low + high) / 2
                tried = self._walk(decoder, width, threshold, similarity, goal)
                if len(tried) * width == goal:
                    reached, low = tried, threshold
                else:
                    high = threshold
            found.append(reached)
            logger.info("--merge %d: a cosine of %.4f", width + 1, similarity(reached))
        return max(found, key=similarity)

    # --- sizes

    def _range(self, decoder: Decoder) -> tuple[int, int]:
        """The lowest and the highest layer that take part."""
        high = decoder.kept[-1] if self.highest_layer is None else self.highest_layer
        return self.lowest_layer, high

    def _goal(self, decoder: Decoder) -> int | None:
        """How many layers have to go; None where that follows from the threshold. Raises
        `RecipeError` where so many cannot.
        """
        if self.threshold is not None:
            return None
        most = max(self._most(decoder, width) for width in self._tried)
        if self.num_layers is not None:
            if self.num_layers and not self._ways(decoder, self.num_layers):
                at_a_time = f", {self.merge - 1} at a time" if self.merge else ""
                raise RecipeError(
                    f"--num-layers {self.num_layers}: so many cannot go by merging{at_a_time}; at"
                    f" most {most} can, at --interval {self.interval}"
                )
            return self.num_layers
        assert self.ratio is not None
        total, size = decoder.num_parameters(), self._size(decoder)
        least = math.ceil((self.ratio * total - 1e-6) / size)
        enough = (n for n in range(least, most + 1) if n == 0 or self._ways(decoder, n))
        count = next(enough, None)
        if count is None:
            hint = f"{most} layers, at --interval {self.interval}"
            raise ratio_unreachable(self.ratio, most * size / total, hint)
        return count

    @property
    def _tried(self) -> list[int]:
        """How many layers a search lets go at a time."""
        return [one - 1 for one in (MERGES if self.merge is None else (self.merge,))]

    def _ways(self, decoder: Decoder, count: int) -> list[int]:
        """Those of them by which just `count` layers can go."""
        return [
            width
            for width in self._tried
            if count % width == 0 and self._most(decoder, width) >= count
        ]

    def _widths(self, decoder: Decoder) -> list[int]:
        """How many layers may go at a time."""
        goal = self._goal(decoder)
        if goal is not None:
            return self._ways(decoder, goal)
        low, high = self._range(decoder)
        return [min((self.merge or MERGE) - 1, high - low)]

    def _most(self, decoder: Decoder, width: int) -> int:
        """The most layers that can go, `width` at a time."""
        return width * len(self._walk(decoder, width, EVERYTHING, lambda _: 1.0))

    def _size(self, decoder: Decoder) -> int:
        """Parameters of one layer: all are alike."""
        return sum(p.numel() for p in decoder.layer(self.lowest_layer).module.parameters())
