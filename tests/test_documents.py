"""Documents from outside with something wrong in them: one line that names the file and the place,
never a traceback, always status 2.

Every value of a document is replaced in turn by values of other kinds, and taken out.
"""

import copy as copies
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import build
from test_cli import command
from test_faults import change_json

import grasp
from grasp.core import models
from grasp.core.manifest import read_manifest
from grasp.core.results import Generation, Result, Results
from grasp.core.score import Score
from grasp.errors import CheckpointError, GraspError
from grasp.evaluation.rows import row
from grasp.recipes.experiment import read_experiment
from grasp.report import html
from grasp.report.card import model_card
from grasp.report.reading import Checkpoint
from grasp.terminal import results as tables

OTHERS = (None, "x", -1, 1.5, True, [], {}, [[]], 10**30, float("nan"), float("inf"))
GONE = object()


def changed(document: object) -> Iterator[tuple[tuple, object, object]]:
    """(place, new value, document with it), for every place in a document of dicts and lists."""
    for place in _places(document):
        for value in (*OTHERS, GONE):
            new = copies.deepcopy(document)
            inner = new
            for part in place[:-1]:
                inner = inner[part]
            if value is GONE:
                del inner[place[-1]]
            else:
                inner[place[-1]] = value
            yield place, value, new


def _places(value: object, place: tuple = ()) -> Iterator[tuple]:
    if place:
        yield place
    for key, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value[:1])
        if isinstance(value, list)
        else ()
    ):
        yield from _places(inner, (*place, key))


@pytest.fixture(scope="module")
def manifest() -> dict:
    """The manifest of a checkpoint that was compressed, trained and quantized."""
    data = grasp.Calibration(
        build("llama").get_input_embeddings().weight.abs().long()[:2, :16], "random"
    )
    made = json.loads(json.dumps(grasp.compress(build("llama"), data=data, ratio=0.1).manifest))
    made["model"]["source"] = made["recipe"]["model"] = "tiny"
    trained = {
        "recipe": {"train": "factors", "objective": "lm", "batch_size": 4, "data": "text"},
        "data": {"sources": {"text": 20}, "tokens": 100},
        "steps": 20,
        "trained_parameters": 9,
        "checkpoint": "a",
        "command": "grasp recover a b",
        "curve": [{"step": 0, "held_out_loss": 5.0}, {"step": 10, "held_out_loss": 4.0}],
        "best": {"step": 10, "held_out_loss": 4.0},
        "seconds": {"training": 1.0},
    }
    rounded = {
        "scheme": "int8",
        "matrices": 3,
        "share": 0.5,
        "bytes_before": 9,
        "bytes_after": 5,
        "checkpoint": "a",
        "command": "grasp quantize a b",
    }
    made["edits"] = [*made["edits"][:1], {"edit": "drop", "layer": 3}]
    return {
        "format_version": 3,
        **made,
        "recovery": {**trained, "before": trained},
        "quantization": rounded,
    }


def test_a_manifest_with_something_wrong_in_it(manifest, decoder, tmp_path):
    """What is not refused is shown by all that shows a manifest."""
    refused = 0
    model, path = decoder("llama"), tmp_path / "grasp.json"
    model.source = str(tmp_path)
    for place, value, document in changed(manifest):
        path.write_text(json.dumps(document))
        try:
            model_card(read_manifest(tmp_path), "out")
            row(model, None, (), ())
            Checkpoint.read(tmp_path)
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
            continue
        except Exception as error:
            raise AssertionError(f"{place} = {value!r}") from error
    assert refused > 300


def test_the_place_in_a_manifest_is_named(manifest, tmp_path):
    (tmp_path / "grasp.json").write_text(
        json.dumps({**manifest, "edits": [{**manifest["edits"][0], "rank": "four"}]})
    )
    with pytest.raises(
        CheckpointError,
        match=r"grasp.json: edits\[0\].rank: Expected `int`, got `str`; the checkpoint is damaged",
    ):
        read_manifest(tmp_path)


SPEED = {
    "batch_size": 1,
    "prompt_len": 8,
    "new_tokens": 4,
    "rounds": 1,
    "low": 1.0,
    "high": 2.0,
    "p95": 1.0,
    "compile": False,
    "device": "cpu",
    "dtype": "float32",
    "threads": 1,
    "attention": "sdpa",
    "low_rank": "two products",
}
SCORES = (
    Score(
        "text",
        3.0,
        "perplexity",
        {
            "seq_len": 8,
            "stride": 8,
            "num_blocks": 2,
            "num_tokens": 14,
            "word_perplexity": 9.0,
            "bits_per_byte": 1.0,
        },
    ),
    Score("text", 0.1, "nats/token", {}, interval=(0.0, 0.2)),
    Score("arc", 0.5, "acc", {"num_fewshot": 0, "num_examples": 4, "harness": "lm-eval"}, 0.1),
    *(
        Score(name, 2.0, unit, SPEED)
        for name, unit in (
            ("prefill", "tokens/s"),
            ("decode", "tokens/s"),
            ("time to first token", "s"),
            ("token latency", "s"),
            ("roofline share", "share"),
        )
    ),
    Score("peak memory", 5.0, "bytes", {}),
)
ROW = Result(
    "a",
    "made/a",
    "grasp",
    {"ratio": 0.1},
    100,
    400,
    0.2,
    SCORES,
    (Generation("Say", "x", 1, 0.5, True),),
    {"load": 1.0},
    7,
    ("n",),
    key="k",
)


def test_results_with_something_wrong_in_them(tmp_path, monkeypatch):
    """What is not refused is shown in the terminal, as `grasp compare` shows rows that were
    finished before, and on a page.
    """
    monkeypatch.setattr(html, "draw", lambda *_: "")
    path, refused, shown = tmp_path / "results.json", 0, 0
    sound = Results(
        (ROW,), "t", "grasp eval", {"torch": "2"}, {"processor": "x"}, {"seed": 0}
    ).to_json()
    for place, value, document in changed(sound):
        path.write_text(json.dumps(document))
        try:
            found = Results.read(path)
        except CheckpointError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
            continue
        try:
            tables.show_results(found)
            shown += 1
        except Exception as error:
            raise AssertionError(f"{place} = {value!r}") from error
    assert refused > 200 and shown > 100


EXPERIMENT = {
    "title": "t",
    "model": "x",
    "dtype": "float32",
    "dense": True,
    "calibration": {
        "data": "pydoc",
        "num_samples": 2,
        "seq_len": 16,
        "seed": 0,
        "text_field": "text",
    },
    "evaluation": {
        "against": True,
        "ppl": ["pydoc"],
        "seq_len": 32,
        "num_blocks": 2,
        "limit": 3,
        "task_data": "here",
        "tasks": ["arc_easy"],
    },
    "speed": {"batch_sizes": [1], "prompt_len": 8, "new_tokens": 4, "rounds": 1, "compile": False},
    "methods": [
        {
            "method": "grasp",
            "label": "mine",
            "num_layers": 1,
            "retain_ratio": 0.5,
            "projections": ["mlp"],
            "sweep": {"seed": [1, 2]},
        }
    ],
}


def toml(value: object) -> str:
    """A value as TOML writes it, tables in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value)


def test_an_experiment_with_something_wrong_in_it(tmp_path):
    path, refused = tmp_path / "e.toml", 0
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in EXPERIMENT.items()))
    assert len(read_experiment(path).cells) == 3
    for place, value, document in changed(EXPERIMENT):
        if value is None:
            continue
        path.write_text("\n".join(f"{key} = {toml(inner)}" for key, inner in document.items()))
        try:
            read_experiment(path)
        except GraspError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error), error
        except Exception as error:
            raise AssertionError(f"{place} = {value!r}") from error
    assert refused > 200


@pytest.mark.parametrize("line", ["trust_remote_code = true", 'device = "cuda"'])
def test_an_experiment_grants_nothing(line, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(line + '\nmodel = "x"\n[[methods]]\nmethod = "shortgpt"\nnum_layers = 1\n')
    key, flag = line.split(" ")[0], "--" + line.split(" ")[0].replace("_", "-")
    error = command("compare", path, "--dry-run", "-o", tmp_path / "r.json").error
    assert (
        error
        == f"{path}: '{key}': only the command line may say {flag}, not an experiment; take the"
        " line out"
    )


@pytest.mark.parametrize("where", ["scratch = {!r}", "[methods.sweep]\nscratch = [{!r}]"])
def test_an_experiment_names_no_folder_to_write(where, tmp_path):
    path, folder = tmp_path / "e.toml", tmp_path / "mine"
    path.write_text(
        'model = "x"\n[[methods]]\nmethod = "grasp-fisher"\nratio = 0.1\n'
        + where.format(str(folder))
    )
    error = command("compare", path, "--dry-run", "-o", tmp_path / "r.json").error
    assert "'scratch': only the command line may say --scratch" in error and not folder.exists()


def test_the_command_line_grants_them_to_every_cell_and_its_process(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text('model = "x"\n[[methods]]\nmethod = "shortgpt"\nnum_layers = 1\n')
    plain, trusted = read_experiment(path), read_experiment(path, trust_remote_code=True)
    assert all(cell.granted == [] for cell in plain.cells)
    assert all(
        cell.granted == ["--trust-remote-code"] and cell.loading["trust_remote_code"]
        for cell in trusted.cells
    )
    # what may run, not what is computed
    assert [cell.key for cell in trusted.cells] == [cell.key for cell in plain.cells]
    there = read_experiment(path, device="cpu")
    assert all(cell.granted == ["--device", "cpu"] for cell in there.cells) and not {
        c.key for c in there.cells
    } & {c.key for c in plain.cells}


def test_a_dry_run_refuses_what_the_run_would(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        'model = "x"\n[calibration]\nseq_len = -5\n[[methods]]\nmethod = "shortgpt"\nnum_layers'
        " = 1\n"
    )
    error = command("compare", path, "--dry-run", "-o", tmp_path / "r.json").error
    assert (
        error == f"{path}: [calibration]: seq_len = -5: must be a whole number from 2 to 16,777,216"
    )


# --- files of models: what is in them is checked by the libraries that know them


@pytest.fixture
def copy(model_directory, tmp_path) -> Path:
    return Path(shutil.copytree(model_directory, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"hidden_size": None}, ("config.json", "hidden_size")),
        ("config.json", {"num_hidden_layers": "four"}, ("config.json", "num_hidden_layers")),
        ("config.json", {"num_hidden_layers": -1}, ()),
        ("config.json", {"dtype": "x"}, ("'x'",)),
        ("config.json", {"model_type": []}, ()),
        ("config.json", {"rope_parameters": {"rope_type": "x", "rope_theta": 1.0}}, ()),
        ("config.json", {"vocab_size": 10**12}, ()),
        ("generation_config.json", {"pad_token_id": "x"}, ()),
        ("tokenizer_config.json", {"bos_token": 5}, ("tokenizer", "bos_token")),
        ("tokenizer_config.json", {"model_max_length": "x"}, ("tokenizer",)),
        ("tokenizer_config.json", {"tokenizer_class": []}, ("tokenizer",)),
        ("tokenizer.json", {"version": None}, ("tokenizer.json", "expected a string")),
        ("tokenizer.json", {"added_tokens": None}, ("tokenizer.json",)),
        (
            "tokenizer.json",
            {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
            ("tokenizer.json",),
        ),
    ],
)
def test_a_model_file_with_something_wrong_in_it(file, values, said, copy, text_file):
    change_json(copy / file, **values)
    error = command("eval", copy, "--ppl", text_file, "--seq-len", "16", "--num-blocks", "1").error
    assert str(copy) in error and all(part in error for part in said), error


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "{",
        '{"weight_map": []}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../../x"}}',
    ],
)
def test_an_index_with_something_wrong_in_it(content, copy, text_file):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(content)
    assert str(copy) in command("eval", copy, "--ppl", text_file).error


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF" + b"\xff" * 60,
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
        b"\0" * 4096,
    ],
)
def test_a_gguf_file_with_something_wrong_in_it(content, text_file, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    assert str(file) in command("eval", file, "--ppl", text_file).error


class PanicException(BaseException):
    """What a library written in Rust raises when it panics."""


def test_a_panic_of_a_library_is_one_line(copy, text_file, monkeypatch):
    def panic(*_, **__):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", panic)
    assert str(copy) in command("eval", copy, "--ppl", text_file).error


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (PanicException("a\nb"), 1, "unexpected PanicException: a b"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (
            MemoryError("Unable to allocate 9 TiB"),
            2,
            "not enough memory (Unable to allocate 9 TiB)",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "not enough memory",
        ),
        (ZeroDivisionError("oh"), 1, "unexpected ZeroDivisionError: oh (--debug shows where)"),
    ],
)
def test_whatever_else_is_one_line(failure, status, said, monkeypatch, model_directory, tmp_path):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr("grasp.verbs.compress.compress", fail)
    outcome = command("compress", model_directory, tmp_path / "out", "--ratio", "0.1")
    assert (
        outcome.status == status
        and outcome.err.startswith(f"grasp: error: {said}")
        and len(outcome.err.splitlines()) == 1
    )
