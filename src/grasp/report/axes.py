"""The axis of a measure: logarithmic or not, where its marks stand, how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import altair as alt


def is_wide_spread(values: Sequence[float | int]) -> bool:
    """Whether values need a logarithmic axis: all above 0, and the largest more than ten times the
    smallest.
    """
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def scale_of(values: Sequence[float | int], zero_based: bool = False) -> alt.Scale:
    """Logarithmic for a wide spread; `zero_based`: from 0, where the values come near it."""
    if is_wide_spread(values):
        return alt.Scale(type="log", nice=False, padding=10)
    near = zero_based and min(values, default=1) < 0.3 * max(values, default=1)
    return alt.Scale(zero=near, nice=True) if near else alt.Scale(zero=False, nice=True, padding=8)


def ticks(values: Sequence[float | int], most: int = 7) -> list[float]:
    """Round places on a logarithmic axis: powers of ten, with twice and five times them where these
    are few.
    """
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    for steps in ((1, 2, 5), (1,)):
        found = [step * 10.0**power for power in powers for step in steps]
        inside = [place for place in found if min(values) <= place <= max(values) * 1.001]
        if 2 <= len(inside) <= most:
            return inside
    return [10.0**power for power in powers][:: max(1, len(powers) // 4)]


def axis_of(values: Sequence[float | int], share: bool) -> alt.Axis:
    """The axis of a measure, with marks that suit `scale_of`."""
    if share:
        return alt.Axis(format=".0%", tickCount=5)
    return (
        alt.Axis(format=",.6~g", values=ticks(values))
        if is_wide_spread(values)
        else alt.Axis(format=",.6~g", tickCount=5)
    )


def number_format(share: bool) -> str:
    """How a measure is written in a tooltip."""
    return ".1%" if share else ",.4~g"
