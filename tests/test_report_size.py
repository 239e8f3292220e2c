"""A results file or manifest of any size makes a page that opens, and the page says what it left
out.
"""

import json

import pytest
from test_report import Quiet

from grasp.core.results import Generation, Result, Results
from grasp.core.score import Score
from grasp.report import html
from grasp.report.bounds import BUDGET, bounded
from grasp.report.html import write_report
from grasp.report.reading import Checkpoint

LARGE = "word and word again " * 150_000
BLOATED = {
    "generation": Result(
        "a", "m", generations=(Generation("Say", LARGE, 9), Generation("Go", LARGE, 9))
    ),
    "prompt": Result(
        "a", "m", generations=(Generation(LARGE, "x", 9), Generation(LARGE + "2", "x", 9))
    ),
    "note": Result("a", "m", notes=(LARGE, LARGE, LARGE)),
    "error": Result("a", "m", error=LARGE * 3),
    "protocol": Result(
        "a",
        "m",
        scores=(Score("text", 3.0, "perplexity", {"files": [LARGE], LARGE: LARGE, "join": LARGE}),),
    ),
    "fields": Result("a", LARGE, "grasp", {"x": LARGE, "y": {LARGE: 1}}),
    "label": Result(LARGE, "m", LARGE),
}


@pytest.mark.parametrize("what", BLOATED)
def test_a_large_file_makes_a_page_that_opens(what, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "Runtime", Quiet)
    Results((BLOATED[what],), "large").write(tmp_path / "results.json")
    assert (tmp_path / "results.json").stat().st_size > 1.4 * BUDGET
    page = write_report([tmp_path / "results.json"], tmp_path / "page.html")
    assert page.stat().st_size < BUDGET / 2
    assert "the file is large" in page.read_text(encoding="utf-8")


def test_many_rows_are_shown_in_part():
    many = Results(tuple(Result(f"row {number}", "m" * 2_000) for number in range(9_000)))
    shown = bounded(many)
    assert 0 < len(shown.rows) <= 2_000 and "9,000 rows" in shown.about["shown"]


def test_what_is_small_is_shown_as_it_is():
    small = Results(
        (Result("a", "m", generations=(Generation("Say", "x" * 30_000, 9),)),),
        "small",
        about={"x": 1},
    )
    assert bounded(small) is small


def test_a_manifest_with_a_large_text_is_cut(tmp_path):
    manifest = {
        "format_version": 3,
        "model": {"source": "m", "family": "Llama", "num_layers": 2, "dtype": "float32"},
        "parameters": {"before": 9, "after": 8, "ratio": 0.1},
        "edits": [],
        "method": {"name": "grasp", "paper": ""},
        "recipe": {"model": LARGE},
        "versions": {"x": LARGE},
    }
    (tmp_path / "grasp.json").write_text(json.dumps(manifest))
    assert len(json.dumps(Checkpoint.read(tmp_path).raw)) < 20_000
