"""What the pictures of perplexity share: axes by its logarithm, and one legend over all panels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot


def by_logarithm(axes: Any, ticks: Sequence[float], names: Sequence[str], title: str) -> None:
    """Perplexity upwards, with these ticks."""
    axes.set_yscale("log")
    axes.set_yticks(ticks, names)
    axes.yaxis.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def finish(figure: Any, panels: Sequence[Any], path: Path, columns: int) -> None:
    """Put the first panel's legend above all, and write the picture."""
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
