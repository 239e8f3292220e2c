"""Results files: what is written is what is read, and a file that is something else is refused in
one line.
"""

import json

import pytest

from grasp.core.results import Generation, Result, Results
from grasp.core.score import Score
from grasp.errors import CheckpointError

ROW = Result(
    "small",
    "path/small",
    "grasp",
    {"layers": [1, 2]},
    100,
    400,
    0.2,
    (
        Score("text", 3.0, "perplexity", {"seq_len": 8}),
        Score("arc", 0.5, "acc", {"n": 4}, 0.1, (0.3, 0.7)),
    ),
    (Generation("a", "b", 1, 0.5, True),),
    {"load": 1.0},
    7,
    ("calibrated on it",),
)


def test_a_file_is_read_as_it_was_written(tmp_path):
    written = Results(
        (ROW, Result("broken", "x", error="out of memory")),
        "t",
        "grasp eval",
        {"torch": "2"},
        {"cpu": "x"},
        {"seed": 0},
    )
    written.write(tmp_path / "r.json")
    assert Results.read(tmp_path / "r.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_scores_are_found_by_unit_and_name():
    assert ROW.score("acc").value == 0.5
    assert ROW.score("acc", "arc").interval == (0.3, 0.7)
    assert ROW.score("acc", "other") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"kind": "other"}',
        '{"kind": "grasp-results", "format_version": 1, "rows": [{"label": "a"}]}',
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"r\.json"):
        Results.read(path)


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"kind": "grasp-results", "format_version": 99, "rows": []}))
    with pytest.raises(CheckpointError, match="newer"):
        Results.read(path)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        Results((ROW,)).write(tmp_path / "r.json" / ".." / ("x" * 300))
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "r.json"])
