"""From lm-eval's table of results to `Score`s, and from those to the mean over tasks and the share
of the dense model's mean.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from grasp.core.score import Score
from grasp.errors import RecipeError

logger = logging.getLogger(__name__)

IN_THE_MEAN = ("acc_ppl", "acc_norm", "acc")
"""The metric of a task that enters the mean: the first of these it has, else its first one where
more is better and 1 the most.
"""
SAME_QUESTIONS = ("num_fewshot", "limit", "num_examples", "version", "filter")
"""What must agree in the protocols of two scores before one is divided by the other."""


def scores_of(found: Mapping[str, Any], name: str, protocol: Mapping[str, Any]) -> list[Score]:
    """The scores of one run of lm-eval: the task's, or the group's and then those of its tasks,
    which say their `group`.

    `found`: what `lm_eval.evaluator.evaluate` returns. Metrics without a value are left out.
    """
    scores = []
    parts = list(found["results"])
    has_own = any("," in key for key in found["results"].get(name, {}))
    for part in sorted(parts, key=lambda part: part != name):
        row = found["results"][part]
        keys = [key for key in row if "," in key and not key.partition(",")[0].endswith("_stderr")]
        filters = {key.partition(",")[2] for key in keys}
        for key in keys:
            metric, _, chosen = key.partition(",")
            if not _is_number(row[key]):
                logger.warning("%s: lm-eval found no value for %s", part, metric)
                continue
            error = row.get(f"{metric}_stderr,{chosen}")
            more: dict[str, Any] = {
                "num_fewshot": found["n-shot"].get(part),
                "num_examples": (
                    found["n-samples"][part]["effective"]
                    if part in found["n-samples"]
                    else row.get("sample_len")
                ),
                "version": found["versions"].get(part),
            }
            if len(filters) > 1:
                more["filter"] = chosen
            if found["higher_is_better"].get(part, {}).get(metric) is False:
                more["lower_is_better"] = True
            if part != name and has_own:
                more["group"] = name
            scores.append(
                Score(
                    part,
                    float(row[key]),
                    metric,
                    {**protocol, **more},
                    float(error) if _is_number(error) else None,
                )
            )
    return scores


def _is_number(value: Any) -> bool:
    """lm-eval writes "N/A" or a blank where it has no number."""
    return not isinstance(value, (str, bool, type(None))) and math.isfinite(value)


def summarize(scores: Sequence[Score], dense: Sequence[Score] | None = None) -> tuple[Score, ...]:
    """The scores, then their mean over tasks, then the share of the dense model's mean where
    `dense` scores are given.

    A group counts as one task, and its parts do not count again. The standard error of the mean is
    sqrt(sum of squares) / number of tasks. That of the share takes the two means as independent
    (delta method). Both models answered the same questions, and mostly get the same ones right, so
    the true error is smaller: it is an upper bound.

    Raises `RecipeError` where the dense model was asked other questions.
    """
    chosen = _in_the_mean(scores)
    if not chosen:
        return tuple(scores)
    protocol = {
        "harness": chosen[0].protocol["harness"],
        "num_tasks": len(chosen),
        "metrics": {score.name: score.unit for score in chosen},
    }
    mean = _mean(chosen, protocol)
    if dense is None:
        return (*scores, mean)
    whole = _mean([_counterpart(score, dense) for score in chosen], protocol)
    if whole.value == 0:
        logger.warning("the dense model's mean over tasks is 0; there is no share of it")
        return (*scores, mean)
    share = mean.value / whole.value
    error = None
    if mean.stderr is not None and whole.stderr is not None:
        error = math.hypot(mean.stderr, share * whole.stderr) / whole.value
    more = {
        "dense_mean": whole.value,
        "stderr_is": "an upper bound: both means taken as independent",
    }
    return (*scores, mean, Score("mean", share, "share of dense", {**protocol, **more}, error))


def _in_the_mean(scores: Sequence[Score]) -> list[Score]:
    """One score a task, in the order of the tasks."""
    by_task: dict[str, list[Score]] = {}
    for score in scores:
        usable = 0 <= score.value <= 1 and not score.protocol.get("lower_is_better")
        if (
            str(score.protocol.get("harness", "")).startswith("lm-eval")
            and score.name != "mean"
            and "group" not in score.protocol
            and usable
        ):
            by_task.setdefault(score.name, []).append(score)
    return [
        min(
            found,
            key=lambda s: IN_THE_MEAN.index(s.unit) if s.unit in IN_THE_MEAN else len(IN_THE_MEAN),
        )
        for found in by_task.values()
    ]


def _mean(chosen: Sequence[Score], protocol: Mapping[str, Any]) -> Score:
    errors = [score.stderr for score in chosen if score.stderr is not None]
    error = math.hypot(*errors) / len(chosen) if len(errors) == len(chosen) else None
    return Score(
        "mean", sum(score.value for score in chosen) / len(chosen), "mean of tasks", protocol, error
    )


def _counterpart(score: Score, dense: Sequence[Score]) -> Score:
    """The dense model's score on the same questions. Raises `RecipeError`."""
    same = [other for other in dense if (other.name, other.unit) == (score.name, score.unit)]
    for other in same:
        if all(other.protocol.get(key) == score.protocol.get(key) for key in SAME_QUESTIONS):
            return other
    difference = "was asked other questions" if same else "was not asked"
    raise RecipeError(
        f"--against: the dense model {difference} in {score.name} ({score.unit}); run both with the"
        " same --tasks, --num-fewshot and --limit"
    )
