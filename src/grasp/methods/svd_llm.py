"""SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression (Wang
et al., arXiv 2403.07378, ICLR 2025).

1. Sweep the calibration set once, on the dense model: X X', summed over the tokens that each matrix
   W reads.
2. With S S' = X X', the singular value decomposition `W S = U Sigma V'`: dropping group k changes
   the outputs by sigma_k^2, and no other matrix of that rank changes them less.
3. Every matrix keeps the same share of its parameters, `rank = int(m n r / (m + n))`, and becomes
   `B = U Sigma^½` and `A = Sigma^½ V' S^-1`. This alone is the paper's SVD-LLM (W).
4. `--update lstsq` (the paper's first versions): go through the layers, first to last, and fit B
   again, `argmin sum |W x - B A x|^2`, to inputs x of the model as it is by then: all layers before
   are compressed and refitted (grasp.stages.refit). Each reads `--update-samples` blocks.
   What is aimed at is what the dense W makes of these inputs, and not the dense model's outputs:
   what the layers before did is not made good again. The matrices of one layer are fitted on one
   sweep, so that o reads what the dense q, k and v give; so it is in the published code too.
5. `--update lora` (ICLR): train B by adapters, A being frozen, then A in the same way. That is a
   training, which `grasp recover --preset sequential` does, once for each.

The paper takes the Cholesky factor for S. Any S gives the same product, since two of them differ by
a rotation that goes into V; here it is the symmetric root, which also a singular X X' has. Where we
deviate: `grasp.stages.basis.INPUT_DAMPING` of the mean eigenvalue is always added to the diagonal
(the paper: a little more than the least eigenvalue, where Cholesky fails), and `--ratio` is a share
of ALL parameters of the model. The paper's ratio is of the decoder's matrices alone: 20 % there is
`--retain-ratio 0.8`. The published code fits B to outputs with their bias, which it then adds once
more (OPT); here the bias is left out. It draws other blocks for the update than for the whitening;
here they are the first of the calibration set, whose blocks are drawn at random.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import ClassVar

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Step
from grasp.core.fields import NumSamples, flag
from grasp.core.held import passes
from grasp.core.layer import Linear
from grasp.core.records import Curvature, Statistics
from grasp.core.runner import Runner
from grasp.core.scratch import Scratch
from grasp.errors import RecipeError
from grasp.methods.base import Plan
from grasp.methods.components import Component, Problem
from grasp.methods.low_rank import LowRank, square_bytes
from grasp.stages import operations
from grasp.stages.basis import Groups, groups
from grasp.stages.curvature import InputCurvatures
from grasp.stages.operations import Operations
from grasp.stages.refit import refitted

logger = logging.getLogger(__name__)

UPDATES = ("none", "lstsq", "lora")
TRAINING = (
    "grasp recover DIR MID --data alpaca --preset sequential",
    "grasp recover MID OUT --data alpaca --preset sequential --lora-on input-factors",
)
"""What the update of the ICLR version is, for a checkpoint DIR that has none."""


@dataclass(frozen=True, kw_only=True)
class SVDLLM(LowRank):
    """Truncate every matrix where its outputs change least, all at the same share (whitening); with
    --update lstsq, then fit the output factors again, layer by layer.
    """

    name: ClassVar[str] = "svd-llm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.07378"
    knows_experts: ClassVar[bool] = True

    update: str = flag(
        "none",
        "What follows the truncation: none; lstsq (output factors fitted by least squares to the"
        " inputs that the compressed layers before give); lora is a training: says how to do it"
        " with grasp recover.",
        words=UPDATES,
    )
    update_samples: NumSamples | None = flag(
        None, "[lstsq] Blocks of the calibration set to fit to (default 16, or all there are)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update == "lora":
            raise RecipeError(
                "--update lora: is a training, of a checkpoint DIR that was written with --update"
                f" none: `{TRAINING[0]}`, then `{TRAINING[1]}`"
            )
        if self.update_samples is not None and self.update != "lstsq":
            raise RecipeError(
                f"--update-samples {self.update_samples}: --update {self.update} fits to no"
                " blocks; leave it out, or use --update lstsq"
            )

    def metric(self, paths: Sequence[str], scratch: Scratch) -> list[Collector]:
        return [InputCurvatures(paths, scratch)]

    @property
    def over_experts(self) -> bool:
        return super().over_experts and self.update == "none"

    def curvature(self, linear: Linear, stats: Statistics) -> Curvature:
        found: Curvature = stats[InputCurvatures.name][linear.path]
        return found

    def groups(self, linear: Linear, stats: Statistics, scratch: Scratch) -> Groups:
        return groups(linear.weight, self.curvature(linear, stats), "input", scratch)

    def sums_bytes(self, decoder: Decoder, linears: Sequence[Linear]) -> int:
        return square_bytes(linears)

    def operations_a_token(self, decoder: Decoder, linears: Sequence[Linear]) -> Operations:
        return operations.sums(decoder, linears)

    def plan(self, decoder: Decoder) -> Plan:
        plan = super().plan(decoder)
        if self.update == "none":
            return plan
        layers = sorted(self.planned_layers(decoder))
        return dataclasses.replace(
            plan,
            forward_blocks=math.ceil(
                self._blocks * passes([(one, one) for one in layers], len(decoder.kept))
            ),
            statistics_bytes=plan.statistics_bytes
            + max((_input_bytes(self.linears(decoder, [one])) for one in layers), default=0),
            held_blocks=self._blocks,
        )

    def replacements(self, runner: Runner, problem: Problem, spend: float) -> Iterator[Step]:
        if self.update == "none":
            yield from super().replacements(runner, problem, spend)
            return
        taken = problem.taken(self.ranks(problem, spend))
        by_layer = sorted(taken, key=lambda one: one[1].layer)
        shown = runner.data.ids[: self._blocks].numel()
        largest = max((rank for *_, rank in by_layer), default=0)
        if shown < 2 * largest:
            logger.warning(
                "--update lstsq: %d tokens are few to fit ranks up to %d to; give more"
                " --update-samples, or a larger --seq-len",
                shown,
                largest,
            )
        for layer, found in groupby(by_layer, key=lambda one: one[1].layer):
            yield from self._updated(
                runner, layer, {name: (component, rank) for name, component, rank in found}
            )

    def _updated(
        self, runner: Runner, layer: int, taken: Mapping[str, tuple[Component, int]]
    ) -> Iterator[Step]:
        """The pairs of one layer, fitted to what it reads from the layers before as they are
        now.
        """
        decoder = runner.decoder
        linears = [one for one in self.linears(decoder, [layer]) if one.path in taken]
        scratch = decoder.scratch(_input_bytes(linears), self.scratch)
        seen = InputCurvatures(taken, scratch, inputs=taken)
        task = f"least squares, layer {layer}"
        stats = runner.sweep([seen], task, self._blocks, layers=(layer, layer))
        for linear in linears:
            component, rank = taken[linear.path]
            found = stats[InputCurvatures.name][linear.path]
            inputs = found.near if found.inputs is None else found.inputs
            with runner.holding(layer):
                refit = partial(refitted, linear.weight, inputs=inputs)
                made = runner.once(linear.path, partial(component.make, rank, refit))
            yield made

    @property
    def _blocks(self) -> int:
        """That the update is fitted to, at most."""
        return 16 if self.update_samples is None else self.update_samples


def _input_bytes(linears: Sequence[Linear]) -> int:
    """Of the sums of xx' of some matrices, at most: those that read the same input share one."""
    return sum(4 * linear.shape[1] ** 2 for linear in linears)
