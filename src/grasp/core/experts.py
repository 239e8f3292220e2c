"""The mixture of experts of a decoder layer: where other layers have one MLP, it has many, each
with its own two matrices, and a router that sends every token to a few of them.

transformers keeps all experts of a layer in one tensor a matrix, (experts, ...), so no expert is a
module. What is here says how many there are and how large; the tensors are changed by
`grasp.core.edits` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grasp.core.layer import Linear, is_dense, module_in
from grasp.core.layers.experts_grasp import MATRICES, SPLIT, matrix_of

if TYPE_CHECKING:
    from grasp.core.decoder import Decoder


@dataclass(frozen=True)
class Mixture:
    """The experts of decoder layer `layer`, the module `owner`, and their router. `path`,
    `router_path`: where they are in the model as loaded; `name`: where the experts are in the
    layer.
    """

    layer: int
    owner: nn.Module
    name: str
    path: str
    router_path: str
    experts: Any
    router: Any

    @property
    def count(self) -> int:
        """Experts that there are."""
        return int(self.router.num_experts)

    @property
    def per_token(self) -> int:
        """Experts that every token is sent to."""
        return int(self.router.top_k)

    @property
    def groups(self) -> int:
        """Groups of equally many experts in a row, of which a token's come from a few (DeepSeek);
        1 where there are none.
        """
        return int(getattr(self.router, "num_group", 1))

    @property
    def least(self) -> int:
        """How few experts the router can do with: as many as a token is sent to, from as many
        groups as it may come from. A group is scored by its best two.
        """
        if self.groups == 1 and not hasattr(self.router, "num_group"):
            return self.per_token
        chosen = int(self.router.topk_group)
        return self.groups * max(2, math.ceil(self.per_token / chosen))

    @property
    def is_fused(self) -> bool:
        """Whether all experts are in one tensor a matrix, as transformers has them."""
        return isinstance(getattr(self.experts, "down_proj", None), nn.Parameter)

    @property
    def numbers(self) -> int:
        """Numbers that one expert is: its matrices and biases, and its row of the router. Of
        experts that are kept one by one, the mean.
        """
        modules = (self.experts, self.router)
        return sum(p.numel() for module in modules for p in module.parameters()) // self.count


def mixture(decoder: Decoder, layer: int) -> Mixture | None:
    """The experts of a layer; None where it has none. Raises `RecipeError` for a layer that is not
    there.
    """
    where, module = decoder.family.experts, decoder.layer(layer).module
    if where is None:
        return None
    found = [module_in(module, path) for path in (where.path, where.router)]
    if any(not isinstance(one, nn.Module) for one in found):
        return None
    begin = f"{decoder.family.layers}.{layer}"
    places = (f"{begin}.{where.path}", f"{begin}.{where.router}")
    return Mixture(layer, module, where.path, *places, *found)


def mixtures(decoder: Decoder) -> list[Mixture]:
    """Those of all layers that have some, first to last."""
    found = (mixture(decoder, layer) for layer in decoder.kept)
    return [one for one in found if one is not None]


class _View(nn.Linear):
    """A linear whose numbers are those of one expert, in fused tensors or apart, as they are when
    they are looked at: they may come and go. Once they are no matrix of floats any more, only its
    shape is left.
    """

    def __init__(self, found: Mixture, name: str, number: int):
        nn.Module.__init__(self)
        self.place = (found.owner, found.name, name, number)  # in a tuple: not part of this module
        self.whole = torch.empty_like(matrix_of(found.experts, name, number)[0], device="meta")

    def _parts(self) -> tuple[Tensor, Tensor | None]:
        owner, path, name, number = self.place
        experts: Any = owner.get_submodule(path)
        if not hasattr(experts, SPLIT):
            return matrix_of(experts, name, number)
        linear = getattr(experts.split[number], name)
        return (linear.weight, linear.bias) if is_dense(linear) else (self.whole, None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._parts()[0].detach()

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self._parts()[1]
        return None if bias is None else bias.detach()


def expert_linears(found: Mixture) -> Iterator[Linear]:
    """The matrices of every expert, under the paths that they have once the experts are apart
    (`edits.SplitExperts`); none where they are already.
    """
    if not found.is_fused:
        return
    for number in range(found.count):
        for name in MATRICES:
            view = _View(found, name, number)
            place = f"{SPLIT}.{number}.{name}"
            yield Linear(f"{found.path}.{place}", found.layer, f"{found.name}.{place}", view)


def is_of_expert(linear: Linear) -> bool:
    """Whether it is a matrix of an expert."""
    return f".{SPLIT}." in linear.name


def fused_at(decoder: Decoder, path: str) -> int | None:
    """The layer whose experts must be taken apart before the expert's matrix at `path` can be
    edited; None where they are, or where `path` is no such matrix.
    """
    if f".{SPLIT}." not in path or decoder.family.experts is None:
        return None
    layer, name = decoder.locate(path)
    found = mixture(decoder, layer)
    inside = found is not None and found.is_fused and name.startswith(f"{found.name}.{SPLIT}.")
    return layer if inside else None


def experts_stay(decoder: Decoder) -> str:
    """Said where a method changes what is no expert; "" for a model without experts."""
    found = mixtures(decoder)
    if not found:
        return ""
    numbers = sum(one.count * one.numbers for one in found)
    return (
        f"the experts and routers of {len(found)} layers"
        f" ({numbers / decoder.num_parameters():.0%} of all numbers, in the first at"
        f" '{found[0].path}') stay as they are: this method changes what is no expert"
    )
