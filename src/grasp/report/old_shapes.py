"""What the layers of a model kept, worked out for a manifest that does not say it: one written
before `grasp.json` had the entry "layers".

A matrix with g groups is g x n with n >= g. A pair of rank r took rg + rn numbers of gn (pivoted:
r fewer a row, so r² in all), and the log counts the parameters after every edit: that gives n.
"""

from __future__ import annotations

from typing import Any

from grasp.core.edits import EditLog, Entry, place_of

MLP_WORDS = ("mlp", "fc", "ffn", "dense_h", "dense_4h")


def part_of(name: str) -> str:
    """ "mlp" or "attention", by the name of a matrix."""
    return "mlp" if any(word in name for word in MLP_WORDS) else "attention"


def shapes_from_ranks(log: EditLog, parameters: int) -> list[dict[str, Any]]:
    """Every layer as "layers" would have it, as far as the log tells; `parameters`: of the model
    before the first edit.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in log:
        told = entry.edit.summary()
        place = None if told.rank is None else place_of(told.path)
        if place is not None and (shape := _shape(entry, parameters - entry.parameters)):
            found.setdefault(place[1], {})[place[0]] = shape
        parameters = entry.parameters
    layers: list[dict[str, Any]] = [{"widths": {}} for _ in range(log.num_layers)]
    for name, known in found.items():
        usual = next(iter(known.values()))["of"]
        untouched = {"of": usual, "left": usual, "numbers": usual[0] * usual[1]}
        for layer, here in enumerate(layers):
            here.setdefault(part_of(name), {})[name] = known.get(layer, untouched)
    return layers


def _shape(entry: Entry, removed: int) -> dict[str, Any] | None:
    """The matrix of one edit; None where its groups were not counted."""
    told, groups = entry.edit.summary(), len(entry.note.singular_values or ())
    rank = told.rank or 0
    if not groups or rank > groups:
        return None
    less = rank * rank if told.pivoted else 0
    # removed = groups n - rank (groups + n) + less
    long, rest = divmod(removed + rank * groups - less, (groups - rank) or 1)
    if rest or long < groups or rank == groups:
        long = groups  # the counts do not tell: as if it were square
    numbers = min(rank * (groups + long) - less, groups * long)
    return {"of": [groups, long], "left": [groups, long], "numbers": numbers, "rank": rank}
