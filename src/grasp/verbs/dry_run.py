"""What a compression will cost, before it is run: memory from shapes, time from a short measurement
of this machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from grasp.core.decoder import Decoder
from grasp.core.fields import NumSamples, PathLike, Seed, SeqLen, checked
from grasp.core.models import load_model
from grasp.data.stream import check_lengths
from grasp.methods import make
from grasp.methods.base import Method, Plan

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
    memory = parameters * dtype_bytes + plan.gradient_parameters * 4 + activations + logits
    tokens = num_samples * seq_len
    work = 2.0 * parameters * tokens * (plan.forward_sweeps + 2.5 * plan.backward_sweeps)
    linears = [linear for layer in decoder.layers() for linear in layer.linears.values()]
    for m, n in (linear.shape for linear in linears):
        work += 20.0 * m * n * min(m, n) * plan.num_edits / len(linears)
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


@checked
def dry_run(
    model: PathLike,
    *,
    method: str,
    num_samples: NumSamples,
    seq_len: SeqLen,
    seed: Seed = 0,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> tuple[Decoder, Method, Plan]:
    """What `compress` would do, from the model's shapes alone: no weights are read. `seed` is only
    checked.
    """
    chosen = make(method, fields)
    decoder = load_model(
        str(model), empty=True, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    check_lengths(decoder, num_samples, seq_len)
    chosen.check(decoder)
    return decoder, chosen, chosen.plan(decoder)
