"""Pairs of matrices with something between them, decomposed together (MoDeGPT, arXiv 2408.09632,
section 3): what of it can go, and what the matrices around it become.

- MLP (Type I, Nystroem): channels h with C = E[hh']. The ones with the largest ridge leverage
  `[C (C + l I)^-1]_ii` stay, and `down' = down (C + l I)[:, S] (C + l I)[S, S]^-1` reads them.
- Queries and keys (Type II, CR): a dimension's term of their product is at most `|q_i| |k_i|`, with
  norms over tokens; the largest stay, unchanged. `|q_i|^2` is the diagonal of C_q, so C_q^½, whose
  columns have these norms, need not be taken.
- Values and outputs (Type III, SVD): per key-value head, of `O V` in the metric of V's outputs. The
  query heads that read one value head are stacked.

Rotary embeddings turn dimension i in a plane with i + half. Norms of such a pair are the same
before and after, so the pair is scored and goes as one: `sqrt((|q_i|^2 + |q_i'|^2) (|k_i|^2 +
|k_i'|^2))`, half of that a dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from grasp.core.axes import Sizes
from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Narrow
from grasp.core.edits.cuts import CHANNELS, KEY_DIMS, VALUE_DIMS, cuts, rotary, sizes_of
from grasp.core.families import Family
from grasp.core.layer import Layer
from grasp.core.linalg import metric_groups, wide
from grasp.errors import NumericsError
from grasp.stages.surgeon import lifted, refit

RIDGE = 0.01
"""l, as a share of the mean of C's diagonal."""


class HeadMoments(Collector):
    """Second moments of what q, k and v give, biases and all, before rotation. Table: "q.LAYER"
    (heads, head_dim) and "k.LAYER" (kv_heads, head_dim), means over tokens of squares; "v.LAYER"
    (kv_heads, head_dim, head_dim), of outer products. Sums: the same, and "tokens.ROLE.LAYER".

    `sizes`, `roles`: of each layer that is looked at, the latter such as "qkv".
    """

    name: ClassVar[str] = "head_moments"

    def __init__(self, family: Family, sizes: Mapping[int, Sizes], roles: Mapping[int, str]):
        super().__init__()
        self.family = family
        self.sizes = sizes
        self.roles = roles

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        wanted = self.roles.get(layer.index, "")
        for path in dict.fromkeys(self.family.path(role) for role in wanted):
            held = [role for role in wanted if self.family.path(role) == path]
            hook = self._seeing(layer.index, held)
            undo.callback(layer.linears[path].module.register_forward_hook(hook).remove)

    def _seeing(self, layer: int, roles: Iterable[str]) -> Callable[..., None]:
        sizes = self.sizes[layer]
        rows = {role: self.family.rows(role, sizes) for role in roles}

        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given = wide(self._tokens(output))  # tokens, out
            for role, places in rows.items():
                heads = given[:, places.to(given.device)].unflatten(1, (-1, sizes.head_dim))
                self._add(f"tokens.{role}.{layer}", torch.tensor(len(heads)))
                if role == "v":
                    heads = heads.transpose(0, 1)  # heads, tokens, head_dim
                    self._add(f"v.{layer}", heads.mT @ heads)
                else:
                    self._add(f"{role}.{layer}", heads.double().square().sum(0))

        return hook

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = {}
        for layer, roles in self.roles.items():
            for role in roles:
                key = f"{role}.{layer}"
                if key not in sums or not bool(torch.isfinite(sums[key]).all()):
                    raise NumericsError(
                        f"layer {layer}: the outputs of {role} are"
                        f" {'not finite' if key in sums else 'missing'}; try --dtype float32"
                    )
                found[key] = sums[key] / sums[f"tokens.{key}"]
        return found


# --- Type I


def leverages(gram: Float[Tensor, "n n"], ridge: float) -> Float[Tensor, "n"]:
    """`[C (C + l I)^-1]_ii = 1 - l [(C + l I)^-1]_ii`, from 0 to 1, in float64; l is `ridge` times
    the mean of C's diagonal.
    """
    gram = gram.double()
    lower, failed = torch.linalg.cholesky_ex(lifted(gram, ridge))
    if int(failed):
        raise NumericsError("the channels' correlation is not positive; try --dtype float32")
    return 1 - ridge * gram.diagonal().mean() * torch.cholesky_inverse(lower).diagonal()


def fewer_channels(decoder: Decoder, layer: int, gram: Float[Tensor, "n n"], count: int) -> Narrow:
    """The edit that leaves `count` channels of a layer; `gram` is C."""
    path = decoder.family.path("down")
    weight, gram = decoder.layer(layer).linears[path].weight.cpu(), gram.double().cpu()
    kept = _best(leverages(gram, RIDGE), count)
    numbers = refit(weight.double(), lifted(gram, RIDGE), kept).to(weight)
    return Narrow(layer, CHANNELS, kept, {path: numbers}, of=len(gram))


# --- Type II


def best_dims(
    queries: Float[Tensor, "heads dims"],
    keys: Float[Tensor, "kv_heads dims"],
    turned: int,
    count: int,
) -> Int[Tensor, "kept"]:
    """The best `count` dimensions of each key-value head, counted along all of them, rising, where
    the first `turned` go in rotary pairs. `queries`, `keys`: mean squares.
    """
    kv_heads, dims = keys.shape
    together = queries.view(kv_heads, -1, dims).sum(1)  # over the query heads of a group
    half = turned // 2
    units: list[tuple[int, ...]] = [(i, i + half) for i in range(half)]
    units += [(i,) for i in range(turned, dims)]
    kept = []
    for head, (asked, found) in enumerate(zip(together, keys, strict=True)):
        worth = {
            unit: float((asked[list(unit)].sum() * found[list(unit)].sum()).sqrt()) / len(unit)
            for unit in units
        }
        kept += [head * dims + i for unit in _packed(worth, count) for i in unit]
    return torch.tensor(sorted(kept))


def _packed(worth: Mapping[tuple[int, ...], float], count: int) -> list[tuple[int, ...]]:
    """The units of the greatest worth a dimension that have `count` dimensions together."""
    order = sorted(worth, key=lambda unit: (-worth[unit], unit))
    chosen: list[tuple[int, ...]] = []
    for unit in order:
        if sum(map(len, chosen)) + len(unit) <= count:
            chosen.append(unit)
    single = next((unit for unit in reversed(chosen) if len(unit) == 1), None)
    pair = next((unit for unit in order if len(unit) == 2 and unit not in chosen), None)
    if sum(map(len, chosen)) < count and single is not None and pair is not None:
        chosen.remove(single)  # one place is left, which no pair fits
        chosen.append(pair)
    return chosen


def fewer_keys(decoder: Decoder, layer: int, moments: Mapping[str, Tensor], count: int) -> Narrow:
    """The edit that leaves `count` dimensions of each key head of a layer."""
    queries, keys = (moments[f"{role}.{layer}"].cpu() for role in "qk")
    kept = best_dims(queries, keys, rotary(decoder), count)
    return Narrow(layer, KEY_DIMS, kept, of=keys.numel())


# --- Type III


def fewer_values(decoder: Decoder, layer: int, moments: Mapping[str, Tensor], count: int) -> Narrow:
    """The edit that leaves `count` dimensions of each value head of a layer, in the axes of the
    decomposition.
    """
    family, sizes = decoder.family, sizes_of(decoder, layer)
    linears = decoder.layer(layer).linears
    giver, reader = linears[family.path("v")], linears[family.path("o")]
    # copies, also where the model itself is in float64
    values, outputs = (one.weight.to("cpu", torch.float64, copy=True) for one in (giver, reader))
    bias = getattr(giver.module, "bias", None)
    bias = None if bias is None else bias.detach().to("cpu", torch.float64, copy=True)
    rows = family.rows("v", sizes).view(sizes.kv_heads, -1)
    columns = family.columns("o", sizes).view(sizes.kv_heads, sizes.group, -1)
    near = moments[f"v.{layer}"].cpu()
    for head in range(sizes.kv_heads):
        read = outputs[:, columns[head]]  # hidden, query heads, head_dim
        far = torch.einsum("oja,ojb->ab", read, read)
        expand, _, contract = metric_groups(lifted(near[head].double(), RIDGE), far)
        values[rows[head]] = contract @ values[rows[head]]
        if bias is not None:
            bias[rows[head]] = contract @ bias[rows[head]]
        outputs[:, columns[head]] = read @ expand
    first = torch.arange(sizes.kv_heads)[:, None] * sizes.head_dim + torch.arange(count)
    kept, numbers = first.flatten(), {}
    for cut in cuts(decoder, layer, VALUE_DIMS, kept):
        whole = values if cut.path == giver.name else outputs
        numbers[cut.path] = cut.of(whole).to(giver.weight.dtype)
        if bias is not None and cut.path == giver.name:
            numbers[f"{cut.path}.bias"] = bias.to(giver.weight.dtype)[cut.rows]
    return Narrow(layer, VALUE_DIMS, kept, numbers, of=sizes.kv_heads * sizes.head_dim)


def _best(scores: Float[Tensor, "n"], count: int) -> Int[Tensor, "count"]:
    """Where the highest are, rising; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
