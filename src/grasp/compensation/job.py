"""What every step of a recovery needs, read and checked before any work is done."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp.compensation.blockwise import Blockwise
from grasp.compensation.least_squares import least_squares, pairs_of
from grasp.compensation.objectives import Distill, LanguageModel, MatchLayers, Objective
from grasp.compensation.recipe import Recipe
from grasp.compensation.teacher import CachedTeacher, Teacher, check_teacher, offload, remember
from grasp.compensation.trainable import check_trainable, names_in, settled
from grasp.compensation.training import (
    run_of,
)
from grasp.core.bos import num_rows
from grasp.core.decoder import Decoder
from grasp.core.destination import check_beside, check_destination
from grasp.core.edits import EditLog, read_log
from grasp.core.layers.low_rank_grasp import fuse
from grasp.core.manifest import MANIFEST, read_manifest
from grasp.core.models import load_model
from grasp.core.offload import Offload
from grasp.core.precision import has_fast_bfloat16
from grasp.core.progress import Progress
from grasp.core.proof import check_savable
from grasp.core.provenance import Clock, describe_model
from grasp.core.scratch import available_memory
from grasp.core.seal import SEAL
from grasp.data.examples import read_examples
from grasp.data.rows import Collate, Rows, TrainingData, pack_or_pad, prepare
from grasp.data.stream import check_lengths
from grasp.data.text import fields_of, read_source, sources
from grasp.errors import CheckpointError, GraspError, RecipeError

logger = logging.getLogger(__name__)

LITTLE = 2**33
"""Bytes of memory that a machine is thought to have that does not say."""
FIT_ROWS = 32
"""Rows of the training data that the closed-form start is solved on."""


@dataclass
class Job:
    """What every step of a recovery needs: the model, the text, and the teacher, if any."""

    recipe: Recipe
    manifest: dict[str, Any]
    log: EditLog
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
    ) -> Job:
        """Read everything, and find what is wrong before any work is done."""
        clock, manifest = Clock(), _manifest(place)
        log = read_log(manifest)
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
        disk = on_disk(recipe)
        on = "cpu" if fsdp else device
        decoder = load_model(str(place), device=on, offload=disk, **options)
        check_lengths(decoder, 1, recipe.max_length, "--max-length")
        decoder.check_finite()
        check_savable(decoder)
        check_trainable(decoder, recipe, log)
        recipe = settled(decoder, recipe, log)
        packed = pack_or_pad(decoder, recipe.pad)
        told = _told(decoder, recipe, data, text_field, packed)
        pad = getattr(decoder.tokenizer, "pad_token_id", None) or 0
        pad = pad if pad < num_rows(decoder.model) else 0  # it is masked, but looked up
        if recipe.needs_teacher:
            options["offload"] = None if disk is None else disk.beside()
            teacher = _teacher(recipe, decoder, manifest, device, options)
        else:
            teacher = None
        job = cls(
            recipe,
            manifest,
            log,
            decoder,
            dtype,
            told,
            Collate(packed, pad),
            teacher,
            progress,
            clock,
        )
        clock.lap("load")
        return job

    @property
    def device(self) -> torch.device:
        return self.decoder.device

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
        pairs = pairs_of(self.decoder, self.teacher.decoder, self.log)
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
        places = [(self.decoder.stack[place], layer) for place, layer in self._places().items()]
        return MatchLayers(self.teacher, places)

    def blockwise(self) -> Blockwise:
        """The training of one layer after the other."""
        assert self.teacher is not None
        fuse(self.decoder.model, together=False)
        scratch = None if self.decoder.offload is None else self.decoder.offload.scratch()
        return Blockwise(
            self.decoder,
            self.teacher.decoder,
            self._places(),
            names_in(self.decoder, self.recipe, self.log),
            self.recipe,
            self.told,
            self.collate,
            self.dtype,
            Tensor.cpu if scratch is None else scratch.hold,
            self.progress,
        )

    def _places(self) -> dict[int, int]:
        """Where hidden states are compared, place in the stack -> layer of the teacher: behind
        every layer that an edit touched and every gap that removed layers left; then at the end
        too.
        """
        origin = self.log.left
        places = {place: origin[place] for place in self.log.places}
        for gone in self.log.gone:
            before = [place for place, layer in enumerate(origin) if layer < gone]
            if before:
                places[before[-1]] = max(gone, places.get(before[-1], 0))
        if self.log.gone:
            places[len(origin) - 1] = self.log.num_layers - 1
        return dict(sorted(places.items()))

    def facts(self, place: str, out: str, data: str) -> dict[str, Any]:
        """What the manifest says about recipe, text and teacher."""
        told, recipe = self.told, self.recipe
        merged = (
            "no: kept as adapter/"
            if recipe.keep_adapter
            else "yes, exactly; low-rank pairs were trained as they are"
            if recipe.lora_on == "matrices"
            else f"yes, exactly: into the {recipe.lora_on}; all else is as it was"
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


def _told(
    decoder: Decoder, recipe: Recipe, data: str, text_field: str | None, packed: bool
) -> TrainingData:
    """The rows to train on, and those held out."""
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
    return prepare(
        found,
        max_length=recipe.max_length,
        held_out=recipe.held_out,
        packed=packed,
        batch=recipe.batch_size,
        needed=None if recipe.max_steps is None else recipe.max_steps * recipe.batch_size,
        every=recipe.objective != "lm",
        seed=recipe.seed,
    )


def on_disk(recipe: Recipe) -> Offload | None:
    """Where the layers of the models lie, where that is on the disk."""
    if recipe.offload is None:
        return None
    return Offload.at(Path(recipe.offload), available_memory() or LITTLE)


def _manifest(place: Path) -> dict[str, Any]:
    if not (place / MANIFEST).is_file():
        raise CheckpointError(
            f"DIR {place}: no {MANIFEST} in it; give a checkpoint that `grasp compress` wrote"
        )
    return {key: value for key, value in read_manifest(place).items() if key != SEAL}


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
