"""One training run, from marked parameters to the best state it met."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainingArguments, get_scheduler

from grasp.compensation.objectives import Objective
from grasp.compensation.recipe import Recipe
from grasp.compensation.state import TRAINED, last_state, named
from grasp.compensation.trainer import BEST, Compensation
from grasp.core.destination import beside
from grasp.core.partial import hold
from grasp.core.processes import is_first, world_size
from grasp.core.progress import Progress
from grasp.data.rows import Collate, TrainingData
from grasp.errors import CheckpointError, Interrupted, NumericsError, RecipeError

logger = logging.getLogger(__name__)

RECORD = "recipe.json"

Look = dict[str, float | int]
"""What is known of one step: "step", "loss", "held_out_loss", "held_out_lm_loss", those that were
taken.
"""


@dataclass(frozen=True)
class Trained:
    """What a run ended with. `state`: the trained parameters, where their held-out loss was lowest;
    empty on all processes but the first.

    `curve`: a record a look, {"step", "loss", "held_out_loss", "held_out_lm_loss"}; `best` is the
    one that `state` belongs to.
    """

    state: Mapping[str, Tensor]
    curve: list[Look]
    best: Look
    steps: int
    tokens: int
    seconds: float


def number_of_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of the whole run."""
    return recipe.max_steps or max(
        1, math.ceil(recipe.epochs * math.ceil(rows / recipe.batch_size))
    )


def arguments(
    recipe: Recipe,
    folder: Path,
    steps: int,
    *,
    device: torch.device,
    fsdp: str | None,
    report_to: Sequence[str],
) -> TrainingArguments:
    """The recipe in the trainer's words. Raises `RecipeError` for a batch that the processes cannot
    share.
    """
    world = world_size()
    each, rest = divmod(recipe.batch_size, world)
    if rest or not each:
        raise RecipeError(
            f"--batch-size {recipe.batch_size}: cannot be shared by {world} processes; give a"
            f" multiple of {world}"
        )
    part = next(size for size in range(min(recipe.micro_batch, each), 0, -1) if each % size == 0)
    often = min(recipe.eval_every or max(1, steps // 10), steps)
    warmup = min(recipe.warmup_steps, steps // 10)
    if warmup < recipe.warmup_steps:
        logger.info("warm-up: %d steps, a tenth of %d, not %d", warmup, steps, recipe.warmup_steps)
    try:
        found = TrainingArguments(
            output_dir=str(folder),
            use_cpu=device.type == "cpu",
            seed=recipe.seed,
            data_seed=recipe.seed,
            per_device_train_batch_size=part,
            gradient_accumulation_steps=each // part,
            per_device_eval_batch_size=part,
            max_steps=steps,
            learning_rate=recipe.learning_rate,
            warmup_steps=warmup,
            weight_decay=recipe.weight_decay,
            lr_scheduler_type=_scheduler(recipe),
            max_grad_norm=recipe.max_grad_norm,
            optim="adamw_torch",
            **_checkpointing(recipe.gradient_checkpointing),
            eval_strategy="steps",
            eval_steps=often,
            eval_on_start=True,
            save_strategy="steps",
            save_steps=often,
            logging_steps=max(1, often // 5),
            logging_nan_inf_filter=False,
            report_to=list(report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
            ddp_backend="gloo" if world > 1 and device.type == "cpu" else None,
            fsdp=fsdp is not None,
            fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": [fsdp]} if fsdp else None,
        )
    except (ImportError, RuntimeError, ValueError) as failure:
        raise RecipeError(
            f"the training cannot be set up: {' '.join(str(failure).split())[:300]}"
        ) from failure
    # one device a process; several GPUs are used through torchrun
    found._n_gpu = min(1, found.n_gpu)
    return found


def _scheduler(recipe: Recipe) -> str:
    """The trainer's name for what follows the warm-up."""
    return "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule


def schedule_of(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning rate of a training of so many steps that is not the trainer's: as it has it."""
    warmup = min(recipe.warmup_steps, steps // 10)
    return get_scheduler(_scheduler(recipe), optimizer, warmup, steps)


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The trainer's name for it changed within transformers 5."""
    known = {one.name for one in dataclasses.fields(TrainingArguments)}
    name = (
        "activation_checkpointing"
        if "activation_checkpointing" in known
        else "gradient_checkpointing"
    )
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def begin_run(folder: Path, record: dict[str, Any], resume: bool) -> Path | None:
    """Make the run's folder, or find the state to go on from. Raises `CheckpointError` where the
    two runs are not the same.
    """
    note = folder / RECORD
    if resume and note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        for name, value in record.items():
            if name != "learning_rate" and before.get(name) != value:
                raise CheckpointError(
                    f"--resume: {folder} was begun with {name} {before.get(name)}, not {value};"
                    " give the same, or remove it to begin anew"
                )
        return last_state(folder)
    state = last_state(folder)
    if state is not None:
        raise CheckpointError(
            f"{folder}: holds a run, at {named(state)}; go on from it with"
            " --resume, or remove it to begin anew"
        )
    if resume:
        logger.info("--resume: %s holds no run; beginning anew", folder)
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        note.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return None


@contextmanager
def run_folder(folder: Path, record: dict[str, Any], resume: bool) -> Iterator[Path | None]:
    """The folder of a run, within the block; gives the state to go on from. It stays only where
    there is a state in it to lose.

    Raises `CheckpointError` where it cannot be made, or where another process trains in it.
    """
    with ExitStack() as held:
        try:
            if is_first() and folder.is_dir():
                held.enter_context(hold(folder))
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another process is training in it; wait for it, or choose another OUT"
            ) from None
        try:
            try:
                state = begin_run(folder, record, resume)
                if is_first():
                    held.close()
                    held.enter_context(hold(folder))
            except OSError as failure:
                raise CheckpointError(f"{folder}: the run cannot be begun: {failure}") from failure
            yield state
        finally:
            if last_state(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)


def run_of(out: Path) -> Path:
    """The folder beside `out` where a run keeps its states."""
    return beside(out, ".recovery")


@contextmanager
def way_on(out: Path) -> Iterator[None]:
    """An interrupt within the block says what of the run is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        state = last_state(run_of(out))
        if state is None:
            raise
        kept = f"the state of {named(state)} is kept in {state.parent}"
        raise Interrupted(f"{kept}; the same command with --resume goes on from there") from stop


def train(
    model: nn.Module,
    args: TrainingArguments,
    data: TrainingData,
    objective: Objective,
    collate: Collate,
    *,
    dtype: torch.dtype,
    progress: Progress,
    resume_from: Path | None,
) -> Trained:
    """Train the marked parameters of `model`. Raises `NumericsError` at the first loss that is not
    finite, naming the step.
    """
    try:
        trainer = Compensation(
            model, args, data, objective, collate, dtype=dtype, progress=progress
        )
    except (ImportError, RuntimeError, ValueError) as failure:
        # a tracker that is unknown or not installed
        raise RecipeError(
            f"the training cannot be set up: {' '.join(str(failure).split())[:300]}"
        ) from failure
    folder = Path(args.output_dir)
    try:
        done = trainer.train(
            resume_from_checkpoint=None if resume_from is None else str(resume_from)
        )
    except NumericsError as failure:
        raise NumericsError(f"{failure}; {_way_on(folder)}") from failure
    if trainer.state.log_history and not any(
        "eval_loss" in log and log["step"] == trainer.state.global_step
        for log in trainer.state.log_history
    ):
        trainer.evaluate()
    curve = _curve(trainer.state.log_history)
    state, best = {}, min(curve, key=lambda look: look.get("held_out_loss", math.inf))
    if trainer.is_world_process_zero():
        state = load_file(folder / BEST / TRAINED)
    return Trained(
        state,
        curve,
        best,
        trainer.state.global_step,
        trainer.read_tokens,
        done.metrics["train_runtime"],
    )


def _way_on(folder: Path) -> str:
    """What a user can do after a loss that is not finite."""
    state = last_state(folder)
    if state is None:
        return "nothing was learnt yet; try a smaller --learning-rate or --precision float32"
    return (
        f"the state of {named(state)} is kept in {folder}: go on from it with"
        " --resume and a smaller --learning-rate"
    )


def _curve(logs: Sequence[dict[str, Any]]) -> list[Look]:
    """The trainer's log as records of one step each."""
    names = {"loss": "loss", "eval_loss": "held_out_loss", "eval_lm_loss": "held_out_lm_loss"}
    steps: dict[int, Look] = {}
    for log in logs:
        found = {names[key]: float(f"{value:.6g}") for key, value in log.items() if key in names}
        if found:
            steps.setdefault(int(log["step"]), {}).update(found)
    return [{"step": step, **steps[step]} for step in sorted(steps)]
