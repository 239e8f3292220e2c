"""Stage 2b, allocation: scores and a budget in, ranks out. Counts only; no model, no tensor changes
hands.

A matrix (m, n) of rank r costs `r (m + n)` parameters; at the break-even rank `m n / (m + n)` and
above the dense matrix is smaller and stays (rank None).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from grasp.core.linalg import break_even_rank, rank_for_ratio
from grasp.core.records import Allocation, Attribution

Shapes = Mapping[str, tuple[int, int]]
"""Matrix path -> (out_features, in_features)."""


def guarded(shape: tuple[int, int], rank: int, multiple: int = 1) -> int | None:
    """`rank` rounded down to a multiple (but not to nothing), or None at or above break-even."""
    if multiple > 1 and rank > 0:
        rank = max(rank // multiple, 1) * multiple
    return rank if rank < break_even_rank(*shape) else None


def uniform(shapes: Shapes, retain_ratio: float, multiple: int = 1) -> Allocation:
    """Every matrix keeps the share `retain_ratio` of its own parameters."""
    return Allocation(
        {
            path: guarded((m, n), rank_for_ratio(m, n, retain_ratio), multiple)
            for path, (m, n) in shapes.items()
        }
    )


def threshold(
    shape: tuple[int, int], attribution: Attribution, share: float, multiple: int = 1
) -> int | None:
    """The size of the smallest set of groups that holds `share` of the matrix's total score;
    negative (signed) scores count as 0.
    """
    scores = attribution.scores.double().clamp_min(0)
    total = scores.sort(descending=True).values.cumsum(0)
    rank = (
        int((total < share * total[-1] * (1 - 1e-12)).sum()) + 1
        if share > 0 and float(total[-1]) > 0
        else 0
    )
    return guarded(shape, rank, multiple)


def saved(shape: tuple[int, int], rank: int | None) -> int:
    """Parameters that a pair of this rank saves over the dense matrix."""
    m, n = shape
    return 0 if rank is None else m * n - rank * (m + n)


@dataclass(frozen=True)
class Budget:
    """The answer of `for_budget`: the first `num_layers` layers get these ranks, which removes
    `removed` parameters.

    `reached` is False where even all layers do not save enough.
    """

    num_layers: int
    allocation: Allocation
    removed: int
    reached: bool


def for_budget(
    layers: Sequence[int],
    shapes: Mapping[int, Shapes],
    to_remove: int,
    retain_ratio: float,
    multiple: int = 1,
) -> Budget:
    """How many of `layers`, most redundant first, must go to `retain_ratio` so that `to_remove`
    parameters are saved.

    The last of them keeps more, as much as the budget leaves: what is removed is at least
    `to_remove` and exceeds it by less than one rank of one matrix (one `multiple` of ranks).
    """
    ranks: dict[str, int | None] = {}
    removed = 0
    for count, layer in enumerate(layers):
        if removed >= to_remove:
            return Budget(count, Allocation(ranks), removed, True)
        full = dict(uniform(shapes[layer], retain_ratio, multiple).sizes)
        if removed + _gain(shapes[layer], full) > to_remove:
            full = _fill(
                shapes[layer], full, removed + _gain(shapes[layer], full) - to_remove, multiple
            )
        ranks.update(full)
        removed += _gain(shapes[layer], full)
    return Budget(len(layers), Allocation(ranks), removed, removed >= to_remove)


def _gain(shapes: Shapes, ranks: Mapping[str, int | None]) -> int:
    return sum(saved(shape, ranks[path]) for path, shape in shapes.items())


def _fill(
    shapes: Shapes, ranks: Mapping[str, int | None], spare: int, multiple: int
) -> dict[str, int | None]:
    """Spend `spare` parameters on ranks: first the same share of every matrix, then single ranks
    where they fit.
    """
    low, high = 0.0, 1.0

    def at(share: float) -> dict[str, int | None]:
        grown = {}
        for path, (m, n) in shapes.items():
            base = ranks[path]
            wanted = (
                None
                if base is None
                else base + int(share * (break_even_rank(m, n) - base)) // multiple * multiple
            )
            grown[path] = None if wanted is None or wanted >= break_even_rank(m, n) else wanted
        return grown

    def cost(grown: Mapping[str, int | None]) -> int:
        return _gain(shapes, ranks) - _gain(shapes, grown)

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= spare else (low, middle)
    grown, spare = at(low), spare - cost(at(low))
    for path, (m, n) in sorted(shapes.items(), key=lambda item: -sum(item[1])):
        rank = grown[path]
        while rank is not None:
            larger = rank + multiple if rank + multiple < break_even_rank(m, n) else None
            step = saved((m, n), rank) - saved((m, n), larger)
            if step > spare:
                break
            rank, spare = larger, spare - step
        grown[path] = rank
    return grown


def keep(attribution: Attribution, rank: int) -> torch.Tensor:
    """Indices of the `rank` groups with the highest scores, in order of falling sigma."""
    return attribution.scores.topk(rank).indices.sort().values
