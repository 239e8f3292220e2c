"""benchmarks/low_rank_arena.py: our rows in the shape that LowRankArena's tables read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grasp.core.results import Result, Results
from grasp.core.score import Score

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "low_rank_arena.py"
TASKS = ("boolq", "arc_easy", "arc_challenge", "winogrande", "piqa", "hellaswag", "openbookqa")


@pytest.fixture
def written(tmp_path):
    harness = {"harness": "lm-eval 0.4.13", "num_fewshot": 0}
    scores = [Score(task, 0.1 * at, "acc", harness) for at, task in enumerate(TASKS)]
    scores += [Score(task, 0.2, "acc_norm", harness, 0.01) for task in ("piqa", "arc_easy")]
    text = Score("wikitext", 9.5, "perplexity", {"word_perplexity": 31.25, "seq_len": 2048})
    rows = (
        Result("ours ratio 0.2", "org/tiny", "grasp-fisher", {"ratio": 0.2}, 80, ratio=0.2,
               scores=(*scores, text)),
        Result("half", "org/tiny", "shortgpt", scores=tuple(scores[:3])),
    )  # fmt: skip
    Results(rows, "Arena", "grasp compare", {"grasp-llm": "0.1.0"}, {}, {}).write(
        tmp_path / "results.json"
    )
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "results.json", "-o", tmp_path / "arena"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done, tmp_path / "arena"


def test_a_suite_is_a_file_and_its_mean_is_of_the_preferred_metrics(written):
    done, place = written
    assert done.returncode == 0, done.stderr
    assert sorted(one.name for one in place.iterdir()) == [
        "mcq__tiny-ours-ratio-0.2.json",
        "ppl__tiny-ours-ratio-0.2.json",
    ]
    found = json.loads((place / "mcq__tiny-ours-ratio-0.2.json").read_text())
    assert found["metrics"]["mean"] == pytest.approx((0 + 0.2 + 0.2 + 0.3 + 0.2 + 0.5 + 0.6) / 7)
    assert found["details"]["tasks"]["piqa"]["metric"] == "acc_norm"
    assert found["details"]["tasks"]["boolq"]["metric"] == "acc"
    assert found["checkpoint"]["variant"] == "keep_0.8"
    assert found["backend"] == {"name": "lm_eval_harness", "version": "0.4.13"}
    text = json.loads((place / "ppl__tiny-ours-ratio-0.2.json").read_text())
    assert text["metrics"]["mean"] == 31.25 and text["backend"]["name"] == "grasp eval"


def test_a_row_that_lacks_a_task_is_left_out_and_named(written):
    done, _ = written
    assert "half: no mcq, for it lacks winogrande, piqa, hellaswag, openbookqa" in done.stdout
