"""SliceGPT: Compress Large Language Models by Deleting Rows and Columns (Ashkboos et al., arXiv
2401.15024): the hidden size itself becomes smaller.

1. Fold every norm's weight into the matrices that read it (and a LayerNorm's bias, and its mean,
   `M = I - 11'/d`, into what comes before). What is left of a norm commutes with rotations:
   `norm(xQ) = norm(x) Q` (section 3.1).
2. Block after block (attention, MLP), first to last, with the model as it is now, so that the
   states in front of the block come from the sliced blocks before it. Q_l are the eigenvectors of
   `C_l = sum zz'`, z what the norm hands on, in float64; the diagonal is damped by 1 % of its mean,
   padding is masked (section 3.3).
3. Keep the first `width` columns D of Q_l: what writes the states becomes `D'W`, what reads them
   `WD`. The sum that goes past a block from basis l to the next gets the shortcut `D_l' D_{l+1}`.

`width = floor((1 - slicing) d)`, rounded down to a multiple of 8 (section 4). The states behind the
last block keep all d dimensions, as in the published code (`--slice-head` slices these too).

**The size.** The shortcuts are numbers more, two of `width x width` a layer; embedding and head
become two matrices where they were one, as each needs its own basis; a head behind a LayerNorm gets
a bias. So 20 % less of the hidden size is not 20 % less of the model: OPT-125m at 0.2 *grows* to
147,250,880. `--ratio` is the true share of all parameters, and the slicing that meets it follows.

**What we chose.** The published code takes the eigenvectors of the states in front of the norm in
place of those that the norm hands on; we do as the paper says. It rotates the unsliced end by
eigenvectors too; we leave that in its own basis, which is as large and as exact. `--one-shot` takes
all statistics from the dense model, in one sweep. Damping changes no eigenvector.

Not for norms behind a block (Gemma 2 and 3, OLMo 2): their weight is followed by the sum, not by a
matrix, and `diag(weight) norm(Wx)` in another basis is no such thing. vLLM does not serve the
result.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Slice, Step
from grasp.core.edits.slicing import (
    ATTENTION,
    HEAD,
    Place,
    check_sliceable,
    norm_module,
    norm_of,
    places,
    sliced_parameters,
    vocabulary_rows,
)
from grasp.core.fields import RankMultiple, Share, flag
from grasp.core.held import passes
from grasp.core.records import Statistics
from grasp.core.runner import Runner
from grasp.errors import RecipeError
from grasp.methods.base import Method, Plan, check_one_size, ratio_unreachable
from grasp.stages import operations
from grasp.stages.signals import Signals, principal
from grasp.stages.statistics import Similarity

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SliceGPT(Method):
    """Rotate the hidden states block by block to their principal directions, and cut off the last
    ones: the hidden size becomes smaller.
    """

    name: ClassVar[str] = "slicegpt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.15024"

    slicing: Share | None = flag(
        None, "Share of the hidden size to cut off, e.g. 0.25; 0 only rotates."
    )
    ratio: Share | None = flag(
        None, "Instead of --slicing: share of ALL parameters to remove; the slicing follows."
    )
    width_multiple: RankMultiple = flag(8, "Round the hidden size down to a multiple of this.")
    slice_head: bool = flag(False, "Slice the states in front of the head too.")
    one_shot: bool = flag(
        False, "Take all directions from the dense model, in one sweep instead of block by block."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_size(self.name, {"--slicing": self.slicing, "--ratio": self.ratio})

    def check(self, decoder: Decoder) -> None:
        check_sliceable(decoder)
        width, before = self.width(decoder), decoder.num_parameters()
        after = before if width is None else self._parameters(decoder, width)
        if after > before:
            logger.warning(
                "--slicing %s: shortcuts and a head of its own make the model grow, from %s to %s"
                " parameters",
                self.slicing,
                f"{before:,}",
                f"{after:,}",
            )

    def width(self, decoder: Decoder) -> int | None:
        """The hidden size that is left; None where nothing is to be done. Raises `RecipeError`
        where there is none.
        """
        hidden, multiple = decoder.config.hidden_size, self.width_multiple
        if multiple > hidden:
            raise RecipeError(
                f"--width-multiple {multiple}: the model's hidden size is {hidden}; at most that"
            )
        if self.slicing is not None:
            left = (math.floor((1 - self.slicing) * hidden + 1e-9) // multiple) * multiple
            if not left:
                most = math.floor((1 - multiple / hidden) * 1e4) / 1e4
                raise RecipeError(
                    f"--slicing {self.slicing}: leaves nothing of the hidden size {hidden} in"
                    f" multiples of {multiple}; at most {most}, or a smaller --width-multiple"
                )
            return left
        if not self.ratio:
            return None
        before = decoder.num_parameters()
        allowed, least = (1 - self.ratio) * before + 1e-6, self._parameters(decoder, multiple)
        if least > allowed:
            hint = "" if self.slice_head else "; more with --slice-head"
            raise ratio_unreachable(
                self.ratio,
                max(0.0, 1 - least / before),
                f"{multiple} of {hidden} hidden dimensions left{hint}",
            )
        widths = range(multiple, hidden + 1, multiple)
        fit = bisect_right(widths, allowed, key=lambda one: self._parameters(decoder, one))
        return widths[fit - 1]

    def _parameters(self, decoder: Decoder, width: int) -> int:
        head = width if self.slice_head else decoder.config.hidden_size
        return sliced_parameters(decoder, width, head)

    def plan(self, decoder: Decoder) -> Plan:
        width = self.width(decoder)
        if width is None:
            return Plan(0, 0, decoder.num_parameters(), 1, 0)
        measured, hidden = len(self._measured(decoder)), decoder.config.hidden_size
        looks = [_looked(decoder, place) for place in self._measured(decoder)[1:]]
        sweeps = 1 if self.one_shot else 1 + math.ceil(passes(looks, len(decoder.kept)))
        return Plan(
            len(decoder.kept),
            len(places(decoder)),
            self._parameters(decoder, width),
            sweeps,
            0,
            8 * hidden**2 * (measured + 2 if self.one_shot else 3),
            held_sets=0 if self.one_shot else 1,
            workspace_bytes=4 * width * vocabulary_rows(decoder),
            a_token={"double": 2.0 * measured * hidden**2},
            once=operations.rotation(hidden, decoder.num_parameters(), measured),
        )

    def needs(self, decoder: Decoder) -> list[Collector]:
        if self.width(decoder) is None:
            return [Similarity()]
        measured = self._measured(decoder)
        return [
            Similarity(),
            self._signals(decoder, measured if self.one_shot else measured[:1]),
        ]

    def notes(self) -> tuple[str, ...]:
        return (
            "the hidden size of a sliced checkpoint is smaller in a way of its own: it loads with"
            " transformers and grasp, not with vLLM, and has no dense form to export",
        )

    def edits(self, runner: Runner, stats: Statistics) -> Iterator[Step]:
        decoder, width = runner.decoder, self.width(runner.decoder)
        if width is None:
            return
        measured = self._measured(decoder)
        for place in measured:
            if place != measured[0] and not self.one_shot:
                task = f"statistics, layer {place.layer}, {place.block}"
                signals = self._signals(decoder, [place])
                stats = runner.sweep([signals], task, layers=_looked(decoder, place))
            basis = principal(stats[Signals.name][place], width)
            yield Step(Slice(place.layer, place.block, basis.to(_kept_in(decoder))))
        if not self.slice_head:
            whole = torch.eye(decoder.config.hidden_size, dtype=_kept_in(decoder))
            yield Step(Slice(decoder.kept[-1], HEAD, whole))

    def _measured(self, decoder: Decoder) -> list[Place]:
        """The places whose states are looked at."""
        found = places(decoder)
        return found if self.slice_head else found[:-1]

    def _signals(self, decoder: Decoder, measured: Sequence[Place]) -> Signals:
        norms = decoder.family.norms
        return Signals(
            {
                place: (
                    norm_of(norm_module(decoder, place)),
                    norms.attention if place.block == ATTENTION else norms.mlp,
                )
                for place in measured
            }
        )


def _looked(decoder: Decoder, place: Place) -> tuple[int, int]:
    """The layers that a sweep for `place` looks at, or that are edited behind it: a slice in front
    of attention also changes the layer before.
    """
    layer = decoder.kept.index(place.layer)
    return decoder.kept[max(layer - (place.block == ATTENTION), 0)], place.layer


def _kept_in(decoder: Decoder) -> torch.dtype:
    """The dtype of a basis until it is in the model."""
    return torch.promote_types(decoder.dtype, torch.float32)
