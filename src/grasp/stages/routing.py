"""How much every expert is used: how many tokens the router sends to it, and how much it adds to
them.

REAP (Lasby et al., arXiv 2510.13999) scores expert j by what it adds to the tokens that it gets:

    S_j = mean over the tokens x routed to j of g_j(x) |f_j(x)|

with g_j the weight that the router gives it, as the model uses it (after it was normed and scaled),
and f_j(x) what the expert makes of the token. Higher = keep.

What leaving it out costs, the router sending to it as before, is in nats a token of the text

    1/2 E[(d' g_j f_j(x))^2]        d: the gradient of the loss where the experts are summed up

as of a layer or sublayer (`grasp.stages.sublayers`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grasp.core.collector import Collector, ask_for_gradients_at
from grasp.core.families import Family
from grasp.core.layer import Layer, module_in
from grasp.core.layers.experts_grasp import SPLIT
from grasp.errors import NumericsError


@dataclass(frozen=True)
class Use:
    """Of the experts of one layer: tokens that each got, and the sum over them of weight times norm
    of its output.
    """

    tokens: Int[Tensor, "experts"]
    weighted: Float[Tensor, "experts"]

    @property
    def saliency(self) -> Float[Tensor, "experts"]:
        """REAP's S, 0 of experts that got no token."""
        return self.weighted / self.tokens.clamp(min=1)


class ExpertUse(Collector):
    """Table: layer -> `Use`, of the layers that have experts. Sums: "tokens.LAYER" (experts) and
    "weighted.LAYER" (experts), in float64.

    What an expert gives is computed once more, by the layer's own code: its outputs are not seen
    apart from each other outside it.
    """

    name: ClassVar[str] = "expert_use"

    def __init__(self, family: Family):
        super().__init__()
        self.path = "" if family.experts is None else family.experts.path

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        experts = module_in(layer.module, self.path) if self.path else None
        if experts is None:
            return

        @torch.no_grad()
        def hook(module: Any, args: tuple[Tensor, ...], _output: Tensor) -> None:
            # tokens, width; tokens, experts a token; tokens, experts a token
            hidden, chosen, weights = (self._tokens(one) for one in args)
            rows, places = hidden.repeat_interleave(chosen.shape[1], 0), chosen.reshape(-1)
            if not len(rows):
                return
            # forward, and not the module: no hook sees this pass
            alone = module.forward(rows, places[:, None], torch.ones_like(weights.reshape(-1, 1)))
            norms = torch.linalg.vector_norm(alone, dim=-1, dtype=torch.float32)
            count = int(module.num_experts)
            found = torch.zeros(count, dtype=torch.float64, device=hidden.device)
            found.index_add_(0, places, (norms * weights.reshape(-1).float()).double())
            self._add(f"weighted.{layer.index}", found)
            self._add(f"tokens.{layer.index}", places.bincount(minlength=count))

        undo.callback(experts.register_forward_hook(hook).remove)

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[int, Use]:
        layers = sorted(int(key.partition(".")[2]) for key in sums if key.startswith("tokens."))
        found = {
            layer: Use(sums[f"tokens.{layer}"].cpu(), sums[f"weighted.{layer}"].cpu())
            for layer in layers
        }
        if not all(bool(torch.isfinite(one.weighted).all()) for one in found.values()):
            raise NumericsError("what experts give is not finite; try --dtype float32")
        return found


class ExpertLosses(Collector):
    """Of every expert, what is lost without it. Table: "3 mlp.experts.split.5" (layer 3, expert 5)
    -> nats a token. Sums: "lost.LAYER" (experts), "tokens.LAYER".

    The bias of its last matrix counts as staying: it stays where the matrices become empty.
    """

    name: ClassVar[str] = "expert_losses"
    backward: ClassVar[bool] = True

    def __init__(self, family: Family):
        super().__init__()
        self.path = "" if family.experts is None else family.experts.path

    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        experts = module_in(layer.module, self.path) if self.path else None
        if experts is None or not hasattr(experts, "down_proj"):
            return
        ask_for_gradients_at(layer, undo)

        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                given = tuple(self._tokens(one) for one in args)
                output.register_hook(lambda grad: self._see(layer.index, module, given, grad))

        undo.callback(experts.register_forward_hook(hook).remove)

    @torch.no_grad()
    def _see(self, layer: int, module: Any, given: tuple[Tensor, ...], grad: Tensor) -> None:
        hidden, chosen, weights = given
        gradients, count = self._tokens(grad), int(module.num_experts)
        lost = torch.zeros(count, dtype=torch.float64, device=hidden.device)
        if len(hidden):
            each, places = chosen.shape[1], chosen.reshape(-1)
            rows = hidden.repeat_interleave(each, 0)
            alone = module.forward(rows, places[:, None], torch.ones_like(weights.reshape(-1, 1)))
            bias = getattr(module, "down_proj_bias", None)
            alone = alone.float() if bias is None else alone.float() - bias[places].float()
            asked = gradients.repeat_interleave(each, 0).float() * weights.reshape(-1, 1).float()
            lost.index_add_(0, places, (asked * alone).sum(1).double().square())
        self._add(f"lost.{layer}", lost)
        self._add(f"tokens.{layer}", torch.tensor(len(hidden)))

    def result(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        found = {}
        for layer in sorted(int(key.partition(".")[2]) for key in sums if key.startswith("lost.")):
            tokens = max(int(sums[f"tokens.{layer}"]), 1)
            for number, lost in enumerate(sums[f"lost.{layer}"].tolist()):
                found[f"{layer} {self.path}.{SPLIT}.{number}"] = lost / tokens / 2
        if not all(map(math.isfinite, found.values())):
            raise NumericsError("the losses of experts are not finite; try --dtype float32")
        return found
