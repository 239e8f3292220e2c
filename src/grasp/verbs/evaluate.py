"""What a model is worth: perplexity, fidelity to the dense model, tasks and greedy text, each with
the protocol that made the number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from transformers import PreTrainedModel

from grasp.core.decoder import Decoder
from grasp.core.fields import (
    IS_PATH,
    BatchSize,
    Count,
    NumFewshot,
    NumTokens,
    PathLike,
    SeqLen,
    checked,
)
from grasp.core.models import open_model
from grasp.core.progress import Progress, silent
from grasp.core.provenance import machine, versions
from grasp.core.records import Text
from grasp.core.results import Generation, Result, Results
from grasp.core.score import Score
from grasp.data.blocks import Blocks, blocks_of
from grasp.data.calibration import check_lengths
from grasp.data.text import fields_of, read_text
from grasp.errors import RecipeError
from grasp.evaluation.fidelity import check_same_tokens, fidelity
from grasp.evaluation.generation import agreement, check_room, continuations
from grasp.evaluation.leakage import leakage, trained_on
from grasp.evaluation.perplexity import perplexity
from grasp.evaluation.rows import manifest_of, number_formats, row
from grasp.evaluation.tasks import check_tasks, run_tasks, summarize

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


@checked
def evaluate(
    model: Annotated[str | Path | PreTrainedModel | Decoder, IS_PATH],
    *,
    against: Annotated[str | Path | PreTrainedModel | Decoder, IS_PATH] | None = None,
    ppl: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    task_data: PathLike | None = None,
    limit: Count | None = None,
    num_fewshot: NumFewshot | None = None,
    batch_size: BatchSize = 8,
    generate: bool = False,
    new_tokens: NumTokens = 64,
    seq_len: SeqLen | None = None,
    stride: NumTokens | None = None,
    num_blocks: Count | None = None,
    rolling: bool = False,
    text_field: str | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    calibration: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure a model, and how close it stays to a dense one.

    Args:
        against: the dense model. Perplexities and tasks are measured of both, and KL(dense ||
            model), top-1 agreement and the perplexity ratio with bootstrap 95 % intervals; of
            tasks, the share of dense that is kept.
        ppl: texts (DATA; of a named set the test split). With neither `ppl` nor `tasks` nor
            `generate`: "pydoc".
        tasks: names that lm-eval knows, or "commonsense"; `task_data`: a folder of local data,
            `FOLDER/<task>/<split>.jsonl`.
        generate: greedy continuations of fixed prompts, `new_tokens` each.
        calibration: what a model without a manifest was calibrated on (its manifest's entry, were
            it saved), for the leakage notes.
        seq_len: None: 2048, or the longest the model reads. `stride`, `num_blocks`, `rolling`: see
            `grasp.evaluation.blocks`.

    Raises:
        GraspError: what a user can get wrong, before anything is measured; a non-finite block is an
            error, never skipped.
    """
    names = _names("--ppl", ppl) or ([] if tasks or generate else ["pydoc"])
    chosen = _names("--tasks", tasks)
    folder = None if task_data is None else Path(os.path.expandvars(task_data))
    if chosen:
        check_tasks(chosen, folder, num_fewshot=num_fewshot, limit=limit)
    elif folder is not None:
        raise RecipeError(f"--task-data {folder}: name the tasks it holds with --tasks")
    decoder = open_model(model, tokenizer, device, dtype, trust_remote_code)
    length = seq_len or min(
        DEFAULT_SEQ_LEN, getattr(decoder.config, "max_position_embeddings", None) or DEFAULT_SEQ_LEN
    )
    check_lengths(decoder, 1, length if seq_len is None else seq_len)
    fields = fields_of(names, text_field) if names else []
    decoder.progress = progress
    if chosen or generate:
        decoder.check_vocabulary()
    texts = [
        read_text(name, split="test", text_field=field, tokenizer=decoder.tokenizer)
        for name, field in zip(names, fields, strict=True)
    ]
    cuts = [
        blocks_of(
            decoder,
            text,
            seq_len=length,
            stride=stride,
            num_blocks=num_blocks,
            rolling_windows=rolling,
        )
        for text in texts
    ]
    reference = (
        None if against is None else open_model(against, None, device, dtype, trust_remote_code)
    )
    if reference is not None:
        check_same_tokens(decoder, reference)

    if generate:
        check_room(decoder, new_tokens)
    pair = _Pair(decoder, reference, progress, calibration or {})
    for blocks in cuts:
        pair.read(blocks)
    if chosen:
        pair.solve(
            chosen, task_data=folder, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size
        )
    if generate:
        pair.write(new_tokens)
    return pair.evaluation(texts)


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


def _names(flag: str, value: str | Iterable[str]) -> list[str]:
    """The names in a comma-separated list, or in any other."""
    names = (
        [name.strip() for name in value.split(",")]
        if isinstance(value, str)
        else [str(name) for name in value]
    )
    if "" in names and names != [""]:
        raise RecipeError(
            f"{flag} '{value}': an empty name in the list; write it like wikitext2,my.txt"
        )
    return [name for name in names if name]
