"""LLM-Streamline: Streamlining Redundant Layers to Compress Large Language Models (Chen et al.,
arXiv 2403.19135, ICLR 2025).

1. Sweep the calibration set once. Of all windows of n neighbouring layers take the one with the
   highest mean over tokens of `cos(h_j, h_{j+n})`: its input and its output are most alike (section
   3.1; grasp.stages.windows). The output is taken at the window's last layer, never behind the
   final norm.
2. Put one light network in its place (section 3.2):
       layer  a decoder layer, which begins as the first of the window: attention, mask and rotary
              angles are its own
       ffn    `y = x + down(silu(up(x / rms(x))))`, with `down` 0 at the beginning
       none   nothing: the window is removed
3. Train it on the calibration blocks (grasp.stages.light_network), by the states around the window
   in the original model (`mse`) or by the loss of the model that it stands in (`lm`), the rest
   frozen.

`ratio` is what goes in the end: the network's own parameters count as kept. Where we deviate: of a
`layer` the matrices and their biases are trained, its norms stay as they are; the calibration set
takes the place of SlimPajama, and part of it is held out to keep the best state; one block is a
step. The paper's rates are 2e-4 to 5e-5, with a decay of 1e-3.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, ClassVar

from msgspec import Meta
from torch import nn

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, ReplaceMLP, Rewrite, Step
from grasp.core.edits.droppable import check_droppable
from grasp.core.fields import Count, NumLayers, Place, Share, flag
from grasp.core.layer import Linear
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.methods.base import Method, Plan, check_one_size, ratio_unreachable
from grasp.stages.light_network import Training, by_states, in_place, learn, new_mlp
from grasp.stages.statistics import Similarity
from grasp.stages.windows import WindowSimilarity

logger = logging.getLogger(__name__)

NETS, LOSSES = ("layer", "ffn", "none"), ("mse", "lm")

Positive = Annotated[float, Meta(gt=0, le=1)]
Decay = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Streamline(Method):
    """Replace the window of layers that changes its input least by one light network."""

    name: ClassVar[str] = "streamline"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.19135"

    ratio: Share | None = flag(
        None, "Share of ALL parameters to remove; the length of the window follows."
    )
    num_layers: NumLayers | None = flag(None, "Layers in the window.")
    net: str = flag(
        "layer",
        "What stands in for the window: layer (a decoder layer), ffn (an MLP) or none (nothing).",
        words=NETS,
    )
    net_width: Count | None = flag(
        None, "Inner width of --net ffn (default: that of the model's own MLPs)."
    )
    loss: str = flag(
        "mse",
        "What it is trained by: mse (the states around the window) or lm (the model's loss).",
        words=LOSSES,
    )
    learning_rate: Positive = flag(2e-4, "Of AdamW, at the beginning; it falls to 0.")
    weight_decay: Decay = flag(1e-3, "Of AdamW.")
    epochs: Count = flag(10, "How often every calibration block is learnt from.")
    scratch: Place | None = flag(
        None, "Keep the states in files in this folder, not in memory.", recipe=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_size(self.name, {"--ratio": self.ratio, "--num-layers": self.num_layers})
        if self.num_layers == 1 and self.net == "layer":
            raise RecipeError(
                "--num-layers 1: --net layer stands in for at least 2 layers, or nothing would go;"
                " take more, or another --net"
            )
        if self.net_width is not None and self.net != "ffn":
            raise RecipeError(f"--net-width {self.net_width}: only --net ffn has a width")

    # --- what is asked of it

    def check(self, decoder: Decoder) -> None:
        count = self._count(decoder)
        if not count:
            return
        for layer in decoder.layers():
            if self.net == "layer" and not layer.linears:
                raise RecipeError(
                    f"--net layer: layer {layer.index} has no dense matrix that could be trained;"
                    " take another --net"
                )
        if self._removed(decoder, count) <= 0:
            raise RecipeError(
                f"--net-width {self._width(decoder)}: the network would be no smaller than a window"
                f" of {count} layers; take a smaller one, or more layers"
            )
        # which window goes is not known yet; one in the middle stands for all
        begin = (len(decoder.kept) - count) // 2
        gone = decoder.kept[begin : begin + count][self._stays :]
        check_droppable(decoder, gone)

    def plan(self, decoder: Decoder) -> Plan:
        count, total = self._count(decoder), decoder.num_parameters()
        if not count:
            return Plan(0, 0, total, 1, 0)
        trains, matrices = self.net != "none", len(decoder.linears(decoder.kept[0]))
        edits = {"none": count, "layer": count - 1 + matrices, "ffn": 1}[self.net]
        by_states = trains and self.loss == "mse"
        return Plan(
            count,
            edits,
            total - self._removed(decoder, count),
            1 + by_states,
            self.epochs if trains and self.loss == "lm" else 0,
            held_sets=2 * by_states,
            held_blocks=count,
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        count = self._count(decoder)
        windows = [WindowSimilarity(decoder.kept, count)] if count else []
        return [Similarity(), *windows]

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        decoder, count = runner.decoder, self._count(runner.decoder)
        if not count:
            return
        similarity = stats[WindowSimilarity.name]
        begin = decoder.kept.index(max(similarity, key=lambda first: similarity[first]))
        window = decoder.kept[begin : begin + count]
        logger.info(
            "layers %d to %d: the cosine of input and output is %.4f",
            window[0],
            window[-1],
            similarity[window[0]],
        )
        if self.net == "ffn":
            yield runner.once(f"layers {window}", partial(self._mlp, runner, window))
            return
        if self.net == "layer":
            yield from self._layer(runner, window)
        for layer in reversed(window[self._stays :]):
            yield Step(Drop(layer))

    # --- the light network

    def _layer(self, runner: Runner, window: list[int]) -> Iterator[Step]:
        """The matrices of the window's first layer, trained to do what all of it did: all at once,
        unless an earlier run has left them all.
        """

        @cache
        def trained() -> nn.Module:
            layer = runner.decoder.layer(window[0])
            with runner.holding(window[0]):
                net = copy.deepcopy(layer.module).float().requires_grad_(False)
            for name in layer.linears:
                net.get_submodule(name).requires_grad_(True)
            self._train(runner, net, window)
            return net

        def step(linear: Linear) -> Step:
            module = trained().get_submodule(linear.name)
            new = Linear(linear.path, linear.layer, linear.name, module)
            return Step(Rewrite(linear.path, new.weight, new.bias, how="trained"))

        linears = runner.decoder.layer(window[0]).linears.values()
        # before the first of them is applied: they begin as the original's
        yield from [runner.once(linear.path, partial(step, linear)) for linear in linears]

    def _mlp(self, runner: Runner, window: list[int]) -> Step:
        """The window's MLP, trained."""
        decoder = runner.decoder
        net = new_mlp(decoder.config.hidden_size, self._width(decoder), runner.data.seed)
        net = net.to(decoder.device)
        self._train(runner, net, window)
        path = f"{decoder.family.layers}.{window[0]}"
        return Step(ReplaceMLP(path, window[-1], net.up.detach(), net.down.detach()))

    def _train(self, runner: Runner, net: nn.Module, window: list[int]) -> None:
        data = runner.data
        size = 8 * data.ids.numel() * runner.decoder.config.hidden_size
        how = Training(self.learning_rate, self.weight_decay, self.epochs, data.seed)
        with ExitStack() as stack:
            loss = (
                by_states(runner, net, window, runner.decoder.scratch(size, self.scratch))
                if self.loss == "mse"
                else in_place(runner, net, window, stack)
            )
            before, after = learn(net, loss, data.num_blocks, how, runner.decoder.progress)
        logger.info("held-out %s loss: %.5g -> %.5g", self.loss, before, after)

    # --- sizes

    @property
    def _stays(self) -> int:
        """Layers of the window whose place in the list something still takes in the end."""
        return 0 if self.net == "none" else 1

    def _width(self, decoder: Decoder) -> int:
        """Inner width of an MLP. Raises `RecipeError` where the model does not say it."""
        if self.net_width is not None:
            return self.net_width
        layer, family = decoder.layer(decoder.kept[0]), decoder.family
        paths = [path for path in family.holding("down") if path in layer.linears]
        if not paths:
            raise RecipeError(
                f"--net ffn: the width of {family.name}'s MLPs is not known; give --net-width"
            )
        return layer.linears[paths[0]].shape[1]

    def _removed(self, decoder: Decoder, count: int) -> int:
        """The fewest parameters that go with a window of `count` layers, wherever it is."""
        sizes = [sum(p.numel() for p in one.module.parameters()) for one in decoder.layers()]
        begin = 1 if self.net == "layer" else 0
        gone = min(
            sum(sizes[first + begin : first + count]) for first in range(len(sizes) - count + 1)
        )
        if self.net != "ffn":
            return gone
        return gone - 2 * decoder.config.hidden_size * self._width(decoder)

    def _count(self, decoder: Decoder) -> int:
        """How many layers the window has; for a ratio, the fewest that reach it. Raises
        `RecipeError` where that is more than can be.
        """
        most = len(decoder.kept) - (0 if self.net == "layer" else 1)
        if self.num_layers is not None:
            if self.num_layers > most:
                raise RecipeError(
                    f"--num-layers {self.num_layers}: the model has {len(decoder.kept)} layers; at"
                    f" most {most} can be a window with --net {self.net}"
                )
            return self.num_layers
        assert self.ratio is not None
        total = decoder.num_parameters()
        if self.ratio * total < 1e-6:
            return 0
        for count in range(2 if self.net == "layer" else 1, most + 1):
            if self._removed(decoder, count) >= self.ratio * total - 1e-6:
                return count
        largest = max(self._removed(decoder, most), 0) / total if most > 0 else 0.0
        raise ratio_unreachable(self.ratio, largest, f"a window of {most} layers, --net {self.net}")
