"""Stage 2c', the forecast: what is lost on text that the statistics have not seen.

Groups and channels are chosen on the tokens that judge them, so the loss they seem to cost is too
low, the more so the fewer the tokens. The same sweep sums up two halves of the blocks, A and B.
Whatever is chosen on A can be judged on B, and the other way round:

    in     chosen on a half, judged on that half
    out    chosen on a half, judged on the other

Half of so many independent tokens have twice the gap, since it falls as one over their number; all
of them therefore have

    price = in(whole) + 1/2 (out(half) - in(half))

Sizes are chosen by that (`forecast`), and choosing hardly flatters it. But the gap of a real model
falls more slowly, and what was not seen is another text, not a half of this one. So what is stated
(`stated`) has `LEFT` of the halves' gap in the place of 1/2:

    rise = in(whole) + 2 LEFT (price - in(whole))

Ours. Measured against real losses in docs/fisher.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from grasp.core.records import Curvature, Statistics
from grasp.core.scratch import Scratch
from grasp.stages.basis import groups, judged, on_the_shorter_side
from grasp.stages.curvature import Curvatures

LEFT = 0.7
"""Of the gap between a half and the other, what is there between the whole set and other text of
its source; fitted to real rises (docs/log.md).
"""
SPREAD, LEAST = 0.15, 0.02
"""Of the interval about an expected rise: a share of it, and nats a token at least. Measured from
64 blocks of 512 tokens on.
"""
BEYOND = 0.05
"""With fewer the real rise may be higher, beyond what a second-order price can tell. From 16 and 32
blocks it was at most this share above what would be lost if the gap between a half and the other
did not fall with more tokens.
"""


@dataclass(frozen=True)
class Halves:
    """The curvature of one matrix on the whole set, and on its two halves where it has two."""

    whole: Curvature
    parts: tuple[Curvature, ...] = ()


def halves(stats: Statistics, path: str) -> Halves:
    """What the two collectors of `Curvatures` with `half` have seen of a matrix, or the one without
    it.
    """
    if Curvatures.name in stats.tables:
        return Halves(stats[Curvatures.name][path])
    tables = [stats[f"{Curvatures.name}.{half}"] for half in (0, 1)]
    parts = tuple(table[path] for table in tables if table)
    return Halves(parts[0] + parts[1], parts) if len(parts) == 2 else Halves(parts[0])


def forecast(
    whole: Float[Tensor, "sizes"],
    judged: Iterable[tuple[Float[Tensor, "sizes"], Float[Tensor, "sizes"]]],
) -> Float[Tensor, "sizes"]:
    """The price of every size, smallest first: what unseen tokens like these would lose, from
    `whole`, judged on the tokens that chose, and from the (in, out) of each half. Never below
    `whole`, and falling.
    """
    gaps = [out - seen for seen, out in judged]
    if not gaps:
        return whole
    return falling(whole + torch.stack(gaps).mean(0).clamp_min(0) / 2)


def forecast_ranks(
    weight: Float[Tensor, "out in"],
    whole: Float[Tensor, "k_and_1"],
    parts: tuple[Curvature, ...],
    basis: str,
) -> Float[Tensor, "k_and_1"]:
    """`forecast` at every rank of a matrix that loses `whole` on all tokens: decomposed on each
    half of the blocks, and judged on both.
    """
    parts = tuple(on_the_shorter_side(one, weight) for one in parts)
    gaps = []
    for chooser, judge in zip(parts, reversed(parts), strict=True):
        found = groups(weight, chooser, basis, Scratch())
        seen, out = (judged(found, weight, one).cpu() for one in (chooser, judge))
        gaps.append((seen, out))
    return forecast(whole, gaps)


def falling(losses: Float[Tensor, "sizes"]) -> Float[Tensor, "sizes"]:
    """The losses at rising sizes, none below that of a larger size."""
    return losses.flip(0).cummax(0).values.flip(0)


def stated(price: float, seen: float) -> float:
    """The rise to expect of unseen text, of a size or of several together, where the price is that
    of `forecast` and the calibration text itself loses `seen`; nats a token.
    """
    return seen + 2 * LEFT * (price - seen)


def interval(rise: float, seen: float) -> tuple[float, float]:
    """(low, high) about an expected rise, where the calibration text itself loses `seen`; nats a
    token.
    """
    spread = max(SPREAD * rise, LEAST)
    no_closer = seen + (rise - seen) / LEFT
    return max(rise - spread, 0.0), max(rise + spread, (1 + BEYOND) * no_closer)


def expectation(expected: float, seen: float, loss: float) -> dict[str, float]:
    """What a manifest says of a forecast: `loss` before, on the calibration text; the rise there
    and the rise to expect of unseen text of the same kind, with its interval; nats a token.
    """
    low, high = interval(expected, seen)
    return {
        "loss_before": loss,
        "loss_rise": expected,
        "perplexity_ratio": math.exp(expected),
        "seen_rise": seen,
        "low": low,
        "high": high,
    }
