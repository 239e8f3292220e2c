"""MoDeGPT: Modular Decomposition for Large Language Model Compression (Lin et al., arXiv
2408.09632, ICLR 2025), without training.

1. Sweep the calibration set once, on the dense model, forward only: block influence s of every
   layer, the correlation of its MLP's channels, those of its queries, keys and values.
2. How much each layer loses, `--allocation`: uniform, or, with L layers and the mean loss phi,

       global    phi_l = L phi softmax(-s / e)_l     (section 3.3; e is `--smoothing`)

   so that a layer that changes its input much keeps most. Within a layer all parts lose alike.
3. MLP: the channels of the largest ridge leverage stay, and down is fitted to them (Nystroem).
4. Queries and keys: the dimensions of each head of the largest `|q_i| |k_i|` stay (CR).
5. Values and outputs: of each head the largest singular groups of their product stay, in the metric
   of its inputs (SVD).

The maths: grasp.stages.modular. Where we deviate: the ridge is a share of the mean of the diagonal
(the paper: 1, whatever the number of tokens), and the fit of down has it too (a pseudo-inverse
there); the values' metric holds their bias; rotary pairs are scored by norms that rotation does not
change; shares are of a layer's own numbers, and `--ratio` is of ALL parameters, met to within one
channel, since channels make up for the rounding of heads' dimensions.

Heads keep their width to the outside, with zeros in the place of what is gone: no family's code has
key or value heads of another width. So it is the model that becomes smaller, not the key-value
cache. Where norms of queries and keys follow (Qwen3, Gemma 3, OLMo 2), whose scale zeros would
change, q and k stay dense and the other parts lose more, with a notice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from msgspec import Meta

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Step
from grasp.core.edits.cuts import CHANNELS, KEY_DIMS, VALUE_DIMS, rotary, sizes_of
from grasp.core.fields import Place, flag
from grasp.core.layer import Linear
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.methods.base import Plan
from grasp.methods.widths import Widths, gone
from grasp.stages import operations
from grasp.stages.curvature import InputCurvatures
from grasp.stages.modular import HeadMoments, fewer_channels, fewer_keys, fewer_values
from grasp.stages.redundancy import block_influence
from grasp.stages.shares import Part, part, spread, widths
from grasp.stages.statistics import Similarity

logger = logging.getLogger(__name__)

Smoothing = Annotated[float, Meta(gt=0, le=1000)]
SMOOTHING = 0.1


@dataclass(frozen=True, kw_only=True)
class MoDeGPT(Widths):
    """Take away MLP channels (down fitted to the rest) and dimensions of key and value heads, by
    Nystroem, CR and singular value decomposition; more in layers that change their input less.
    """

    name: ClassVar[str] = "modegpt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.09632"

    allocation: str = flag(
        "global",
        "How much each layer loses: uniform (the same share) or global (by block influence).",
        words=("uniform", "global"),
    )
    smoothing: Smoothing | None = flag(
        None,
        f"Of --allocation global: the larger, the more alike the layers (default {SMOOTHING}).",
    )
    scratch: Place | None = flag(
        None,
        "Keep the statistics in files in this folder, not in memory (for large models).",
        recipe=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smoothing is not None and self.allocation != "global":
            raise RecipeError(
                f"--smoothing {self.smoothing}: --allocation {self.allocation} does not read it;"
                " leave it out, or take --allocation global"
            )

    def parts(self, decoder: Decoder) -> list[Part]:
        found = []
        for layer in self.chosen_layers(decoder):
            heads, pairs = 1, 1
            if any(decoder.family.holding(role) for role in "qkvo"):
                sizes = sizes_of(decoder, layer)
                # at a time, of every head; rotary pairs stay whole
                heads, pairs = sizes.kv_heads, 2 if rotary(decoder) == sizes.head_dim else 1
            for axis, step in ((VALUE_DIMS, heads), (KEY_DIMS, heads * pairs), (CHANNELS, 1)):
                found.append(part(decoder, layer, axis, step))
        return [one for one in found if one is not None]

    def plan(self, decoder: Decoder) -> Plan:
        parts, target = self.parts(decoder), self.target(decoder)
        left = widths(parts, spread(parts, target), target)
        if self.allocation == "global":
            parameters, narrower = math.floor(decoder.num_parameters() - target), parts
        else:
            parameters = decoder.num_parameters() - gone(parts, left)
            narrower = [one for one in parts if left[one] < one.count]
        squares = sum(one.count**2 for one in parts if one.axis == CHANNELS)
        layers = {one.layer for one in narrower}
        readers = [self._reader(decoder, one.layer) for one in parts if one.axis == CHANNELS]
        inputs = [linear.path for linear in readers]
        return Plan(
            len(layers),
            len(narrower),
            parameters,
            1,
            0,
            4 * squares,
            a_token=operations.sums(decoder, readers, inputs),
            once=operations.total(
                of(linear.shape)
                for linear in readers
                for of in (operations.factor, operations.refit)
            ),
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        parts = self.parts(decoder)
        inner = [one for one in parts if one.axis == CHANNELS]
        bytes_ = 4 * sum(one.count**2 for one in inner)
        scratch = decoder.scratch(bytes_, self.scratch)
        paths = [self._reader(decoder, one.layer).path for one in inner]
        roles: dict[int, str] = {}
        for one in parts:
            if one.axis != CHANNELS:
                more = "v" if one.axis == VALUE_DIMS else "qk"
                roles[one.layer] = roles.get(one.layer, "") + more
        sizes = {layer: sizes_of(decoder, layer) for layer in roles}
        heads = HeadMoments(decoder.family, sizes, roles)
        return [Similarity(), InputCurvatures(paths, scratch, paths), heads]

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        decoder, parts = runner.decoder, self.parts(runner.decoder)
        layers, target = {one.layer for one in parts}, self.target(runner.decoder)
        if dense := layers - {one.layer for one in parts if one.axis == KEY_DIMS}:
            logger.warning(
                "q and k of %d of %d layers stay dense (norms follow them, or they are not dense"
                " any more); their other parts lose more",
                len(dense),
                len(layers),
            )
        left = widths(parts, spread(parts, target, self.weights(stats, layers)), target)
        for one in parts:
            if left[one] < one.count:
                make = partial(self.narrower, decoder, stats, one, left[one])
                with runner.holding(one.layer):
                    made = runner.once(f"{one.layer} {one.axis}", make)
                yield made

    def weights(self, stats: Statistics, layers: set[int]) -> dict[int, float] | None:
        """By what each layer's share of its numbers goes."""
        if self.allocation == "uniform":
            return None
        scores = block_influence(stats).scores
        chosen = sorted(layers)
        influence = torch.tensor([scores[layer] for layer in chosen], dtype=torch.float64)
        shares = torch.softmax(-influence / (self.smoothing or SMOOTHING), 0)
        return dict(zip(chosen, shares.tolist(), strict=True))

    def narrower(self, decoder: Decoder, stats: Statistics, one: Part, left: int) -> Step:
        """The edit that leaves so many units of a part."""
        if one.axis == CHANNELS:
            reader = self._reader(decoder, one.layer)
            found = stats[InputCurvatures.name][reader.path]
            gram = found.near if reader.is_tall else found.inputs
            tokens = max(found.input_tokens, 1)
            return Step(fewer_channels(decoder, one.layer, gram / tokens, left))
        fewer = fewer_values if one.axis == VALUE_DIMS else fewer_keys
        heads = sizes_of(decoder, one.layer).kv_heads
        return Step(fewer(decoder, one.layer, stats[HeadMoments.name], left // heads))

    def _reader(self, decoder: Decoder, layer: int) -> Linear:
        """What reads the channels of a layer."""
        return decoder.layer(layer).linears[decoder.family.path("down")]
