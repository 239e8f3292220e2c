"""What grasp adds around lm-eval's tasks: every question made once before the model runs, a look at
every answer, and what our tasks change in them.

lm-eval's tasks and its wrapper of the model come as arguments: nothing here imports lm-eval.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from grasp.core.progress import Progress
from grasp.errors import DataError, NumericsError, RecipeError
from grasp.evaluation.longbench import cut_in_the_middle
from grasp.evaluation.perplexity_mode import add_perplexity_mode, is_perplexity_mode

logger = logging.getLogger(__name__)


def try_out(task: Any, name: str, limit: int | None, files: Sequence[Path]) -> None:
    """Make every prompt, option and answer once, so that a row which cannot be asked is found
    before the model runs.
    """
    where, number, astray = ", ".join(map(str, files)), 0, 0
    for number, row in enumerate(itertools.islice(task.eval_docs, limit), 1):
        try:
            text, answer = task.doc_to_text(row), task.doc_to_target(row)
            options = task.doc_to_choice(row) if task.config.doc_to_choice is not None else None
            right = _as_list(text if task.multiple_input else answer)
            astray += options is not None and not any(
                one in options if isinstance(one, str) else 0 <= one < len(options) for one in right
            )
        except Exception as failure:
            # a template or a function of lm-eval on a row it was not made for
            raise DataError(
                f"{where}, question {number}: {name} cannot be asked: {one_line(failure)}"
            ) from failure
    if number and astray == number:
        raise DataError(
            f"{where}: no answer is among the options of its question; {name} reads other labels,"
            " see its data set on the hub"
        )
    if astray:
        logger.warning(
            "%s: %d of %d answers are not among the options; lm-eval counts them as wrong",
            name,
            astray,
            number,
        )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def one_line(failure: Exception) -> str:
    """An exception in one short line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"


class Answers:
    """Told of every answer as it comes (lm-eval offers this place to its cache): reports progress,
    counts prompts that were cut, and stops at a log-likelihood that is not finite, since the
    largest of such numbers means nothing.

    `harness`: lm-eval's wrapper of the model; `tasks`: lm-eval's tasks, whose questions are made
    just before the first answer.
    """

    def __init__(self, name: str, tasks: Iterable[Any], harness: Any, progress: Progress):
        self.name, self.tasks, self.harness, self.progress = name, list(tasks), harness, progress
        self.done = self.num_cut = 0
        progress(f"task {name}", 0, 1)

    def add_partial(self, kind: str, request: tuple[Any, ...], answer: Any) -> None:
        """lm-eval's call: `request` is (context, continuation), (context, generation settings) or
        (text,).
        """
        length = self.harness.max_length
        if kind == "loglikelihood":
            self._check(answer[0])
            start = not request[0]  # lm-eval puts a token in front of a text without context
            # the last token is not read
            self.num_cut += len(self.harness.tok_encode("".join(request))) + start > length + 1
        elif kind == "generate_until":
            self.num_cut += len(self.harness.tok_encode(request[0])) > length - generated(
                request[1], self.harness
            )
        else:
            self._check(answer)
        self.done += 1
        self.progress(
            f"task {self.name}",
            self.done,
            sum(len(task.instances) * task.config.repeats for task in self.tasks),
        )

    def _check(self, value: float) -> None:
        if not math.isfinite(value):
            raise NumericsError(
                f"{self.name}: a log-likelihood is {value} (dtype {self.harness.model.dtype}); the"
                " answer would mean nothing; try --dtype float32"
            )


def generated(settings: dict[str, Any], harness: Any) -> int:
    """The most tokens that lm-eval lets the model write."""
    given = (
        settings.get(name)
        for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    )
    return int(next((value for value in given if value is not None), harness.max_gen_toks))


def fit_to_model(task: Any, name: str, harness: Any) -> None:
    """Raise `RecipeError` where a task asks for answers as long as all that the model reads; give
    our tasks their prompts and their metric.
    """
    if task.OUTPUT_TYPE == "generate_until":
        wanted = generated(task.config.generation_kwargs or {}, harness)
        if wanted >= harness.max_length:
            raise RecipeError(
                f"--tasks {name}: asks for answers of {wanted} tokens, and the model reads"
                f" {harness.max_length} in all"
            )
        if (task.config.metadata or {}).get("cut") == "middle":
            cut_in_the_middle(task, harness, harness.max_length - wanted)
    if is_perplexity_mode(task):
        add_perplexity_mode(task, harness)


def no_bar(*arguments: Any, **options: Any) -> Any:
    """In the place of `tqdm`: a bar that shows nothing."""
    return importlib.import_module("tqdm").tqdm(*arguments, **{**options, "disable": True})


def bootstrap_error(
    metric: Callable[[Sequence[Any]], float], items: Sequence[Any], iters: int
) -> float:
    """In the place of lm-eval's `bootstrap_stderr`, which starts a process a core: the spread of
    the metric over resamples.
    """
    draw = random.Random(0)
    return statistics.stdev(metric(draw.choices(items, k=len(items))) for _ in range(iters))
