"""Names of tasks: bundles of ours, and lm-eval's tags and groups taken apart; and which tasks are
not asked at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from grasp.errors import RecipeError, did_you_mean

VERSION = "0.4.13"
BUNDLES = {
    "commonsense": (
        "openbookqa",
        "arc_easy",
        "winogrande",
        "hellaswag",
        "arc_challenge",
        "piqa",
        "mathqa",
    ),
    "opencompass-ppl": (
        "c3",
        "cmnli",
        "chid",
        "boolq_ppl",
        "wsc_ppl",
        "commonsense_qa_ppl",
        "hellaswag_ppl",
        "piqa_ppl",
        "race_middle_ppl",
        "race_high_ppl",
        "mmlu_ppl",
        "cmmlu_ppl",
    ),
}
"""Sets of the paper's tables: its seven commonsense tasks, and its twelve in perplexity mode in the
order of the table, whose "CoQA" is CommonsenseQA.
"""


def refuse(name: str, config: Mapping[str, Any]) -> None:
    """Raise `RecipeError` for tasks that lm-eval itself runs on request only, or not with a
    language model.
    """
    for key, what in (
        ("unsafe_code", "runs programs that the model writes"),
        ("doc_to_image", "shows pictures"),
        ("doc_to_audio", "plays sound"),
    ):
        if config.get(key):
            raise RecipeError(
                f"--tasks {name}: {what}, which grasp does not do; choose another task"
            )


def names_of(tasks: Sequence[str], index: Mapping[str, Any]) -> list[str]:
    """Names of tasks and groups, each once; bundles and lm-eval's tags are taken apart. `index`:
    lm-eval's entries by name. Raises `RecipeError`.
    """
    asked = [
        name.strip()
        for name in (tasks.split(",") if isinstance(tasks, str) else tasks)
        if name.strip()
    ]
    if not asked:
        raise RecipeError(
            "--tasks: names no task; for example --tasks arc_easy,piqa or --tasks commonsense"
        )
    names: list[str] = []
    for name in asked:
        if name not in index and name not in BUNDLES:
            raise RecipeError(
                f"--tasks {name}: unknown to lm-eval {VERSION}; allowed: its tasks,"
                f" {', '.join(BUNDLES)}{did_you_mean(name, [*BUNDLES, *index])}"
            )
        is_tag = name in index and index[name].kind.name == "TAG"
        names += BUNDLES.get(name) or (sorted(index[name].tags) if is_tag else [name])
    return list(dict.fromkeys(names))


def leaves(name: str, index: Mapping[str, Any]) -> list[str]:
    """The tasks in a group, or the task itself."""
    entry = index.get(name)
    if entry is None:
        raise RecipeError(
            f"--tasks {name}: defined inside a group of lm-eval, which --task-data cannot reach;"
            " name tasks one by one"
        )
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    parts = [
        part if isinstance(part, str) else part.get("group") or part["task"]
        for part in entry.cfg["task"]
    ]
    return list(dict.fromkeys(itertools.chain.from_iterable(leaves(part, index) for part in parts)))
