"""Hugging Face's `Trainer`, told what to minimise, how to keep its state without pickle, and to
stop at the first loss that is not finite.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from grasp.compensation.objectives import LanguageModel, Objective
from grasp.compensation.state import (
    TRAINED,
    last_state,
    load_optimizer,
    load_random,
    load_trained,
    save_optimizer,
    save_random,
    trained_state,
)
from grasp.core.progress import Progress
from grasp.data.rows import IGNORED, Collate, TrainingData, read_by_model
from grasp.errors import CheckpointError, NumericsError, RecipeError

logger = logging.getLogger(__name__)

BEST = "best"


class Compensation(Trainer):
    """Trains the marked parameters of `model` on `data` towards `objective`. `model_dtype`
    bfloat16: products in bfloat16 (autocast).
    """

    # compute_loss divides by the asked tokens of the whole batch, all its parts and all processes
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data: TrainingData,
        objective: Objective,
        collate: Collate,
        *,
        dtype: torch.dtype,
        progress: Progress,
    ):
        self.objective, self.dtype, self.read_tokens = objective, dtype, 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            data_collator=collate,
            callbacks=[Shown(self, progress)],
        )
        self.remove_callback(PrinterCallback)
        # so that the trainer counts the labels of the whole batch
        self.model_accepts_loss_kwargs = True

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate leaves sharding out where the processes are CPU ones; it works there all the
        same.
        """
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:  # type: ignore[has-type]
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in the run's precision."""
        return (
            nullcontext()
            if self.dtype == torch.float32
            else torch.autocast(self.args.device.type, self.dtype)
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's mean over the asked tokens of the whole batch. Raises `NumericsError`
        naming the step.
        """
        assert num_items_in_batch is not None
        with self.autocast():
            total = self.objective(model, read_by_model(inputs), inputs["labels"], inputs["row"])
        step = self.state.global_step + 1
        if not bool(torch.isfinite(total)):
            raise NumericsError(f"step {step}: the loss is {float(total.detach())}")
        self.read_tokens += int(inputs["length"].sum()) * self.accelerator.num_processes
        # gradients are averaged over processes, and num_items_in_batch is their sum already
        return total / num_items_in_batch * self.accelerator.num_processes

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean objective and mean cross-entropy of the answers over the held-out rows; the best
        state so far is kept.
        """
        self.model.eval()
        lm, sums = LanguageModel(), []
        same = isinstance(self.objective, LanguageModel)
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(batch)
            for row in range(len(inputs["row"])):
                one = {
                    name: (
                        value[row : row + 1, : int(inputs["length"][row])]
                        if value.dim() > 1
                        else value[row : row + 1]
                    )
                    for name, value in inputs.items()
                }
                with self.autocast():
                    answers = lm(self.model, read_by_model(one), one["answers"], one["row"])
                    total = (
                        answers
                        if same
                        else self.objective(
                            self.model, read_by_model(one), one["labels"], one["row"]
                        )
                    )
                counts = [(one[name][:, 1:] != IGNORED).sum() for name in ("labels", "answers")]
                sums.append(
                    torch.stack(
                        [total.double(), counts[0].double(), answers.double(), counts[1].double()]
                    )[None]
                )
        objective, asked, answers, answered = (
            self.accelerator.gather_for_metrics(torch.cat(sums)).sum(0).tolist()
        )
        found = {"eval_loss": objective / asked, "eval_lm_loss": answers / max(answered, 1)}
        if not math.isfinite(found["eval_loss"]):
            raise NumericsError(
                f"step {self.state.global_step}: the held-out loss is {found['eval_loss']}"
            )
        self.log(found)
        self._keep_best(found)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, found
        )
        return found

    def _keep_best(self, found: dict[str, float]) -> None:
        """A copy of what is trained, where the held-out loss is lower than ever."""
        folder = Path(self.args.output_dir) / BEST
        note = folder / "best.json"
        before = (
            json.loads(note.read_text(encoding="utf-8"))["eval_loss"]
            if note.is_file()
            else math.inf
        )
        if self.args.world_size > 1:
            self.accelerator.wait_for_everyone()
        if found["eval_loss"] >= before:
            return
        state = trained_state(self.model)
        if self.args.should_save:
            with said_plainly(Path(self.args.output_dir), self.state.global_step):
                scratch = folder.with_name(f"{BEST}.new")
                scratch.mkdir(parents=True, exist_ok=True)
                save_file(state, scratch / TRAINED)
                (scratch / note.name).write_text(
                    json.dumps({"step": self.state.global_step, **found}), encoding="utf-8"
                )
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(scratch, folder)
        self.accelerator.wait_for_everyone()

    # The state: see grasp.compensation.state. These replace the trainer's own, which pickle.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with said_plainly(Path(self.args.output_dir), self.state.global_step):
            super()._save_checkpoint(model, trial)
            newest = last_state(Path(self.args.output_dir))
            for older in (
                Path(self.args.output_dir).glob("checkpoint-*") if self.args.should_save else ()
            ):
                if older != newest:
                    shutil.rmtree(older)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, as one file."""
        folder = Path(output_dir or self.args.output_dir)
        state = trained_state(self.model)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / TRAINED)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_trained(self.model if model is None else model, Path(resume_from_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        schedule = {
            name: value
            for name, value in self.lr_scheduler.state_dict().items()
            if name != "lr_lambdas"
        }
        save_optimizer(
            self.model, self._inner_optimizer(), schedule, Path(output_dir), self.args.should_save
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            schedule = load_optimizer(self.model, self._inner_optimizer(), Path(checkpoint))
            self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **schedule})

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        found: Any = self.optimizer
        # under accelerate's wrapper, whose step() may skip
        return getattr(found, "optimizer", found)

    def _save_rng_state(self, output_dir: str) -> None:
        save_random(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random(Path(checkpoint), self.args.process_index)

    def _save_scaler(self, output_dir: str) -> None:
        """There is none: bfloat16 needs no loss scaling, float16 is not offered."""


@contextmanager
def said_plainly(run: Path, step: int) -> Iterator[None]:
    """Turns a failure to write into one line that says what is kept in the folder of the run."""
    try:
        yield
    except (OSError, SafetensorError) as failure:
        kept = "those before it are kept: make room and go on with --resume"
        said = (
            kept
            if last_state(run) is not None
            else "nothing was left behind: make room and begin again"
        )
        raise CheckpointError(
            f"{run}: the state of step {step} cannot be written: {failure}; {said}"
        ) from failure


class Shown(TrainerCallback):
    """Progress: the step, the latest losses, tokens a second (the bar adds the time left)."""

    WORDS: ClassVar = {"loss": "loss", "eval_loss": "held out"}

    def __init__(self, trainer: Compensation, progress: Progress):
        self.trainer = trainer
        self.progress = progress
        self.latest = dict[str, str]()
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.fsdp and not isinstance(self.trainer.model, FSDPModule):
            raise RecipeError(
                "--fsdp: accelerate did not shard the model; leave --fsdp out, or use another"
                " release of accelerate"
            )
        self.began = time.perf_counter()
        self._show(state)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        new = {
            word: f"{word} {logs[name]:.3f}"
            for name, word in self.WORDS.items()
            if logs and name in logs
        }
        self.latest.update(new)
        if new and state.is_world_process_zero:
            # for those who read the output in a file
            level = logging.INFO if "eval_loss" in (logs or {}) else logging.DEBUG
            logger.log(
                level,
                "step %d of %d: %s",
                state.global_step,
                state.max_steps,
                ", ".join(self.latest.values()),
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._show(state)

    def _show(self, state: Any) -> None:
        if state.is_world_process_zero:
            speed = self.trainer.read_tokens / max(time.perf_counter() - self.began, 1e-9)
            said = [
                *self.latest.values(),
                *([f"{speed:,.0f} tokens/s".replace(",", " ")] if self.trainer.read_tokens else []),
            ]
            self.progress(", ".join(["training", *said]), state.global_step, state.max_steps)
