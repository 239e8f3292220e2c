"""GRASP*: a short training after compression (paper, section 4.1: "compensation").

recover()   checkpoint + text -> the same checkpoint with its trained parameters, and what the
            training did
    1. read the checkpoint and the text; hold some examples out
    2. a dense teacher, where the objective has one; a closed-form start, where asked for
    3. train what the edits added, or the layers that are left (grasp.compensation)
    4. put the best state into the checkpoint as it was stored, and save that
"""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grasp.compensation.least_squares import least_squares, pairs_of
from grasp.compensation.objectives import Distill, LanguageModel, MatchLayers, Objective
from grasp.compensation.recipe import Recipe, make_recipe
from grasp.compensation.teacher import CachedTeacher, Teacher, check_teacher, offload, remember
from grasp.compensation.trainable import (
    bring_back,
    check_trainable,
    choose,
    numbers,
    settled,
    write_adapter,
)
from grasp.compensation.training import (
    Look,
    Trained,
    arguments,
    number_of_steps,
    run_folder,
    run_of,
    train,
)
from grasp.core.bos import num_rows
from grasp.core.checkpoint import save
from grasp.core.decoder import Decoder
from grasp.core.destination import check_beside, check_destination, name_of
from grasp.core.extras import need
from grasp.core.fields import PathLike, checked
from grasp.core.layer import is_low_rank
from grasp.core.manifest import MANIFEST, read_manifest
from grasp.core.models import load_model
from grasp.core.precision import has_fast_bfloat16
from grasp.core.progress import Progress, silent
from grasp.core.proof import check_savable
from grasp.core.provenance import Clock, describe_model, versions
from grasp.core.seal import SEAL
from grasp.data.calibration import check_lengths, sources
from grasp.data.examples import read_examples
from grasp.data.rows import Collate, Rows, TrainingData, pack_or_pad, prepare
from grasp.data.text import fields_of, read_source
from grasp.errors import CheckpointError, GraspError, RecipeError
from grasp.report.card import model_card

logger = logging.getLogger(__name__)

FIT_ROWS = 32
"""Rows of the training data that the closed-form start is solved on."""


@dataclass(frozen=True)
class Recovery:
    """What `recover` did. `manifest` is what the new `grasp.json` holds, its part "recovery" about
    this; `curve` the losses by step.
    """

    path: Path
    manifest: dict[str, Any] = field(repr=False)
    curve: list[Look] = field(repr=False)

    @property
    def best(self) -> Look:
        """The look at the held-out examples whose state was kept."""
        return dict(self.manifest["recovery"]["best"])


@checked
def recover(
    checkpoint: PathLike,
    out: PathLike,
    *,
    data: str,
    preset: str | None = None,
    text_field: str | None = None,
    device: str | None = None,
    resume: bool = False,
    fsdp: bool = False,
    report_to: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **fields: Any,
) -> Recovery:
    """Train a compressed checkpoint briefly and save the result.

    Args:
        checkpoint: a directory that `compress` (or `recover`) wrote. It is not changed.
        out: directory to write; must not exist or be empty. The run keeps its states in `out` +
            ".recovery", gone when it is done.
        data: a named set, a file (Alpaca columns, `messages`, or plain text), or several, separated
            by commas.
        preset: "paper" (the default) or "quick"; `fields` change it: see
            `grasp.compensation.recipe.Recipe`.
        resume: go on from the last state of an interrupted run with the same recipe.
        fsdp: under torchrun, share the weights among the processes instead of giving each all of
            them.
        report_to: trackers of the Hugging Face trainer, such as "tensorboard".

    Raises:
        GraspError: one line that names the argument, its value, what is allowed and the way out.
    """
    recipe, place, out = make_recipe(preset, fields), Path(checkpoint), Path(out)
    need("grasp recover", "recover", "accelerate", *(["peft"] if recipe.train == "lora" else []))
    job = _Job.begin(
        recipe, place, out, data, text_field, device, fsdp, trust_remote_code, progress
    )
    recipe, run, clock = job.recipe, run_of(out), job.clock
    layer_class = type(job.decoder.stack[0]).__name__ if fsdp else None
    args = arguments(
        recipe,
        run,
        number_of_steps(recipe, len(job.told.train)),
        device=job.device,
        fsdp=layer_class,
        report_to=report_to,
    )
    with run_folder(run, job.record(data), resume) as resume_from:
        start = job.start() if resume_from is None else None
        clock.lap("start")
        objective = job.objective(args)
        model = choose(job.decoder, recipe, len(job.dropped))
        count = numbers(model)
        done = train(
            model,
            args,
            job.told,
            objective,
            job.collate,
            dtype=job.dtype,
            progress=progress,
            resume_from=resume_from,
        )
        clock.lap("training")

    facts = {
        **job.facts(place.name, name_of(out), data),
        "trained_parameters": count,
        "start": start,
        "processes": args.world_size,
        "steps": done.steps,
        "tokens_seen": done.tokens,
        "curve": done.curve,
        "best": done.best,
        "versions": versions(),
        "seconds": clock.laps,
    }
    manifest = {
        **job.manifest,
        "recovery": {name: value for name, value in facts.items() if value is not None},
    }
    if "recovery" in job.manifest:
        manifest["recovery"]["before"] = job.manifest["recovery"]
    del model, objective, job
    if args.process_index == 0:
        _save(place, out, recipe, done, manifest, trust_remote_code)
        shutil.rmtree(run, ignore_errors=True)
    return Recovery(out, manifest, done.curve)


@dataclass
class _Job:
    """What every step of a recovery needs: the model, the text, and the teacher, if any."""

    recipe: Recipe
    manifest: dict[str, Any]
    decoder: Decoder
    dtype: torch.dtype
    told: TrainingData
    collate: Collate
    teacher: Teacher | None
    progress: Progress
    clock: Clock

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        place: Path,
        out: Path,
        data: str,
        text_field: str | None,
        device: str | None,
        fsdp: bool,
        trust_remote_code: bool,
        progress: Progress,
    ) -> _Job:
        """Read everything, and find what is wrong before any work is done."""
        clock, manifest = Clock(), _manifest(place)
        if "quantization" in manifest:
            raise RecipeError(
                f"DIR {place}: is quantized ({manifest['quantization']['scheme']}), and rounded"
                " weights are not trained; recover the checkpoint it was made from, then quantize"
            )
        check_destination(
            out,
            sum(file.stat().st_size for file in place.glob("*.safetensors")),
            place,
            recipe.teacher,
        )
        check_beside(run_of(out), out, "the states of the run are kept in")
        dtype = _dtype(recipe, device)
        options: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "trust_remote_code": trust_remote_code,
        }
        decoder = load_model(str(place), device="cpu" if fsdp else device, **options)
        check_lengths(decoder, 1, recipe.max_length, "--max-length")
        decoder.check_finite()
        check_savable(decoder)
        check_trainable(decoder, recipe, len(_dropped(manifest)))
        recipe = settled(decoder, recipe)
        packed = pack_or_pad(decoder, recipe.pad)
        needed = None if recipe.max_steps is None else recipe.max_steps * recipe.batch_size
        every = recipe.objective != "lm"
        names = sources(data)
        found = [
            read_examples(
                decoder,
                read_source(name, split="train", text_field=field),
                max_length=recipe.max_length,
                text_field=field,
            )
            for name, field in zip(names, fields_of(names, text_field), strict=True)
        ]
        told = prepare(
            found,
            max_length=recipe.max_length,
            held_out=recipe.held_out,
            packed=packed,
            batch=recipe.batch_size,
            needed=needed,
            every=every,
            seed=recipe.seed,
        )
        pad = getattr(decoder.tokenizer, "pad_token_id", None) or 0
        pad = pad if pad < num_rows(decoder.model) else 0  # it is masked, but looked up
        teacher = (
            _teacher(recipe, decoder, manifest, device, options) if recipe.needs_teacher else None
        )
        job = cls(
            recipe, manifest, decoder, dtype, told, Collate(packed, pad), teacher, progress, clock
        )
        clock.lap("load")
        return job

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dropped(self) -> list[int]:
        """Layers of the dense model that were removed."""
        return _dropped(self.manifest)

    @property
    def origin(self) -> list[int]:
        """For every layer of the model, which layer of the dense model it was."""
        return [
            index
            for index in range(self.manifest["model"]["num_layers"])
            if index not in self.dropped
        ]

    def record(self, data: str) -> dict[str, Any]:
        """What two runs must share for one to go on where the other stopped."""
        fingerprint = describe_model(self.decoder)["weights_fingerprint"]
        return {
            **self.recipe.to_json(),
            "data": data,
            "rows_sha256": self.told.train.sha256,
            "checkpoint": fingerprint,
        }

    def start(self) -> dict[str, float] | None:
        """The closed-form start. Returns, over all pairs, the share of the squared output error
        that is left (median, largest).
        """
        if self.recipe.begins != "least-squares":
            return None
        assert self.teacher is not None
        pairs = pairs_of(self.decoder, self.teacher.decoder, self.origin)
        if not pairs:
            raise RecipeError(
                "--start least-squares: the checkpoint has no low-rank matrix to solve for; use"
                " --start keep"
            )
        rows = Rows(self.told.train.rows[:: max(1, len(self.told.train) // FIT_ROWS)][:FIT_ROWS])
        left = sorted(
            least_squares(
                self.decoder,
                pairs,
                rows,
                self.collate,
                batch=self.recipe.micro_batch,
                progress=self.progress,
            ).values()
        )
        logger.info(
            "least squares: %.0f %% of the squared output error of the median matrix is left",
            100 * left[len(left) // 2],
        )
        return {"error_left_median": left[len(left) // 2], "error_left_largest": left[-1]}

    def objective(self, args: Any) -> Objective:
        """What the training minimises, with its teacher where it is to be."""
        if self.recipe.objective == "lm":
            return LanguageModel()
        assert self.teacher is not None
        teacher: Teacher | CachedTeacher = self.teacher
        if self.recipe.objective == "distill" and self.recipe.teacher_cache is not None:
            with args.main_process_first(local=False):
                teacher = remember(
                    self.teacher,
                    (self.told.train, self.told.held_out),
                    self.collate,
                    Path(self.recipe.teacher_cache),
                    top_k=self.recipe.top_k,
                    temperature=self.recipe.temperature,
                    batch=self.recipe.micro_batch,
                    progress=self.progress,
                )
        elif self.recipe.offload_teacher:
            offload(self.teacher.decoder, args.device, Path(args.output_dir) / "teacher")
        else:
            self.teacher.decoder.model.to(args.device)
        if self.recipe.objective == "distill":
            return Distill(teacher, self.recipe.temperature, self.recipe.lm_weight)
        return MatchLayers(self.teacher, self._places())

    def _places(self) -> list[tuple[nn.Module, int]]:
        """Where hidden states are compared: behind every layer that holds a pair and every gap that
        removed layers left; then at the end too.
        """
        places = {}
        for index, layer in enumerate(self.decoder.stack):
            if any(is_low_rank(module) for module in layer.modules()):
                places[index] = self.origin[index]
        for gone in self.dropped:
            before = [index for index, origin in enumerate(self.origin) if origin < gone]
            if before:
                places[before[-1]] = max(gone, places.get(before[-1], 0))
        if self.dropped:
            places[len(self.origin) - 1] = self.manifest["model"]["num_layers"] - 1
        return [(self.decoder.stack[index], origin) for index, origin in sorted(places.items())]

    def facts(self, place: str, out: str, data: str) -> dict[str, Any]:
        """What the manifest says about recipe, text and teacher."""
        told, recipe = self.told, self.recipe
        merged = (
            "no: kept as adapter/"
            if recipe.keep_adapter
            else "yes, exactly; low-rank pairs were trained as they are"
        )
        return {
            "checkpoint": place,
            "recipe": {"data": data, **recipe.to_json()},
            "command": shlex.join(
                ["grasp", "recover", place, out, "--data", data, *recipe.flags()]
            ),
            "data": {
                "sources": told.sources,
                "rows": len(told.train),
                "held_out_rows": len(told.held_out),
                "tokens": told.train.num_tokens,
                "asked": told.train.num_asked,
                "packed": told.packed,
                "rows_sha256": told.train.sha256,
            },
            "merged": merged if recipe.train == "lora" else None,
            "teacher": None if self.teacher is None else self.teacher.description,
        }


def _manifest(place: Path) -> dict[str, Any]:
    if not (place / MANIFEST).is_file():
        raise CheckpointError(
            f"DIR {place}: no {MANIFEST} in it; give a checkpoint that `grasp compress` wrote"
        )
    return {key: value for key, value in read_manifest(place).items() if key != SEAL}


def _dropped(manifest: dict[str, Any]) -> list[int]:
    return sorted(edit["layer"] for edit in manifest["edits"] if edit["edit"] == "drop")


def _dtype(recipe: Recipe, device: str | None) -> torch.dtype:
    """The precision of products: bfloat16 where the device computes in it."""
    if device is not None and device.startswith("cuda:"):
        raise RecipeError(
            f"--device {device}: training takes the first GPU it sees; choose it with"
            f" CUDA_VISIBLE_DEVICES={device[5:]} and --device cuda"
        )
    if recipe.precision != "auto":
        return torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.bfloat16 if has_fast_bfloat16(where) else torch.float32


def _teacher(
    recipe: Recipe,
    decoder: Decoder,
    manifest: dict[str, Any],
    device: str | None,
    options: dict[str, Any],
) -> Teacher:
    source = recipe.teacher or str(manifest["model"]["source"])
    try:
        teacher = load_model(source, device="cpu" if recipe.offload_teacher else device, **options)
    except GraspError as failure:
        if recipe.teacher is not None:
            raise
        raise RecipeError(
            f"--teacher: the model this was made from, {source}, cannot be opened ({failure}); name"
            " the dense model with --teacher"
        ) from failure
    check_teacher(decoder, teacher, manifest["model"]["num_layers"])
    return Teacher(teacher)


def _save(
    place: Path,
    out: Path,
    recipe: Recipe,
    done: Trained,
    manifest: dict[str, Any],
    trust_remote_code: bool,
) -> None:
    """The checkpoint as it was stored, with what was trained in it; the best state of the run,
    never its last.
    """
    if done.best["step"] == 0:
        logger.warning(
            "the held-out loss was never lower than before the training: %s is as %s was",
            out,
            place,
        )
    decoder = load_model(str(place), device="cpu", trust_remote_code=trust_remote_code)
    if recipe.keep_adapter:
        save(
            decoder,
            out,
            manifest,
            model_card(manifest, name_of(out)),
            lambda folder: write_adapter(
                decoder, recipe, done.state, folder / "adapter", name_of(out)
            ),
        )
        return
    bring_back(decoder, recipe, done.state)
    save(decoder, out, manifest, model_card(manifest, name_of(out)))
