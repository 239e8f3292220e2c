"""Where things are written: what cannot be is said before any work is done, by every verb and by a
dry run; what can be is filled.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import MANIFEST
from test_cli import SMALL, command

import grasp
from grasp.core import destination
from grasp.core.destination import check_destination, check_file
from grasp.core.results import Result, Results
from grasp.errors import CheckpointError, RecipeError
from grasp.report import html
from grasp.verbs import compare as comparison
from grasp.verbs import compress as pipeline
from grasp.verbs import dry_run as estimate
from grasp.verbs import evaluate as measurement
from grasp.verbs import export as exporting
from grasp.verbs import inspect as inspection
from grasp.verbs import quantize as quantization
from grasp.verbs import recover as recovery


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current directory: a file, an empty directory, one with something in it, links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "nowhere").symlink_to("not-there")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "to-full").symlink_to("full")
    (tmp_path / "to-empty").symlink_to("empty")
    (tmp_path / "to-file").symlink_to("file")
    return tmp_path


BAD = {
    ".": "not an empty directory",
    "..": "not an empty directory",
    "/": "not an empty directory",
    "full": "not an empty directory",
    "to-full": "not an empty directory",
    "file": "not an empty directory",
    "to-file": "not an empty directory",
    "file/out": "is not a directory",
    "file/a/b": "is not a directory",
    "to-file/out": "is not a directory",
    "nowhere": "a symbolic link to not-there, which is not there",
    "nowhere/out": "is a symbolic link to not-there, which is not there",
    "circle": "a symbolic link to circle",
    "x" * 256: "too long",
    "new/" + "é" * 128: "too long",
    "x" * 256 + "/out": "too long",
    "/".join(["x" * 200] * 20): "too long",
    "caf\udce9": "not UTF-8",
    "caf\udce9/out": "not UTF-8",
    "a\0b": "control characters",
    "a\nb": "control characters",
}


@pytest.mark.parametrize("out", BAD)
def test_out_that_cannot_be(out, place):
    with pytest.raises(CheckpointError, match=r"^OUT ") as found:
        check_destination(Path(out), 0)
    assert BAD[out] in str(found.value) and "\n" not in str(found.value)
    str(found.value).encode("utf-8")


@pytest.mark.parametrize(
    "out",
    [
        "new",
        "new/er",
        "empty",
        "to-empty",
        "to-empty/new",
        "x" * 255,
        "é" * 127,
        "full/../new",
        "~x",
        "with space",
    ],
)
def test_out_that_can_be(out, place):
    check_destination(Path(out), 1000)
    assert sorted(path.name for path in place.iterdir()) == [
        "circle",
        "empty",
        "file",
        "full",
        "nowhere",
        "to-empty",
        "to-file",
        "to-full",
    ]


def test_the_root_of_a_disk_is_empty(place):
    """ext4 puts a directory into it."""
    (place / "empty" / "lost+found").mkdir()
    check_destination(place / "empty", 0)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_folder_that_is_not_ours(place):
    (place / "empty").chmod(0o555)
    for out in ("empty", "empty/new", "to-empty"):
        with pytest.raises(CheckpointError, match="is not writable"):
            check_destination(Path(out), 0)


def test_a_folder_that_is_read_only(place, monkeypatch):
    """As above, for tests that root runs."""
    monkeypatch.setattr(destination.os, "access", lambda path, _: Path(path) != place / "empty")
    for out in ("empty", "empty/new", "to-empty"):
        with pytest.raises(CheckpointError, match=f"{place / 'empty'} is not writable"):
            check_destination(Path(out), 0)


@pytest.mark.parametrize("out", ["model/out", "model/new/out", "to-model/out", "here/model/out"])
def test_out_in_the_model(out, place):
    (place / "model").mkdir()
    (place / "to-model").symlink_to("model")
    (place / "here").symlink_to(".")
    for model in ("model", place / "model", "to-model", "./model/"):
        with pytest.raises(CheckpointError, match=r"lies in .*, which is read"):
            check_destination(Path(out), 0, "hub/name", model)
    check_destination(Path("model-small"), 0, "model")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        check_destination(Path("."), 0, "model")  # the model lies in OUT


def test_sizes_are_never_rounded_to_nothing(place, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=400)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs 40\.8 kB, .* has 400 bytes free"):
        check_destination(Path("new"), 40_000)
    with pytest.raises(CheckpointError, match=r"needs 5\.1 GB, .* has 400 bytes free"):
        check_destination(Path("new"), 5_000_000_000)


BAD_FILES = {
    ".": "is a directory",
    "empty": "is a directory",
    "to-empty": "is a directory",
    "file/x.json": "is not a directory",
    "new/x.json": "is not a directory",
    "nowhere": "which is not there",
    "circle": "which is not there",
    "/dev/null": "not an ordinary file",
    "x" * 252 + ".json": "too long",
    "caf\udce9.json": "not UTF-8",
    "a\0.json": "control characters",
}


@pytest.mark.parametrize("path", BAD_FILES)
def test_a_file_that_cannot_be(path, place):
    with pytest.raises(RecipeError, match=r"^--output ") as found:
        check_file(Path(path), "--output")
    assert BAD_FILES[path] in str(found.value)
    str(found.value).encode("utf-8")


@pytest.mark.parametrize("path", ["file", "to-file", "new.json", "empty/x.json", "to-empty/x.json"])
def test_a_file_that_can_be(path, place):
    check_file(Path(path), "--output")


# --- every verb asks before it works


@pytest.fixture
def no_work(monkeypatch):
    """Whatever reads a model or results fails the test."""

    def work(*_: object, **__: object) -> None:
        pytest.fail("work was begun")

    for module in (pipeline, quantization, inspection, measurement):
        monkeypatch.setattr(module, "open_model", work)
    for module in (estimate, recovery, exporting, comparison):
        monkeypatch.setattr(module, "load_model", work)
    monkeypatch.setattr(html, "gather", work)
    monkeypatch.setattr(comparison, "run_child", work)


@pytest.fixture
def checkpoint(model_directory, tmp_path_factory) -> str:
    """A model directory with a manifest, as far as `recover` looks before it loads."""
    path = Path(shutil.copytree(model_directory, tmp_path_factory.mktemp("checkpoint") / "small"))
    (path / "grasp.json").write_text(json.dumps({"format_version": 1, **MANIFEST}))
    return str(path)


DIRECTORY_VERBS = {
    "compress": "compress MODEL OUT --ratio 0.2",
    "dry run": "compress MODEL OUT --ratio 0.2 --dry-run",
    "recover": "recover MODEL OUT --data TEXT",
    "quantize": "quantize MODEL OUT --bits 8",
    "export": "export MODEL OUT --format dense",
    "demo": "demo -o OUT",
}


@pytest.mark.parametrize("out", ["file/out", "nowhere", "x" * 256, "caf\udce9", "inside"])
@pytest.mark.parametrize("verb", DIRECTORY_VERBS)
def test_every_verb_that_writes_a_directory_asks_first(
    verb, out, place, checkpoint, text_file, no_work, monkeypatch
):
    if out == "inside":
        out = f"{checkpoint}/out"
        if verb == "demo":
            pytest.skip("reads no directory of the user's")
    words = [
        {"MODEL": checkpoint, "OUT": out, "TEXT": text_file}.get(word, word)
        for word in DIRECTORY_VERBS[verb].split()
    ]
    assert command(*words).error.startswith("OUT ")


def experiment(path: Path, model: str, text: str) -> None:
    path.write_text(
        f"model = {model!r}\n[calibration]\ndata = {text!r}\n[[methods]]\nmethod ="
        " 'shortgpt'\nnum_layers = 1\n"
    )


FILE_VERBS = {
    "eval": "eval MODEL --ppl TEXT -o FILE.json",
    "bench": "bench MODEL -o FILE.json",
    "compare": "compare two.toml -o FILE.json",
    "compare, dry": "compare two.toml --dry-run -o FILE.json",
    "report": "report MODEL -o FILE.html",
    "inspect": "inspect MODEL --data TEXT -o FILE.png",
}


@pytest.mark.parametrize("path", ["file/x", "gone", "x" * 256, "caf\udce9", "folder"])
@pytest.mark.parametrize("verb", FILE_VERBS)
def test_every_verb_that_writes_a_file_asks_first(
    verb, path, place, model_directory, text_file, no_work
):
    experiment(place / "two.toml", model_directory, text_file)
    for kind in ("json", "html", "png"):
        (place / f"gone.{kind}").symlink_to("not-there/x")
        (place / f"folder.{kind}").mkdir()
    words = [
        {"MODEL": model_directory, "TEXT": text_file}.get(word, word).replace("FILE", path)
        for word in FILE_VERBS[verb].split()
    ]
    error = command(*words).error
    assert error.startswith(("--output ", "-o ")), error


def test_results_never_replace_another_json_file(place, model_directory, text_file, no_work):
    (place / "copy").mkdir()
    shutil.copy(Path(model_directory) / "config.json", place / "copy" / "config.json")
    for verb in (("eval", "copy", "--ppl", text_file), ("bench", "copy")):
        assert "no results file of grasp" in command(*verb, "-o", "copy/config.json").error


def test_a_dry_run_makes_no_results_folder(place, model_directory, text_file):
    experiment(place / "two.toml", model_directory, text_file)
    before = sorted(place.iterdir())
    outcome = command("compare", "two.toml", "--dry-run")
    assert outcome.status == 0, outcome.err
    assert sorted(place.iterdir()) == before


def test_where_the_states_of_a_run_cannot_be_kept(
    place, checkpoint, text_file, no_work, monkeypatch
):
    """OUT is a mount point in a folder that is not writable, as in a container: OUT.recovery cannot
    lie beside it.
    """
    real = os.access
    monkeypatch.setattr(
        destination.os, "access", lambda path, mode: Path(path) != place and real(path, mode)
    )
    error = command("recover", checkpoint, "empty", "--data", text_file).error
    assert (
        error.startswith("OUT empty: ")
        and "empty.recovery" in error
        and "such as empty/model" in error
    )


# --- directories that are there are filled


@pytest.fixture
def out_of(place, model_directory, text_file):
    """`out_of(out)`: the files of a checkpoint that was written to `out`."""

    def run(out: str) -> set[str]:
        outcome = command(
            "compress",
            model_directory,
            out,
            "--method",
            "grasp",
            "--layers",
            "3",
            "--data",
            text_file,
            *SMALL,
        )
        assert outcome.status == 0, outcome.err
        assert grasp.load(out).manifest["parameters"]
        return {path.name for path in Path(out).iterdir()}

    return run


def test_a_link_to_an_empty_directory_is_filled(out_of, place):
    made = (place / "empty").stat().st_ino
    found = out_of("to-empty")
    assert (place / "to-empty").is_symlink() and (place / "empty").stat().st_ino == made
    assert found == out_of("new"), "nothing else is in it"
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_the_current_directory_is_filled_and_has_a_name(out_of, place, monkeypatch):
    monkeypatch.chdir(place / "empty")
    out_of(".")
    assert "# empty\n" in (place / "empty" / "README.md").read_text()


def test_quantized_and_exported_to_a_link(place, model_directory):
    assert command("export", model_directory, "to-empty", "--format", "dense").status == 0
    assert (place / "empty" / "config.json").is_file()


@pytest.fixture
def mount(tmp_path):
    """`mount(what, where)`: bind `what` to `where`, where that may be done here."""
    done = []

    def bind(what: Path, where: Path) -> None:
        if shutil.which("mount") is None or os.geteuid() != 0:
            pytest.skip("only root mounts")
        if subprocess.run(
            ["mount", "--bind", what, where], check=False, capture_output=True
        ).returncode:
            pytest.skip("mounting is not allowed here")
        done.append(where)

    yield bind
    for where in done:
        subprocess.run(["umount", "-l", where], check=True)


def test_a_mount_point_is_filled(out_of, place, mount):
    (place / "disk").mkdir()
    mount(place / "disk", place / "empty")
    out_of("empty")
    assert (place / "disk" / "config.json").is_file()


def test_a_results_file_that_is_a_mount_point(place, mount):
    (place / "kept.json").touch()
    (place / "results.json").touch()
    mount(place / "kept.json", place / "results.json")
    Results((Result("a", "b"),)).write(place / "results.json")
    assert Results.read(place / "kept.json").rows[0].label == "a"


def test_recover_from_and_to_links(place, model_directory, text_file, monkeypatch):
    """The run's states lie beside the link, and go."""
    torch.manual_seed(0)
    made = command(
        "compress",
        model_directory,
        "small",
        "--method",
        "grasp",
        "--layers",
        "3",
        "--data",
        text_file,
        *SMALL,
    )
    assert made.status == 0, made.err
    more = ("--max-steps", "2", "--batch-size", "2", "--max-length", "32", "--held-out", "2")
    done = command("recover", "small", "to-empty", "--data", text_file, *more)
    assert done.status == 0, done.err
    assert (place / "empty" / "config.json").is_file() and not list(place.glob("*.recovery"))
