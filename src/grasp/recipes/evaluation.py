"""What is measured of a model, and the protocol that makes the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grasp.core.fields import (
    BatchSize,
    Count,
    NumFewshot,
    NumTokens,
    PathLike,
    SeqLen,
    flag,
)
from grasp.recipes.calibration import COLUMN
from grasp.recipes.part import Part


@dataclass(frozen=True, kw_only=True)
class EvaluationRecipe(Part):
    """Of a model alone; the dense one it is compared with is named beside it."""

    title: ClassVar[str] = "Measures"

    ppl: tuple[str, ...] = flag(
        (),
        "Texts, separated by commas: named sets (their test split), files, or NAME=PATH for a local"
        " copy of a named set. Default, alone: pydoc.",
        metavar="DATA,...",
    )
    tasks: tuple[str, ...] = flag(
        (),
        "Tasks that lm-eval knows, or the paper's: commonsense (seven), opencompass-ppl (twelve).",
        metavar="TASK,...",
    )
    task_data: PathLike | None = flag(
        None,
        "Local data for the tasks: FOLDER/<task>/<split>.jsonl[.gz] or FOLDER/<task>.jsonl.",
        metavar="FOLDER",
    )
    limit: Count | None = flag(None, "Only the first so many examples of a task.")
    num_fewshot: NumFewshot | None = flag(
        None, "Examples shown before each question; default: the task's own."
    )
    batch_size: BatchSize = flag(8, "Requests of tasks run at once.")
    generate: bool = flag(
        False, "Greedy continuations of fixed prompts, with how much they repeat themselves."
    )
    new_tokens: NumTokens = flag(64, "Tokens of each continuation.")
    seq_len: SeqLen | None = flag(
        None, "Tokens in a block; default: 2048, or the longest the model reads."
    )
    stride: NumTokens | None = flag(None, "Step between blocks; default: --seq-len, no overlap.")
    num_blocks: Count | None = flag(None, "Only the first so many blocks; default: all.")
    rolling: bool = flag(False, "Every token of every document counts, as in lm-eval's wikitext.")
    text_field: str | None = flag(None, COLUMN)
