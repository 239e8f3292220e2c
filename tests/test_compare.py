"""`grasp compare`: what the file may say, cells that are run once, failures that are rows, an
interruption that loses nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import command

from grasp.core.results import Results
from grasp.errors import RecipeError
from grasp.recipes.experiment import read_experiment
from grasp.verbs import compare as comparison

BASE = """
title = "Sizes"
model = {model!r}
[calibration]
data = {text!r}
num_samples = 2
seq_len = 16
[evaluation]
ppl = [{text!r}]
seq_len = 32
num_blocks = 2
"""
TWO = """
[[methods]]
method = "shortgpt"
num_layers = 1
[[methods]]
method = "grasp"
num_layers = 1
retain_ratio = 0.5
"""


@pytest.fixture
def write(tmp_path, model_directory, text_file):
    """`write(text)`: an experiment on the tiny model, with these methods."""

    def made(methods: str, base: str = BASE) -> Path:
        path = tmp_path / "sizes.toml"
        path.write_text(base.format(model=model_directory, text=text_file) + methods)
        return path

    return made


def here(experiment, output, monkeypatch, **options):
    """`compare` with the cells run in this process. Returns the results and the labels of the cells
    that ran.
    """
    ran = []

    def run(_path, cell, _quiet):
        ran.append(cell.label)
        return comparison.run_cell(cell)

    monkeypatch.setattr(comparison, "_run_apart", run)
    return comparison.compare(read_experiment(experiment), output, **options), ran


# --- the file


def test_a_sweep_is_one_cell_for_every_combination(write):
    cells = read_experiment(
        write(
            '[[methods]]\nmethod = "grasp"\nnum_layers = 1\n[methods.sweep]\nretain_ratio = [0.1,'
            " 0.2]\nnum_samples = [2, 4]\n"
        )
    ).cells
    assert [cell.label for cell in cells] == [
        "dense",
        *(f"grasp retain_ratio {r}, num_samples {n}" for r in (0.1, 0.2) for n in (2, 4)),
    ]
    assert [cell.calibration["num_samples"] for cell in cells[1:]] == [2, 4, 2, 4]
    assert all("num_samples" not in cell.fields for cell in cells)
    assert len({cell.key for cell in cells}) == 5


def test_a_default_that_is_named_is_the_same_cell(write):
    plain = '[[methods]]\nmethod = "grasp"\nnum_layers = 1\n'
    named = 'score = "taylor"\niterative = false\nseed = 0\n'
    assert [cell.key for cell in read_experiment(write(plain)).cells] == [
        cell.key for cell in read_experiment(write(plain + named)).cells
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "num_samples = 2",
            "num_sample = 2",
            ["[calibration]", "num_sample", "did you mean 'num_samples'"],
        ),
        ("num_samples = 2", 'num_samples = "two"', ["num_samples = two", "must be a whole number"]),
        ("seq_len = 32", "seq_len = true", ["[evaluation]", "seq_len = True"]),
        ('title = "Sizes"', 'titel = "Sizes"', ["titel", "did you mean 'title'"]),
        (
            'method = "grasp"',
            'method = "grasps"',
            ["methods table 2", "grasps", "did you mean 'grasp'"],
        ),
        ("retain_ratio = 0.5", "retain_ratio = 5", ["methods table 2", "--retain-ratio 5"]),
        ("retain_ratio = 0.5", "retainratio = 0.5", ["methods table 2", "retainratio"]),
        (
            "retain_ratio = 0.5",
            "retain_ratio = 0.5\n[methods.sweep]\nseed = 1",
            ["sweep of seed", "list"],
        ),
        (
            "retain_ratio = 0.5",
            "retain_ratio = 0.5\n[[methods]]\nmethod = 'shortgpt'\nnum_layers = 1",
            ["same cell"],
        ),
        ("[[methods]]", "[[method]]", ["'method' is unknown", "did you mean 'methods'"]),
        ("model = ", "#", ["names no model"]),
        ("[calibration]", "[calibration", ["cannot be read"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line_before_anything_runs(old, new, said, write):
    path = write(TWO)
    path.write_text(
        path.read_text().replace(old, new, 1)
        if old != "[[methods]]"
        else path.read_text().replace(old, new)
    )
    with pytest.raises(RecipeError) as caught:
        read_experiment(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message, message
    for words in said:
        assert words in message, message


def test_a_variable_that_is_not_set_is_named(write, monkeypatch):
    monkeypatch.delenv("NO_SUCH", raising=False)
    path = write(TWO)
    path.write_text(path.read_text().replace("data = ", "data = '$NO_SUCH/a.txt' #"))
    with pytest.raises(RecipeError, match=r"has no \$NO_SUCH"):
        read_experiment(path)


# --- running


def test_a_finished_cell_is_not_run_again_and_a_changed_one_is(write, tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    first, ran = here(write(TWO), output, monkeypatch)
    assert ran == ["dense", "shortgpt", "grasp"]
    assert [row.method for row in first.rows] == ran
    assert (
        first.rows[1].ratio > 0
        and first.rows[1].peak_memory > 0
        and first.rows[1].seconds["statistics"] > 0
    )
    again, ran = here(write(TWO), output, monkeypatch)
    assert ran == [] and again.rows == first.rows
    changed, ran = here(write(TWO.replace("0.5", "0.4")), output, monkeypatch)
    assert ran == ["grasp"] and changed.rows[:2] == first.rows[:2]
    assert changed.rows[2].fields["retain_ratio"] == 0.4
    assert Results.read(output) == changed


def test_a_changed_text_is_another_cell(write, text_file, tmp_path):
    path = write(TWO)
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_file).read_bytes())
    path.write_text(path.read_text().replace(text_file, str(copy)))
    before = [cell.key for cell in read_experiment(path).cells]
    copy.write_text(copy.read_text() + "more")
    assert not set(before) & {cell.key for cell in read_experiment(path).cells}


def test_rows_of_other_results_in_the_folder_are_taken_over(write, tmp_path, monkeypatch):
    here(write(TWO), tmp_path / "one.json", monkeypatch)
    (tmp_path / "broken.json").write_text("{")
    _, ran = here(
        write(TWO + '[[methods]]\nmethod = "shortgpt"\nnum_layers = 2\n'),
        tmp_path / "two.json",
        monkeypatch,
    )
    assert ran == ["shortgpt"]


def test_a_failure_is_a_row_and_is_tried_again(write, tmp_path, monkeypatch):
    path = write('[[methods]]\nmethod = "shortgpt"\nnum_layers = 99\n' + TWO)
    results, _ = here(path, tmp_path / "out.json", monkeypatch)
    assert [bool(row.error) for row in results.rows] == [False, True, False, False]
    assert "--num-layers 99" in results.rows[1].error and results.rows[1].scores == ()
    _, ran = here(path, tmp_path / "out.json", monkeypatch)
    assert ran == ["shortgpt"]


def test_an_unforeseen_failure_is_a_row_too(write, tmp_path, monkeypatch):
    def broken(*_args, **_options):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(comparison.pipeline, "compress", broken)
    results, _ = here(write(TWO), tmp_path / "out.json", monkeypatch)
    assert results.rows[1].error == "unexpected ZeroDivisionError: oh" and not results.rows[0].error


def test_fidelity_is_measured_where_it_is_asked_for(write, tmp_path, monkeypatch):
    path = write(TWO)
    path.write_text(path.read_text().replace("[evaluation]", "[evaluation]\nagainst = true"))
    results, _ = here(path, tmp_path / "out.json", monkeypatch)
    assert results.rows[0].score("nats/token").value == pytest.approx(0, abs=1e-6)
    assert results.rows[1].score("nats/token").value > 0


RECOVERY = """
[recovery]
data = {text!r}
train = "layers"
max_steps = 2
max_length = 16
batch_size = 2
held_out = 2
learning_rate = 0.01
"""


@pytest.fixture
def starred(write, text_file):
    """Two methods, one trained afterwards."""
    plain = TWO.replace('"shortgpt"', '"shortgpt"\nrecover = false')
    return write(RECOVERY.format(text=text_file) + plain)


def test_a_method_is_trained_where_the_file_says_so(starred, write, tmp_path, monkeypatch):
    """As `grasp recover` would; the row has a star, as in the paper, and the seconds."""
    results, ran = here(starred, tmp_path / "out.json", monkeypatch)
    assert ran == ["dense", "shortgpt", "grasp*"]
    dense, plain, trained = results.rows
    assert "recovery" not in {**dense.seconds, **plain.seconds}
    assert not trained.error and trained.seconds["recovery"] > 0
    assert results.about["recovery"]["max_steps"] == 2
    untrained, ran = here(write(TWO), tmp_path / "out.json", monkeypatch)
    assert ran == ["grasp"]  # the others are the same cells with and without the table
    assert untrained.rows[2].parameters == trained.parameters
    assert untrained.rows[2].scores[0].value != trained.scores[0].value


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("data = ", "text = ", "'text' is unknown"),
        ("max_steps = 2", "max_steps = 0", "max_steps = 0"),
        ('train = "layers"', 'train = "layer"', "--train layer: .*did you mean 'layers'"),
        ("recover = false", "recover = 2", "recover = 2"),
        ("max_steps = 2", 'preset = "fast"', "--preset fast: unknown"),
        ("max_steps = 2", "micro_batch = 2", "'micro_batch' is unknown"),
    ],
)
def test_a_mistake_about_the_training_is_one_line_before_anything_runs(old, new, said, starred):
    text = starred.read_text()
    at = text.index("[recovery]")
    starred.write_text(text[:at] + text[at:].replace(old, new, 1))
    with pytest.raises(RecipeError, match=said) as caught:
        read_experiment(starred)
    assert "\n" not in str(caught.value) and str(starred) in str(caught.value)


# --- as a user calls it


def grasp(*arguments: object, cwd: Path, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "grasp", "compare", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_a_killed_child_is_a_row_and_an_interrupt_loses_nothing(write, tmp_path, monkeypatch):
    path = write(TWO)
    # a shell in the background ignores it, and children would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    child = grasp(path, "-o", "out.json", cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "out.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)  # as Ctrl-C does: parent and child
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert "1 of 3 cells are finished in out.json" in said.replace("\n", " "), said
    finished = Results.read(tmp_path / "out.json")
    assert [row.label for row in finished.rows] == ["dense"]
    again, ran = here(path, tmp_path / "out.json", monkeypatch)
    assert ran == ["shortgpt", "grasp"] and again.rows[0] == finished.rows[0]


def test_a_dry_run_lists_the_cells(write, tmp_path):
    done = command("compare", write(TWO), "--dry-run", "-o", tmp_path / "out.json")
    assert done.status == 0 and done.err.count("to run") == 3
    assert not (tmp_path / "out.json").exists()


def test_a_child_that_is_killed_is_a_row(write, tmp_path, monkeypatch):
    real = subprocess.Popen

    class Dead(real):
        def __init__(self, _command, **options):
            super().__init__(
                [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"],
                **options,
            )

    monkeypatch.setattr(subprocess, "Popen", Dead)
    results = comparison.compare(read_experiment(write(TWO)), tmp_path / "out.json")
    assert [row.error for row in results.rows] == [
        "the process ended with status -9 (out of memory?)"
    ] * 3
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["label"] == "dense"


def test_a_cell_measured_on_its_calibration_text_says_so(write, tmp_path, monkeypatch):
    results, _ = here(write(TWO), tmp_path / "results.json", monkeypatch)
    assert len(results.rows) >= 2
    assert all("LEAKAGE" in row.notes[0] for row in results.rows if row.method != "dense")
