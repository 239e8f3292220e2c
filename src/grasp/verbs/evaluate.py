"""What a model is worth: perplexity, fidelity to the dense model, tasks and greedy text, each with
the protocol that made the number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedModel

from grasp.core.decoder import Decoder
from grasp.core.fields import IS_PATH
from grasp.core.models import open_model
from grasp.core.processes import joined
from grasp.core.progress import Progress, silent
from grasp.core.provenance import machine, versions
from grasp.core.records import Text
from grasp.core.results import Generation, Result, Results
from grasp.core.score import Score
from grasp.data.blocks import Blocks, blocks_of
from grasp.data.stream import check_lengths, check_vocabulary
from grasp.data.text import fields_of, read_text, sources
from grasp.errors import RecipeError
from grasp.evaluation.fidelity import check_same_tokens, fidelity
from grasp.evaluation.generation import agreement, check_room, continuations
from grasp.evaluation.leakage import leakage, trained_on
from grasp.evaluation.perplexity import perplexity
from grasp.evaluation.rows import manifest_of, number_formats, row
from grasp.evaluation.tasks import check_tasks, run_tasks, summarize
from grasp.recipes.evaluation import EvaluationRecipe
from grasp.recipes.keywords import keywords
from grasp.recipes.model import ModelSource

DEFAULT_SEQ_LEN = 2048
"""The block length of GPTQ's and SVD-LLM's protocol."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model, and of the dense one it was compared with."""

    result: Result
    dense: Result | None = None

    @property
    def scores(self) -> tuple[Score, ...]:
        """Every number about the model."""
        return self.result.scores

    def results(self) -> Results:
        """As a results file: the dense model first."""
        rows = (self.result,) if self.dense is None else (self.dense, self.result)
        return Results(
            rows, f"evaluation of {self.result.model}", " ".join(sys.argv), versions(), machine()
        )


@keywords
def evaluate(
    source: ModelSource,
    *,
    recipe: EvaluationRecipe,
    against: Annotated[str | Path | PreTrainedModel | Decoder, IS_PATH] | None = None,
    calibration: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure a model, and how close it stays to a dense one. Several processes that torchrun began
    share the blocks and the questions.

    Args:
        against: the dense model. Perplexities and tasks are measured of both, and KL(dense ||
            model), top-1 agreement and the perplexity ratio with bootstrap 95 % intervals; of
            tasks, the share of dense that is kept.
        calibration: what a model without a manifest was calibrated on (its manifest's entry, were
            it saved), for the leakage notes.

    Raises:
        GraspError: what a user can get wrong, before anything is measured; a non-finite block is an
            error, never skipped.
    """
    # a file may have a comma in its name
    names = (
        sources(",".join(recipe.ppl))
        if recipe.ppl
        else ([] if recipe.tasks or recipe.generate else ["pydoc"])
    )
    questions = _questions(recipe)
    decoder = open_model(**vars(source))
    cuts, texts = _cut(decoder, recipe, names)
    decoder.progress = progress
    beside = {**vars(source), "model": against, "tokenizer": None}
    reference = None if against is None else open_model(**beside)
    if reference is not None:
        check_same_tokens(decoder, reference)
    if recipe.generate:
        check_room(decoder, recipe.new_tokens)

    pair = _Pair(decoder, reference, progress, calibration or {})
    with joined():
        for blocks in cuts:
            pair.read(blocks)
        if recipe.tasks:
            pair.solve(recipe.tasks, batch_size=recipe.batch_size, **questions)
    if recipe.generate:
        pair.write(recipe.new_tokens)
    return pair.evaluation(texts)


def _questions(recipe: EvaluationRecipe) -> dict[str, Any]:
    """Which questions the tasks ask, as `run_tasks` takes it. Raises `RecipeError` or `DataError`
    for what cannot be asked.
    """
    folder = None if recipe.task_data is None else Path(os.path.expandvars(recipe.task_data))
    if folder is not None and not recipe.tasks:
        raise RecipeError(f"--task-data {folder}: name the tasks it holds with --tasks")
    asked: dict[str, Any] = {
        "task_data": folder,
        "limit": recipe.limit,
        "num_fewshot": recipe.num_fewshot,
    }
    check_tasks(recipe.tasks, **asked)
    return asked


def _cut(
    decoder: Decoder, recipe: EvaluationRecipe, names: list[str]
) -> tuple[list[Blocks], list[Text]]:
    """The texts to read, and each of them in blocks. Raises `DataError` for a length that the model
    does not read, and for a text that there is not.
    """
    longest = getattr(decoder.config, "max_position_embeddings", None) or DEFAULT_SEQ_LEN
    length = recipe.seq_len or min(DEFAULT_SEQ_LEN, longest)
    check_lengths(decoder, 1, length)
    fields = fields_of(names, recipe.text_field) if names else []
    if recipe.tasks or recipe.generate:
        check_vocabulary(decoder)
    texts = [
        read_text(name, split="test", text_field=field, tokenizer=decoder.tokenizer)
        for name, field in zip(names, fields, strict=True)
    ]
    options: dict[str, Any] = {
        "seq_len": length,
        "stride": recipe.stride,
        "num_blocks": recipe.num_blocks,
        "rolling_windows": recipe.rolling,
    }
    return [blocks_of(decoder, text, **options) for text in texts], texts


class _Pair:
    """A model, the dense one it is compared with (or None), and what was measured of each."""

    def __init__(
        self,
        decoder: Decoder,
        dense: Decoder | None,
        progress: Progress,
        calibration: Mapping[str, Any],
    ):
        self.decoder = decoder
        self.dense = dense
        self.progress = progress
        self.calibration = calibration
        self.mine: list[Score] = []
        self.theirs: list[Score] = []
        self.said: tuple[Generation, ...] = ()
        self.dense_said: tuple[Generation, ...] = ()

    def read(self, blocks: Blocks) -> None:
        """Perplexity, and fidelity to the dense model."""
        if self.dense is None:
            self.mine.append(perplexity(self.decoder, blocks, self.progress))
            return
        found = fidelity(self.decoder, self.dense, blocks, self.progress)
        self.mine += [found.model, found.divergence, found.agreement, found.ratio]
        self.theirs.append(found.dense)

    def solve(self, tasks: Sequence[str], **options: Any) -> None:
        """Tasks, their mean, and the share of the dense model's."""
        dense = None
        if self.dense is not None:
            dense = run_tasks(self.dense, tasks, progress=self._renamed(), **options)
            self.theirs += summarize(dense)
        self.mine += summarize(
            run_tasks(self.decoder, tasks, progress=self.progress, **options), dense
        )

    def write(self, new_tokens: int) -> None:
        """Greedy text."""
        self.said, scores = continuations(
            self.decoder, new_tokens=new_tokens, progress=self.progress
        )
        self.mine += scores
        if self.dense is not None:
            self.dense_said, scores = continuations(
                self.dense, new_tokens=new_tokens, progress=self._renamed()
            )
            self.theirs += scores
            self.mine.append(agreement(self.said, self.dense_said))

    def evaluation(self, texts: Sequence[Text]) -> Evaluation:
        """Both rows."""
        manifest = manifest_of(self.decoder.source)
        notes = leakage(
            self.calibration or manifest.get("calibration", {}), trained_on(manifest), texts
        ) + number_formats(self.decoder, self.dense)
        mine = row(self.decoder, self.dense, self.mine, self.said, notes)
        return Evaluation(
            mine,
            None if self.dense is None else row(self.dense, None, self.theirs, self.dense_said),
        )

    def _renamed(self) -> Progress:
        return lambda task, done, total: self.progress(f"{task}, dense", done, total)
