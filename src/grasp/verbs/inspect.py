"""`grasp inspect`: how redundant every layer is, and how fast the singular values of its matrices
fall. Nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor
from transformers import PreTrainedModel

from grasp.core.decoder import Decoder
from grasp.core.fields import IS_PATH, NumSamples, Seed, SeqLen, checked
from grasp.core.linalg import svd
from grasp.core.models import open_model
from grasp.core.progress import Progress, silent
from grasp.core.records import Calibration, Redundancy
from grasp.core.runner import Resident
from grasp.data.calibration import calibrate
from grasp.stages.redundancy import angular_distance, block_influence
from grasp.stages.statistics import AngularDistance, Similarity
from grasp.verbs.compress import DEFAULT_DATA, DEFAULT_SEQ_LEN


@dataclass(frozen=True)
class Inspection:
    """What `inspect` saw: redundancy of the layers, and the singular values (k,) of every matrix by
    path.
    """

    redundancy: Redundancy
    singular_values: dict[str, Tensor]
    calibration: Calibration


@checked
def inspect(
    model: Annotated[str | Path | PreTrainedModel | Decoder, IS_PATH],
    *,
    data: str = DEFAULT_DATA,
    num_samples: NumSamples = 32,
    seq_len: SeqLen = DEFAULT_SEQ_LEN,
    seed: Seed = 0,
    text_field: str | None = None,
    angular: bool = False,
    spectra: bool = True,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Inspection:
    """Layer redundancy and singular spectra; nothing is changed. Arguments as for `compress`."""
    decoder = open_model(model, tokenizer, device, dtype, trust_remote_code, dequantize=True)
    decoder.check_finite()
    calibration = calibrate(
        decoder,
        data,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        text_field=text_field,
        progress=progress,
    )
    decoder.progress = progress
    runner = Resident(decoder, calibration)
    stats = runner.sweep([AngularDistance()] if angular else [Similarity()], "layer redundancy")
    linears = (
        [linear for layer in decoder.layers() for linear in layer.linears.values()]
        if spectra
        else []
    )
    values = {}
    for done, linear in enumerate(linears):
        progress("singular values", done, len(linears))
        with runner.holding(linear.layer):
            values[linear.path] = svd(linear.weight)[1].cpu()
    progress("singular values", len(linears), len(linears))
    return Inspection(
        angular_distance(stats) if angular else block_influence(stats), values, calibration
    )
