"""Plots of a manifest, drawn with matplotlib into a file (.png, .svg or .pdf)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from grasp.core.destination import check_file
from grasp.core.edits import Entry, layer_of, read_log
from grasp.core.writing import whole_file
from grasp.errors import RecipeError

KEPT, LEFT = "#c1440e", "#9aa5b1"


def check_picture(path: Path) -> None:
    """Raise `RecipeError` where a picture cannot be written: asked before any work is done."""
    kinds = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lstrip(".") not in kinds:
        raise RecipeError(
            f"--output {path}: not a picture matplotlib writes; allowed:"
            f" {', '.join('.' + kind for kind in kinds)}"
        )
    check_file(path, "--output")


def overview(manifest: dict[str, Any], path: Path, matrices: int = 3) -> Path:
    """Block influence per layer with the edited layers marked; below, score against sigma of a few
    matrices with kept groups marked.

    The second row is the paper's Figure 2: a large singular value is not always an important one.
    Where the ranks come from one budget for all matrices, it is instead the share of groups that
    every matrix kept.
    """
    by_budget = "prediction" in manifest
    scored = [entry for entry in read_log(manifest) if entry.note.scores]
    shown = [] if by_budget else _spread(scored, matrices)
    below = ["ranks"] if by_budget else [f"m{i}" for i in range(len(shown))]
    figure, rows = pyplot.subplot_mosaic(
        [["bi"] * len(below), below] if below else [["bi"]],
        figsize=(11, 7 if below else 3.8),
        layout="constrained",
    )
    if by_budget:
        rank_map(rows["ranks"], manifest)
    block_influence(rows["bi"], manifest)
    for number, entry in enumerate(shown):
        kept_groups(rows[f"m{number}"], entry)
        if number == 0:
            rows["m0"].set_ylabel(f"{entry.note.score} score (higher = keep)")
    sizes = manifest["parameters"]
    figure.suptitle(
        f"{manifest['model']['source']}  ·  {manifest['method']['name']}  · "
        f" {sizes['before'] / 1e6:.1f} M → {sizes['after'] / 1e6:.1f} M parameters"
        f" ({100 * sizes['ratio']:.1f} % removed)"
    )
    return _written(figure, path)


def block_influence(axes: Axes, manifest: dict[str, Any]) -> None:
    """One bar a layer; low bars are redundant layers, edited ones are filled."""
    kind, scores = next(iter(manifest["redundancy"].items()))
    edited = read_log(manifest).layers
    layers = [int(layer) for layer in scores]
    axes.bar(
        layers, list(scores.values()), color=[KEPT if layer in edited else LEFT for layer in layers]
    )
    axes.set_yscale("log")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(
        "block influence\n(low = redundant)" if kind == "bi" else "angular distance / π"
    )
    axes.set_xticks(layers[:: max(1, len(layers) // 32)])
    axes.margins(x=0.01)
    axes.legend(
        handles=[Patch(color=KEPT, label="edited"), Patch(color=LEFT, label="untouched")],
        loc="upper right",
        frameon=False,
        ncols=2,
    )


def rank_map(axes: Axes, manifest: dict[str, Any]) -> None:
    """The share of its groups that every matrix kept, layer by layer; 1 stands for a matrix that
    stays dense.
    """
    shares = {
        told.path: (told.rank or 0) / len(entry.note.singular_values or [1])
        for entry in read_log(manifest)
        if (told := entry.edit.summary()).rank is not None
    }
    names = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in shares))
    grid = [[1.0] * manifest["model"]["num_layers"] for _ in names]
    for path, share in shares.items():
        grid[names.index(path.rsplit(".", 1)[-1])][layer_of(path)] = share
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="cividis")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("decoder layer")
    axes.figure.colorbar(image, ax=axes, label="share of groups kept (1 = dense)")


def kept_groups(axes: Axes, entry: Entry) -> None:
    """Score against singular value of every group of one matrix."""
    note, path = entry.note, entry.edit.summary().path
    scores, sigmas = note.scores or [], note.singular_values or []
    kept = set(note.kept or ())
    for color, chosen in (
        (LEFT, [k for k in range(len(scores)) if k not in kept]),
        (KEPT, sorted(kept)),
    ):
        axes.scatter(
            [sigmas[k] for k in chosen],
            [max(scores[k], 1e-12) for k in chosen],
            s=9,
            color=color,
            alpha=0.85,
            linewidths=0,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("singular value σ")
    axes.set_title(
        f"{path.removeprefix('model.')}: kept {len(kept)} of {len(scores)} groups",
        fontsize=9,
    )


def spectra(
    redundancy: dict[int, float], kind: str, singular_values: dict[str, list[float]], path: Path
) -> Path:
    """For `inspect`: redundancy per layer, and the share of each matrix's squared singular values
    that its largest ones hold.
    """
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(11, 7), layout="constrained")
    top.bar(list(redundancy), list(redundancy.values()), color=KEPT)
    top.set_yscale("log")
    top.set_xlabel("decoder layer")
    top.set_ylabel("block influence\n(low = redundant)" if kind == "bi" else "angular distance / π")
    top.margins(x=0.01)
    by_name: dict[str, list[list[float]]] = {}
    for matrix, values in singular_values.items():
        by_name.setdefault(matrix.rsplit(".", 1)[-1], []).append(values)
    for name, group in by_name.items():
        length = min(len(values) for values in group)
        shares = [_energy(values) for values in group]
        mean = [sum(share[k] for share in shares) / len(shares) for k in range(length)]
        bottom.plot([(k + 1) / length for k in range(length)], mean, label=name)
    bottom.set_xlabel("share of singular groups, largest σ first")
    bottom.set_ylabel("share of Σσ², mean over layers")
    bottom.legend(frameon=False, ncols=4)
    bottom.margins(x=0.01)
    return _written(figure, path)


def _written(figure: Figure, path: Path) -> Path:
    """The picture in its file, whole or not at all."""
    try:
        with whole_file(path) as scratch:
            figure.savefig(scratch, dpi=140, format=path.suffix.lstrip("."))
    finally:
        pyplot.close(figure)
    return path


def _energy(values: list[float]) -> list[float]:
    total, running, shares = sum(v * v for v in values) or 1.0, 0.0, []
    for value in values:
        running += value * value
        shares.append(running / total)
    return shares


def _spread(items: list[Any], count: int) -> list[Any]:
    """`count` items from the whole range of a list."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
