"""Stage 2b'', narrowing: what fewer channels, value dimensions or KV groups of a layer cost.

Each is a set of inputs of one matrix, the one that reads them (`down` or `o`): which can go, the
others standing in for them, is Optimal Brain Surgeon's question (`grasp.stages.surgeon`). The
matrices that gave them lose rows.

- channels: the inner numbers of an MLP, inputs of `down`; gate and up lose rows.
- groups: a KV group is a key-value head with the query heads that read it; q, k and v lose rows.
- values: v and o meet in a space of `head_dim` numbers that may be turned freely, since attention
  mixes tokens, not numbers. It is turned into the axes of the metric, and the best stay; v loses
  rows. (MoDeGPT, arXiv 2408.09632, and A3, arXiv 2505.12942, decompose this product too.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp.core.axes import Sizes
from grasp.core.decoder import Decoder
from grasp.core.edits import Narrow, Note, Step
from grasp.core.edits.cuts import CHANNELS, KV_GROUPS, VALUE_DIMS, cuts, sizes_of
from grasp.core.layer import Linear
from grasp.core.linalg import metric_groups
from grasp.errors import GraspError
from grasp.stages.forecast import Halves, falling, forecast, stated
from grasp.stages.options import Costs, Options
from grasp.stages.surgeon import Metric, prices, refit, removal

AXES = {"channels": CHANNELS, "values": VALUE_DIMS, "groups": KV_GROUPS}
"""Part of a layer -> the axis of the edit that makes it smaller."""
READERS = {"channels": "down", "values": "o", "groups": "o"}
"""Part -> the role that reads it, whose inputs are taken away."""
ROLES = {
    "channels": ("gate", "up", "down"),
    "values": ("v", "o"),
    "groups": ("q", "k", "v", "o"),
}
"""Part -> the roles whose matrices lose rows or columns."""


@dataclass(frozen=True)
class Place:
    """A part of one layer that can be made narrower: `count` units, each some columns of the matrix
    `reader`; `linears`: all that change.
    """

    layer: int
    part: str
    count: int
    sizes: Sizes
    reader: Linear
    linears: tuple[Linear, ...]

    @property
    def name(self) -> str:
        """What the budget calls it: "3 channels"."""
        return f"{self.layer} {self.part}"

    def units(self, decoder: Decoder) -> Tensor:
        """The columns of the reader that go with each unit: (count, size)."""
        sizes, columns = self.sizes, decoder.family.columns(READERS[self.part], self.sizes)
        if self.part == "channels":
            return columns[:, None]
        if self.part == "groups":
            return columns.view(sizes.kv_heads, -1)
        heads = columns.view(sizes.kv_heads, sizes.group, sizes.head_dim)
        return heads.transpose(1, 2).reshape(self.count, sizes.group)


def place(decoder: Decoder, layer: int, part: str, chosen: set[str]) -> Place | None:
    """The part of a layer, where it can be made narrower: all its matrices are dense and among the
    paths `chosen`, the family's row says what they are for, and its code allows it.
    """
    family, there = decoder.family, decoder.layer(layer).linears
    roles = [
        role
        for role in ROLES[part]
        if any(role in found.split("+") for found, _ in family.matrices)
    ]
    paths = list(dict.fromkeys(family.path(role) for role in roles))
    if READERS[part] not in roles:  # of a family read off a model
        return None
    if any(path not in there or there[path].path not in chosen for path in paths):
        return None
    sizes = sizes_of(decoder, layer)
    count = {
        "channels": sizes.channels,
        "groups": sizes.kv_heads,
        "values": sizes.kv_heads * sizes.head_dim,
    }[part]
    try:
        cuts(decoder, layer, AXES[part], torch.arange(count))
    except GraspError:  # such as norms over all heads
        return None
    reader = there[family.path(READERS[part])]
    return Place(layer, part, count, sizes, reader, tuple(there[path] for path in paths))


def cost_at(decoder: Decoder, where: Place, size: int, costs: Costs) -> float:
    """What the part's matrices cost where `size` units are left, less what biases and the layer
    cost less beside them.
    """
    left = cuts(decoder, where.layer, AXES[where.part], torch.arange(size))
    linears = {linear.name: linear for linear in where.linears}
    spread = any(cut.scattered or cut.gathered for cut in left)
    matrices = []
    for cut in left:
        linear, shape = linears[cut.path], cut.size(linears[cut.path].shape)
        matrices.append(costs.of(linear.path, spread)(shape, None))
        kept = [shape[side] for side, gaps in enumerate((cut.scattered, cut.gathered)) if gaps]
        places = sum(kept) if shape != linear.shape else 0
        has_bias = getattr(linear.module, "bias", None) is not None
        biases = shape[0] - linear.shape[0] if has_bias else 0  # those that go
        matrices.append(costs.beside(biases, places))
    heads = size / where.count if where.part == "groups" else 1.0
    channels = size / where.count if where.part == "channels" else 1.0
    beside = costs.layer(where.layer, heads, channels) - costs.layer(where.layer)
    return sum(matrices, beside)


@dataclass(frozen=True)
class Narrowing:
    """A part, the `order` in which its units stay (best first), and for every number of units that
    is left the loss to expect and the loss on the calibration text (count + 1,).
    """

    where: Place
    order: Tensor
    losses: Tensor
    seen: Tensor

    def options(self, decoder: Decoder, costs: Costs, multiple: int) -> Options:
        """Its options: multiples of `multiple` units."""
        dense = cost_at(decoder, self.where, self.where.count, costs)
        sizes = torch.arange(multiple, max(self.where.count, multiple), multiple)
        cost = torch.tensor(
            [cost_at(decoder, self.where, int(size), costs) for size in sizes], dtype=torch.float64
        )
        keep = cost < dense * (1 - 1e-9)
        sizes = sizes[keep]
        return Options(sizes, self.losses[sizes], cost[keep], dense, self.seen[sizes])


def narrowing(decoder: Decoder, where: Place, stats: Halves) -> Narrowing:
    """In which order the units of a part go, chosen on all tokens, and what each size costs.

    The halves are refitted and judged apart, in an order (and coordinates) of their own.
    """
    weight, units = where.reader.weight.cpu(), where.units(decoder)

    def judged(chooser: Metric, judges: Sequence[Metric]) -> tuple[Tensor, list[Tensor]]:
        """The units, best first, and what is lost at every number of them, for each judge; in the
        coordinates of who chooses.
        """
        if where.part == "values":
            turn = Turn.of(where, chooser, units)
            chooser = chooser.turned(turn.turn, turn.back)
            judges = [one.turned(turn.turn, turn.back) for one in judges]
        order = removal(chooser, units).flip(0)
        found = prices(chooser, units[order].flatten(), judges)
        return order, [one[:: units.shape[1]].clone() for one in found]

    whole = Metric.of(weight, stats.whole)
    order, (seen,) = judged(whole.damped(weight, stats.whole), [whole])
    seen, gaps = falling(seen), []
    metrics = [Metric.of(weight, one) for one in stats.parts]
    for curvature, chooser, judge in zip(stats.parts, metrics, reversed(metrics), strict=True):
        _, (on_itself, on_other) = judged(chooser.damped(weight, curvature), [chooser, judge])
        gaps.append((on_itself, on_other))
    return Narrowing(where, order, forecast(seen, gaps), seen)


def narrowed(decoder: Decoder, found: Narrowing, stats: Halves, size: int) -> Step:
    """The edit that leaves the best `size` units, what reads them refitted."""
    where, weight = found.where, found.where.reader.weight.cpu()
    units = where.units(decoder)
    kept = found.order[:size].sort().values
    chooser = Metric.of(weight, stats.whole).damped(weight, stats.whole)
    numbers, rows = {}, None
    new = weight.double()
    if where.part == "values":
        turn = Turn.of(where, chooser, units)
        chooser, new = chooser.turned(turn.turn, turn.back), new @ turn.back
        rows = turn
    columns = units[kept].flatten().sort().values
    filled = torch.zeros_like(new)
    filled[:, columns] = refit(new, chooser.inputs, columns)
    full = {where.reader.name: filled}
    biases: dict[str, Tensor] = {}
    if rows is not None:
        values = next(one for one in where.linears if one is not where.reader)
        full[values.name], bias = rows.of_values(decoder, where, values)
        biases |= {} if bias is None else {values.name: bias}
    for cut in cuts(decoder, where.layer, AXES[where.part], kept):
        if cut.path in full:
            numbers[cut.path] = cut.of(full[cut.path]).to(weight)
        if cut.path in biases:
            bias = biases[cut.path]
            numbers[f"{cut.path}.bias"] = bias if cut.rows is None else bias[cut.rows]
    edit = Narrow(where.layer, AXES[where.part], kept, numbers)
    seen = float(found.seen[size])
    lost = stated(float(found.losses[size]), seen)
    return Step(edit, Note(predicted_loss=lost, seen_loss=seen))


@dataclass(frozen=True)
class Turn:
    """New coordinates of the value spaces of a layer, the axes of the metric, best first: a head's
    values `u` become `contract[g] u`, and o reads them by `expand[g]` (kv_heads, head_dim,
    head_dim). `turn`, `back`: the same for all inputs of o (in, in).
    """

    expand: Tensor
    contract: Tensor
    turn: Tensor
    back: Tensor

    @classmethod
    def of(cls, where: Place, metric: Metric, units: Tensor) -> Turn:
        """From the damped metric of o, the query heads of a group together."""
        heads, dims = where.sizes.kv_heads, where.sizes.head_dim
        expand, contract = [], []
        turn = torch.zeros_like(metric.inputs, dtype=torch.float64)
        back = torch.zeros_like(turn)
        for group in units.view(heads, dims, -1).unbind():  # head_dim, query heads
            blocks = [(places[:, None], places[None]) for places in group.unbind(1)]
            near = torch.stack([metric.inputs[block] for block in blocks]).sum(0)
            far = torch.stack([metric.gram[block] for block in blocks]).sum(0)
            one, _, other = metric_groups(near, far)
            for block in blocks:
                turn[block], back[block] = other, one
            expand.append(one)
            contract.append(other)
        return cls(torch.stack(expand), torch.stack(contract), turn, back)

    def of_values(
        self, decoder: Decoder, where: Place, values: Linear
    ) -> tuple[Tensor, Tensor | None]:
        """The matrix that gives the values, and its bias if it has one, in the new coordinates."""
        rows = decoder.family.rows("v", where.sizes).view(where.sizes.kv_heads, -1)
        # copies, also where the model itself is in float64
        weight = values.weight.to("cpu", torch.float64, copy=True)
        bias = getattr(values.module, "bias", None)
        bias = None if bias is None else bias.detach().to("cpu", torch.float64, copy=True)
        for group, places in enumerate(rows):
            weight[places] = self.contract[group] @ weight[places]
            if bias is not None:
                bias[places] = self.contract[group] @ bias[places]
        return weight, bias
