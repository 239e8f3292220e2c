"""READ FIRST: the whole tool in the paper's order.

    compress()   model + calibration text -> fewer parameters, saved as a checkpoint
        1. load the model; draw the calibration set                        (paper, section 4.1)
        2. one sweep: how redundant is every layer, and what else the method needs   (3.1)
        3. the method yields edits; each is applied before the next is asked for     (3.2, 3.3)
        4. save: weights, manifest, model card
    inspect()    step 2 alone, and the singular values
    evaluate()   perplexity on held-out text

Progress, parameter counts, the edit log and timings live here, once for all methods.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grasp.core.checkpoint import check_destination, save
from grasp.core.decoder import Decoder, as_decoder
from grasp.core.edits import apply
from grasp.core.linalg import svd
from grasp.core.models import load_model
from grasp.core.records import Calibration, Redundancy, Score, Statistics
from grasp.core.sweep import Progress, silent
from grasp.errors import NumericsError
from grasp.evaluation.perplexity import perplexity
from grasp.methods import make
from grasp.methods.base import Method, Plan
from grasp.core.provenance import describe_model, versions
from grasp.report.card import model_card
from grasp.stages.calibration import bos_of, calibrate, check_lengths, read_text, tokenize
from grasp.stages.redundancy import angular_distance, block_influence
from grasp.stages.statistics import AngularDistance, Similarity

logger = logging.getLogger(__name__)

DEFAULT_DATA, DEFAULT_NUM_SAMPLES, DEFAULT_SEQ_LEN = "pydoc", 128, 512


@dataclass(frozen=True)
class Compression:
    """What `compress` did. `manifest` is what `grasp.json` holds; `path` the checkpoint, None if none was asked for."""

    decoder: Decoder = field(repr=False)
    manifest: dict[str, Any] = field(repr=False)
    parameters_before: int
    parameters_after: int
    path: Path | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The compressed model, an ordinary Hugging Face one."""
        return self.decoder.model

    @property
    def ratio(self) -> float:
        """Share of all parameters that is gone, tied weights counted once."""
        return 1 - self.parameters_after / self.parameters_before


def compress(
    model: str | PreTrainedModel | Decoder,
    out: str | Path | None = None,
    *,
    method: str | Method = "grasp",
    data: str | Calibration = DEFAULT_DATA,
    num_samples: int = DEFAULT_NUM_SAMPLES,
    seq_len: int = DEFAULT_SEQ_LEN,
    seed: int = 0,
    text_field: str | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Compression:
    """Compress a model and save it.

    Args:
        model: hub id, directory, `.gguf` file, "smollm2", or a loaded model, which is then edited in place.
        out: directory to write; must not exist or be empty. None: nothing is written.
        method: a name (see `grasp methods`), with its fields as further arguments, or a `Method`.
        data: calibration text (a named set, a file, "self", "pydoc"), or a ready `Calibration`.
        num_samples, seq_len, seed: so many blocks of so many tokens, drawn by this seed.
        progress: called as `progress(task, done, total)`.

    Raises:
        GraspError: one line that names the argument, its value, what is allowed and the way out.
    """
    chosen = make(method, fields)
    clock = _Clock()
    decoder = _decoder(model, tokenizer, device, dtype, trust_remote_code)
    if not isinstance(data, Calibration):
        check_lengths(decoder, num_samples, seq_len)
    chosen.check(decoder)
    before = decoder.num_parameters()
    original = describe_model(decoder)
    plan = chosen.plan(decoder)
    if out is not None:
        after = before if plan.parameters is None else plan.parameters
        check_destination(Path(out), decoder.num_bytes() * after // before)
    decoder.check_finite()
    clock.lap("load")

    calibration = data if isinstance(data, Calibration) else calibrate(
        decoder, data, num_samples=num_samples, seq_len=seq_len, seed=seed, text_field=text_field, progress=progress
    )  # fmt: skip
    clock.lap("calibration")

    decoder.progress = progress
    stats = decoder.sweep(calibration, chosen.needs(decoder), "layer redundancy")
    clock.lap("redundancy")

    log: list[dict[str, Any]] = []
    progress("replacing matrices", 0, plan.num_edits)
    for edit in chosen.edits(decoder, calibration, stats):
        apply(decoder, edit)
        log.append({**edit.spec(), "parameters": decoder.num_parameters()})
        progress("replacing matrices", len(log), max(plan.num_edits, len(log)))
    progress("replacing matrices", len(log), len(log))
    after = decoder.num_parameters()
    clock.lap("attribution and replacement")
    logger.info("%s parameters -> %s (%.2f %% removed)", f"{before:,}", f"{after:,}", 100 * (1 - after / before))

    recipe = {"method": chosen.name, **chosen.recipe(), **_data_recipe(data, calibration, text_field), **({"dtype": dtype} if dtype else {})}
    manifest = {
        "model": original,
        "method": {"name": chosen.name, "paper": chosen.paper, **chosen.recipe()},
        "recipe": {"model": decoder.source, **recipe},
        "calibration": {**calibration.to_json(), "loss_before": stats.loss},
        "redundancy": _redundancy_json(stats),
        "edits": log,
        "parameters": {"before": before, "after": after, "ratio": 1 - after / before},
        "versions": versions(),
        "seconds": clock.laps,
    }
    if out is not None:
        save(decoder, Path(out), manifest, model_card(manifest, Path(out).name))
    return Compression(decoder, manifest, before, after, None if out is None else Path(out))


def dry_run(model: str, *, method: str | Method = "grasp", trust_remote_code: bool = False, **fields: Any) -> tuple[Decoder, Method, Plan]:
    """What `compress` would do, from the model's shapes alone: no weights are read."""
    chosen = make(method, fields)
    decoder = load_model(model, empty=True, trust_remote_code=trust_remote_code)
    chosen.check(decoder)
    return decoder, chosen, chosen.plan(decoder)


@dataclass(frozen=True)
class Inspection:
    """What `inspect` saw: redundancy of the layers, and the singular values (k,) of every matrix by path."""

    redundancy: Redundancy
    singular_values: dict[str, Tensor]
    calibration: Calibration


def inspect(
    model: str | PreTrainedModel | Decoder,
    *,
    data: str = DEFAULT_DATA,
    num_samples: int = 32,
    seq_len: int = DEFAULT_SEQ_LEN,
    seed: int = 0,
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
    decoder = _decoder(model, tokenizer, device, dtype, trust_remote_code)
    calibration = calibrate(decoder, data, num_samples=num_samples, seq_len=seq_len, seed=seed, text_field=text_field, progress=progress)
    decoder.progress = progress
    stats = decoder.sweep(calibration, [AngularDistance()] if angular else [Similarity()], "layer redundancy")
    linears = [linear for layer in decoder.layers() for linear in layer.linears.values()] if spectra else []
    values = {}
    for done, linear in enumerate(linears):
        progress("singular values", done, len(linears))
        values[linear.path] = svd(linear.weight)[1].cpu()
    progress("singular values", len(linears), len(linears))
    return Inspection(angular_distance(stats) if angular else block_influence(stats), values, calibration)


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model."""

    model: str
    parameters: int
    num_bytes: int
    scores: tuple[Score, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "bytes": self.num_bytes,
            "scores": [score.to_json() for score in self.scores],
            "versions": versions(),
        }


def evaluate(
    model: str | PreTrainedModel | Decoder,
    *,
    ppl: str | Sequence[str] = DEFAULT_DATA,
    seq_len: int | None = None,
    stride: int | None = None,
    num_blocks: int | None = None,
    text_field: str | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Token perplexity on one text or several (DATA; of a named set, the test split).

    `seq_len` None: 2048, or the longest the model reads. Raises `GraspError`; a non-finite block is an error, never skipped.
    """
    decoder = _decoder(model, tokenizer, device, dtype, trust_remote_code)
    limit = getattr(decoder.config, "max_position_embeddings", None) or 2048
    length = min(2048, limit) if seq_len is None else seq_len
    check_lengths(decoder, 1, length)
    scores = []
    for data in _names(ppl):
        text = read_text(data, split="test", text_field=text_field, tokenizer=decoder.tokenizer)
        scores.append(
            perplexity(
                decoder, tokenize(decoder, text), name=data, seq_len=length, stride=stride,
                num_blocks=num_blocks, bos=bos_of(decoder), progress=progress,
            )  # fmt: skip
        )
    return Evaluation(decoder.source, decoder.num_parameters(), decoder.num_bytes(), tuple(scores))


def _names(value: str | Iterable[str]) -> list[str]:
    return value.split(",") if isinstance(value, str) else list(value)


def _decoder(model: Any, tokenizer: Any, device: str | None, dtype: str | None, trust_remote_code: bool) -> Decoder:
    if isinstance(model, (str, Path)):
        return load_model(str(model), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return as_decoder(model, tokenizer)


def _data_recipe(data: str | Calibration, calibration: Calibration, text_field: str | None) -> dict[str, Any]:
    found = {"data": data if isinstance(data, str) else calibration.source, "num_samples": calibration.num_blocks}
    found |= {"seq_len": calibration.seq_len, "seed": calibration.seed}
    return found | ({"text_field": text_field} if text_field else {})


def _redundancy_json(stats: Statistics) -> dict[str, Any]:
    """Block influence of every layer, which every method's sweep collects; angular distances beside it where they were asked for."""
    found: dict[str, Any] = {}
    if Similarity.name in stats.tables:
        found["bi"] = {str(layer): score for layer, score in block_influence(stats).scores.items()}
    if AngularDistance.name in stats.tables:
        found["angular"] = {str(layer): score for layer, score in angular_distance(stats).scores.items()}
    for kind, scores in found.items():
        for layer, score in scores.items():
            if score != score:
                raise NumericsError(f"layer {layer}: its {kind} is not a number; the hidden states overflow; try --dtype float32")
    return found


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 3), now
