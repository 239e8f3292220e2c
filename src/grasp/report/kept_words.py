"""What every layer kept, in words: for the model card, the page, and those who cannot see the
picture.
"""

from __future__ import annotations

from collections.abc import Sequence

from grasp.report.kept import Kept, Strip
from grasp.report.wording import percent


def facts(kept: Kept) -> list[tuple[str, str]]:
    """(what, how much of it is left), only of what is not as it was."""
    found = []
    if kept.strips and kept.changed:
        whole = kept.whole
        left, of = (sum(getattr(c, key) for c in whole.cells.values()) for key in ("left", "of"))
        told = f"{percent(whole.share)} kept, {left:,} of {of:,} numbers"
        found.append(("matrices of the layers", told))
    found += [(strip.name, _width(strip)) for strip in kept.widths]
    if pairs := _pairs(kept):
        found.append(("low-rank matrices", pairs))
    layers = {
        "removed layers": kept.removed,
        "layers without attention": kept.without("attention"),
        "layers without MLP": kept.without("mlp"),
    }
    return found + [(what, listed(found)) for what, found in layers.items() if found]


def in_a_line(kept: Kept) -> str:
    """The facts together."""
    return "; ".join(f"{what}: {text}" for what, text in facts(kept))


def _width(strip: Strip) -> str:
    return f"{percent(strip.share)} kept, {spread(strip.lefts)} of {strip.most:,} a layer"


def _pairs(kept: Kept) -> str:
    cells = [
        (layer, cell.rank)
        for strip in kept.strips
        for layer, cell in strip.cells.items()
        if cell.rank is not None
    ]
    if not cells:
        return ""
    layers = sorted({layer for layer, _ in cells})
    ranks = sorted({rank for _, rank in cells})
    return f"{len(cells)} in layers {listed(layers)}; ranks {spread(ranks)}"


def spread(numbers: Sequence[int]) -> str:
    """The range of rising numbers: "480 to 1,536"."""
    if not numbers:
        return "0"
    ends = dict.fromkeys([f"{numbers[0]:,}", f"{numbers[-1]:,}"])
    return " to ".join(ends)


def listed(numbers: Sequence[int]) -> str:
    """The rising numbers, or only their range where they are many."""
    return ", ".join(map(str, numbers)) if len(numbers) <= 12 else f"{numbers[0]} to {numbers[-1]}"
