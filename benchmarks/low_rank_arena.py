"""Result files as LowRankArena has them (github.com/Zishan-Shao/lowrankarena, its schema 1.0), from
one of ours: a file for every model and suite.

    DATA=FOLDER grasp compare experiments/low-rank-arena.toml -o results/low-rank-arena.json
    python benchmarks/low_rank_arena.py results/low-rank-arena.json -o arena

Its protocol: seven multiple-choice tasks of lm-eval without examples (`acc_norm`, else `acc`), and
rolling word perplexity of wikitext, at kept shares of 0.8 and 0.6. A suite of which a row lacks a
task is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any

from grasp.core.results import Result, Results
from grasp.core.score import Score

SUITES = {
    "mcq": (
        ("boolq", "arc_easy", "arc_challenge", "winogrande", "piqa", "hellaswag", "openbookqa"),
        ("acc_norm", "acc"),
    ),
    "ppl": (("wikitext",), ("word_perplexity",)),
}
"""Suite -> its tasks, and their metrics, the first that a task has."""


def chosen(row: Result, task: str, metrics: tuple[str, ...]) -> Score | None:
    """The score of a task that its suite goes by; a text measured with --rolling is the task of its
    name.
    """
    for metric in metrics:
        for score in row.scores:
            if score.name == task and score.unit == metric:
                return score
            if score.name == task and score.unit == "perplexity" and metric in score.protocol:
                value = float(score.protocol[metric])
                return Score(task, value, metric, score.protocol)
    return None


def payload(row: Result, suite: str, found: dict[str, Score], results: Results) -> dict[str, Any]:
    """One result file."""
    _, metrics = SUITES[suite]
    keep = None if row.ratio is None else round(1 - row.ratio, 4)
    tasks = {
        task: {
            "metric": score.unit,
            "metric_key": f"{score.unit},none",
            "filter": "none",
            "value": score.value,
            "stderr": score.stderr,
            "available_metrics": [one.unit for one in row.scores if one.name == task],
        }
        for task, score in found.items()
    }
    harness = "".join(sorted({str(one.protocol.get("harness", "")) for one in found.values()}))
    return {
        "schema_version": "1.0",
        "kind": "eval",
        "status": "completed",
        "generated_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": {
            "name": name_of(row),
            "locator": row.model,
            "model_family": Path(row.model).name,
            "variant": "dense" if keep in (None, 1.0) else f"keep_{keep}",
            "method": row.method,
            "source": "local",
            "repo_id": None,
            "revision": None,
            "subpath": None,
            "benchmarks": ["main"],
            "enabled": True,
            "notes": "; ".join(row.notes),
        },
        "suite": {"id": suite, "path": f"accuracy/{suite}", "name": suite},
        "backend": {
            "name": "lm_eval_harness" if harness else "grasp eval",
            "version": harness.removeprefix("lm-eval ") or results.versions.get("grasp-llm"),
        },
        "config": {"fields": dict(row.fields), "command": results.command, "num_fewshot": 0},
        "metrics": {
            "primary_metric": metrics[0],
            "mean": sum(score.value for score in found.values()) / len(found),
            "task_count": len(found),
            "scored_task_count": len(found),
        },
        "artifacts": {},
        "runtime": {"seconds": dict(row.seconds), "peak_memory": row.peak_memory},
        "details": {"tasks": tasks, "parameters": row.parameters, "keep_ratio": keep},
    }


def name_of(row: Result) -> str:
    """The model's name in a file name."""
    return re.sub(r"[^\w.*-]+", "-", f"{Path(row.model).name}-{row.label}").strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("arena"))
    arguments = parser.parse_args()
    results = Results.read(arguments.results)
    arguments.output.mkdir(parents=True, exist_ok=True)
    written = 0
    for row in results.rows:
        for suite, (tasks, metrics) in SUITES.items():
            scores = {task: chosen(row, task, metrics) for task in tasks}
            found = {task: score for task, score in scores.items() if score is not None}
            if missing := [task for task in tasks if task not in found]:
                print(f"{row.label}: no {suite}, for it lacks {', '.join(missing)}")
                continue
            place = arguments.output / f"{suite}__{name_of(row)}.json"
            place.write_text(json.dumps(payload(row, suite, found, results), indent=2) + "\n")
            written += 1
    print(f"{written} files in {arguments.output}")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
