"""What may be rounded, to which widths, what that costs, and the edits that do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from grasp.core.decoder import Decoder
from grasp.core.edits import Edit, Note, Quantize, Step
from grasp.core.edits.base import layer_of
from grasp.core.edits.cuts import cuts
from grasp.core.edits.placing import vocabulary
from grasp.core.experts import expert_linears, mixture
from grasp.core.rounding import matrices_of
from grasp.core.runner import Runner
from grasp.methods.bits import Offered, Rounding, Shapes
from grasp.methods.low_rank import apart
from grasp.stages.narrowing import AXES
from grasp.stages.rounding import KEPT, Width, prices, to_width, widths
from grasp.stages.sensitivity import Sensitivity

TRIED = 8
"""Blocks of the calibration set on which a rounded embedding is tried."""
AS_IT_IS = "as it is"
OUTSIDE_BITS, OUTSIDE_GROUP = (8, 6, 4), 64
"""Bits that an embedding may have, and columns that share a scale, where that is allowed."""


def offered_inside(
    decoder: Decoder,
    found: Mapping[str, Sensitivity],
    asked: Sequence[Width],
    may_stay: bool,
    whole_groups: bool,
) -> dict[str, Offered]:
    """The widths of the matrices of the layers, and what each costs. `may_stay`: in 16 bits.
    `whole_groups`: only those whose groups divide the columns, and 16 bits where there are none.
    """
    offered = {}
    for layer in decoder.layers():
        experts = mixture(decoder, layer.index)
        of_experts = () if experts is None else expert_linears(experts)
        with decoder.holding(*layer.module.parameters()):
            for linear in (*layer.linears.values(), *of_experts):
                if linear.path not in found:
                    continue
                some = [one for one in asked if not whole_groups or one.divides(linear.shape[1])]
                losses = prices(linear.weight, found[linear.path], some)
                lost = found[linear.path].loss_of_activations
                may = may_stay or not some
                offered[linear.path] = _offered(linear.shape, some, losses, may, lost)
    return offered


def _offered(
    shape: tuple[int, int],
    some: Sequence[Width],
    losses: Tensor,
    may_stay: bool,
    activations: float = 0.0,
) -> Offered:
    """These widths, and none where 16 bits are allowed."""
    if not may_stay:
        return Offered(shape, tuple(some), losses, activations)
    losses = torch.cat([losses.new_zeros(1), losses])
    return Offered(shape, (None, *some), losses, activations)


def offered_outside(
    runner: Runner, bits: Sequence[int], groups: Sequence[int]
) -> dict[str, Offered]:
    """The widths of the embedding, and of a head that is not tied to it. What each costs is
    measured: the loss on some blocks of the calibration set with that alone rounded.
    """
    decoder, found = runner.decoder, {}
    group = OUTSIDE_GROUP if OUTSIDE_GROUP in groups else groups[0]
    some = widths([one for one in bits if one in OUTSIDE_BITS], [group])
    if not some:
        return {}
    paths = vocabulary(decoder)
    edits: dict[str, Callable[[], Edit | None]] = {AS_IT_IS: lambda: None}
    for path in paths:
        edits |= {f"{path} in {one}": partial(_edit, decoder, path, one, None) for one in some}
    losses = runner.tried(edits, TRIED, "embeddings in fewer bits")
    for path in paths:
        rises = [losses[f"{path} in {one}"] - losses[AS_IT_IS] for one in some]
        rows, columns = decoder.module(path).weight.shape
        rounded = torch.tensor(rises, dtype=torch.float64).clamp_min(0.0)
        found[path] = _offered((rows, columns), some, rounded, 16 in bits)
    return found


def shapes_at(decoder: Decoder, name: str, size: int) -> Shapes:
    """The shapes of the matrices of a part, called "3 channels", that has so many units left."""
    index, _, part = name.partition(" ")
    linears = decoder.layer(int(index)).linears
    left = cuts(decoder, int(index), AXES[part], torch.arange(size))
    return {linears[cut.path].path: cut.size(linears[cut.path].shape) for cut in left}


def roundings(
    runner: Runner, found: Mapping[str, Sensitivity], rounded: Mapping[str, Rounding]
) -> Iterator[Step]:
    """The edits that round matrices, as they are by now."""
    decoder = runner.decoder
    for path, how in rounded.items():
        if layer_of(path) >= 0 and layer_of(path) not in decoder.kept:
            continue
        yield from apart(decoder, path)
        with runner.holding(layer_of(path)):
            make = partial(_step, decoder, path, how, found.get(path))
            step = runner.once(f"{path} in {how.width}", make)
        if step is not None:
            yield step


def _step(decoder: Decoder, path: str, how: Rounding, found: Sensitivity | None) -> Step | None:
    """None of a pair of rank 0, which has no numbers."""
    if not matrices_of(decoder.module(path)):
        return None
    edit = _edit(decoder, path, how.width, found)
    return Step(edit, Note(predicted_loss=how.loss, seen_loss=how.loss))


def _edit(decoder: Decoder, path: str, width: Width, found: Sensitivity | None) -> Quantize:
    """What puts the linear, pair or embedding at `path` into a width."""
    numbers: dict[str, Tensor] = {}
    for name, matrix in matrices_of(decoder.module(path)).items():
        inputs = None if found is None or not found.whole else found.inputs
        if inputs is not None and len(inputs) != matrix.shape[1]:
            inputs = None  # the second factor of a pair, or narrower than it was
        numbers |= to_width(name, matrix, width, KEPT, inputs)
    return Quantize(path, width.scheme, width.group_size, numbers)
