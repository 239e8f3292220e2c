"""What a compression will cost, before it is run: memory from shapes, time from a short measurement
of this machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from grasp.core.decoder import Decoder
from grasp.core.experts import experts_stay
from grasp.core.models import DTYPES, load_model
from grasp.data.stream import check_lengths
from grasp.methods import make
from grasp.methods.base import Method, Plan
from grasp.recipes.calibration import CalibrationRecipe
from grasp.recipes.keywords import keywords
from grasp.recipes.method import MethodChoice
from grasp.recipes.model import ModelSource
from grasp.verbs.compress import KEYWORDS

EFFICIENCY = 0.4
"""Share of a bare matrix product's speed that a whole transformer pass reaches: an assumption,
checked once on two cores, where it gave 51 s in the setting of benchmarks/compress_cost.py for runs
of 38 to 43 s.
"""


@dataclass(frozen=True)
class Estimate:
    """`memory` in bytes, `seconds` on this machine: within a factor of two."""

    memory: int
    seconds: float


def estimate(
    decoder: Decoder, plan: Plan, num_samples: int, seq_len: int, dtype_bytes: int
) -> Estimate:
    """From the model's shapes (it may be empty) and what the method plans."""
    parameters, config = decoder.num_parameters(), decoder.config
    hidden, vocab = config.hidden_size, config.vocab_size
    activations = (
        seq_len * decoder.num_layers * 24 * hidden * dtype_bytes if plan.backward_sweeps else 0
    )
    logits = seq_len * vocab * 4 * (3 if plan.backward_sweeps else 1)
    held = (plan.held_sets * num_samples + plan.held_blocks) * seq_len * hidden * 4
    memory = parameters * dtype_bytes + plan.statistics_bytes + held + activations + logits
    tokens = num_samples * seq_len
    work = 2.0 * parameters * tokens * (plan.forward_sweeps + 2.5 * plan.backward_sweeps)
    work += 2.0 * parameters * seq_len * plan.forward_blocks
    linears = [linear for layer in decoder.layers() for linear in layer.linears.values()]
    for m, n in (linear.shape for linear in linears):
        work += 20.0 * m * n * min(m, n) * plan.decompositions / len(linears)
    return Estimate(memory, work / (_matmul_speed() * EFFICIENCY))


def _matmul_speed(size: int = 1024, repeats: int = 5) -> float:
    """Floating-point operations a second of a float32 matrix product here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        float((left @ right)[0, 0])
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


@dataclass(frozen=True)
class DryRun:
    """What `compress` would do. `decoder` is empty: shapes without weights; `width` the bytes of a
    number.
    """

    decoder: Decoder
    method: Method
    plan: Plan
    calibration: CalibrationRecipe
    width: int

    @property
    def num_bytes(self) -> int:
        """Of the result on disk, or of the whole model where the size follows from the scores."""
        after = self.plan.parameters
        return (self.decoder.num_parameters() if after is None else after) * self.width

    @property
    def ratio(self) -> float | None:
        """Share of all parameters that would go, where it is known."""
        after = self.plan.parameters
        return None if after is None else 1 - after / self.decoder.num_parameters()

    @property
    def stays(self) -> str:
        """What the method leaves as it is, where that needs saying."""
        changes = self.method.changes_experts or self.method.over_experts
        return "" if changes else experts_stay(self.decoder)

    def estimate(self) -> Estimate:
        """Memory, and time on this machine."""
        blocks = self.calibration
        return estimate(self.decoder, self.plan, blocks.num_samples, blocks.seq_len, self.width)


@keywords
def dry_run(
    source: ModelSource, *, choice: MethodChoice, calibration: CalibrationRecipe, **fields: Any
) -> DryRun:
    """What `compress` would do with these arguments, from the model's shapes alone: no weights and
    no text are read.
    """
    chosen = make(choice.method, fields, KEYWORDS, choice.plugin)
    decoder = load_model(
        str(source.model),
        empty=True,
        device=source.device,
        dtype=source.dtype,
        trust_remote_code=source.trust_remote_code,
    )
    check_lengths(decoder, calibration.num_samples, calibration.seq_len)
    chosen.check(decoder)
    width = (DTYPES[source.dtype] if source.dtype else decoder.model.dtype).itemsize
    return DryRun(decoder, chosen, chosen.plan(decoder), calibration, width)
