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
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grasp.compensation.job import Job, on_disk
from grasp.compensation.recipe import Recipe, make_recipe
from grasp.compensation.trainable import (
    bring_back,
    choose,
    numbers,
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
from grasp.core.checkpoint import save
from grasp.core.destination import name_of
from grasp.core.extras import need
from grasp.core.fields import PathLike, checked
from grasp.core.models import load_model
from grasp.core.processes import world_size
from grasp.core.progress import Progress, silent
from grasp.core.provenance import versions
from grasp.errors import RecipeError
from grasp.report.card import model_card, picture_for

logger = logging.getLogger(__name__)


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
        preset: "paper" (the default), "quick" or "sequential"; `fields` change it: see
            `grasp.compensation.recipe.Recipe`.
        resume: go on from the last state of an interrupted run with the same recipe.
        fsdp: under torchrun, share the weights among the processes instead of giving each all of
            them.
        report_to: trackers of the Hugging Face trainer, such as "tensorboard".

    Raises:
        GraspError: one line that names the argument, its value, what is allowed and the way out.
    """
    recipe, place, out = make_recipe(preset, fields), Path(checkpoint), Path(out)
    if recipe.objective == "block" and (fsdp or report_to or world_size() > 1):
        raise RecipeError(
            "--objective block: one process trains one layer at a time, without --fsdp, --report-to"
            " and torchrun; leave them out, or take another objective"
        )
    need("grasp recover", "recover", "accelerate", *(["peft"] if recipe.train == "lora" else []))
    job = Job.begin(recipe, place, out, data, text_field, device, fsdp, trust_remote_code, progress)
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
        done, count = _trained(job, args, run, resume_from)
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
    del job
    if args.process_index == 0:
        _save(place, out, recipe, done, manifest, trust_remote_code)
        shutil.rmtree(run, ignore_errors=True)
    return Recovery(out, manifest, done.curve)


def _trained(job: Job, args: Any, run: Path, resume_from: Path | None) -> tuple[Trained, int]:
    """What the training ended with, and how many numbers it changed."""
    if job.recipe.objective == "block":
        blockwise = job.blockwise()
        return blockwise.train(run), blockwise.count
    objective = job.objective(args)
    model = choose(job.decoder, job.recipe, job.log)
    done = train(
        model,
        args,
        job.told,
        objective,
        job.collate,
        dtype=job.dtype,
        progress=job.progress,
        resume_from=resume_from,
    )
    return done, numbers(model)


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
    decoder = load_model(
        str(place), device="cpu", trust_remote_code=trust_remote_code, offload=on_disk(recipe)
    )
    draw = picture_for(manifest)

    def beside(folder: Path) -> None:
        draw(folder)
        if recipe.keep_adapter:
            write_adapter(decoder, recipe, done.state, folder / "adapter", name_of(out))

    if not recipe.keep_adapter:
        bring_back(decoder, recipe, done.state)
    save(decoder, out, manifest, model_card(manifest, name_of(out)), beside)
