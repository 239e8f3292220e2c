"""Every flag of every command: whether a recipe may set it, and the values that it refuses, in one
table.

A flag that is not in the table fails the first test, so a new one is declared here too.
"""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import torch
from contracts import contracts
from test_cli import SMALL, command
from test_faults import change_weights, copy  # noqa: F401

import grasp
from grasp.cli import cli
from grasp.core import models
from grasp.core.fields import declared
from grasp.errors import CheckpointError, RecipeError
from grasp.methods import available
from grasp.recipes import experiment
from grasp.recipes.experiment import read_experiment
from grasp.terminal.flags import Place

HUGE, LISTS = "99999999999999999999999", (",", "a,,b")


class Flag(NamedTuple):
    """What is refused before a model is looked at (`beside` other flags), and whether `--config`
    may set it (`recipe`).
    """

    refused: tuple[str, ...] = ()
    beside: str = ""
    recipe: bool = False


def whole(lowest: int, beside: str = "", recipe: bool = False) -> Flag:
    return Flag((str(lowest - 1), HUGE, "-" + HUGE, "1.5", "nan", "inf", "x"), beside, recipe)


def number(*refused: str, beside: str = "", recipe: bool = False) -> Flag:
    return Flag(("-0.5", "nan", "inf", "-inf", "1e400", "1e9", "x", *refused), beside, recipe)


def word(beside: str = "", recipe: bool = False) -> Flag:
    return Flag(("nonsense",), beside, recipe)


def in_a_recipe(flag: Flag) -> Flag:
    return flag._replace(recipe=True)


FREE, PAPER, OURS = Flag(), "--method grasp --num-layers 1", "--ratio 0.1"
ALL = {name: FREE for name in ("--json", "--quiet", "--debug", "--help")}
LOADING = {"--device": Flag(("meta", "cdua", "cpu:x", "")), "--trust-remote-code": FREE}
DTYPE, TEXT = word(), {"--text-field": FREE}
FLAGS: dict[str, dict[str, Flag]] = {
    "compress": {
        **ALL, **LOADING, "model": in_a_recipe(FREE), "out": FREE, "--dtype": in_a_recipe(DTYPE),
        "--text-field": in_a_recipe(FREE), "--config": FREE, "--dry-run": FREE,
        "--resume": FREE, "--plugin": FREE,
        "--data": in_a_recipe(Flag(LISTS)),
        "--seed": whole(0, recipe=True), "--num-samples": whole(1, recipe=True),
        "--seq-len": whole(2, recipe=True), "--method": word(recipe=True),
        "--ratio": number("1", recipe=True),
        "--num-layers": whole(0, "--method grasp", recipe=True),
        "--layers": Flag((",", "1,,2", "1,x", "9" * 5000), "--method grasp", recipe=True),
        "--angular": in_a_recipe(FREE), "--iterative": in_a_recipe(FREE),
        "--retain-ratio": number("1", beside=PAPER, recipe=True),
        "--threshold-ratio": number("0", "1.1", beside=PAPER, recipe=True),
        "--rank-multiple": whole(1, PAPER, recipe=True), "--score": word(PAPER, recipe=True),
        "--sigma-split": word(PAPER, recipe=True), "--projections": Flag(LISTS, PAPER, recipe=True),
        "--exclude": Flag(LISTS, OURS, recipe=True), "--basis": word(OURS, recipe=True),
        "--allocation": word(OURS, recipe=True), "--budget": word(OURS, recipe=True),
        "--storage": word(OURS, recipe=True), "--shape": word(OURS, recipe=True),
        "--parts": Flag(("nonsense", "ranks,", "ranks,ranks", ","), OURS, recipe=True),
        "--rounds": Flag(("0", "3", "1.5", "nan", HUGE), OURS, recipe=True),
        "--speedup": Flag(("1", "0.5", "-2", "nan", "inf", HUGE, "x"), recipe=True),
        "--width-multiple": whole(1, OURS, recipe=True), "--uniform": in_a_recipe(FREE),
        "--size": Flag(("x", "0", "-1GB", "8XB"), recipe=True),
        "--bits": Flag(("7", "8,,4", "8,8", ",", "x"), "--size 1MB", recipe=True),
        "--group-sizes": Flag(("48", "64,64", ",", "x"), "--size 1MB", recipe=True),
        "--activations": word("--size 1MB", recipe=True),
        "--layout": in_a_recipe(word("--size 1MB")),
        "--scratch": FREE, "--max-memory": Flag(("x", "0", "-1GB", "8XB")), "--offload": FREE,
        "--fsdp": FREE,
    },
    "inspect": {
        **ALL, **LOADING, **TEXT, "model": FREE, "--dtype": DTYPE, "--output": FREE,
        "--data": Flag(LISTS), "--seed": whole(0), "--num-samples": whole(1),
        "--seq-len": whole(2), "--angular": FREE,
    },
    "recover": {
        **ALL, **TEXT, "--trust-remote-code": FREE, "--device": FREE, "checkpoint": FREE,
        "out": FREE, "--data": FREE, "--preset": word(), "--resume": FREE, "--fsdp": FREE,
        "--report-to": Flag(LISTS), "--teacher": FREE, "--teacher-cache": FREE,
        **{name: word() for name in (
            "--train", "--lora-on", "--objective", "--start", "--schedule", "--precision",
        )},
        **{name: FREE for name in (
            "--offload-teacher", "--offload", "--keep-adapter", "--pad", "--gradient-checkpointing",
        )},
        "--temperature": number("0"), "--lm-weight": number("1.1"), "--lora-dropout": number("1"),
        "--epochs": number("0"), "--learning-rate": number("0"), "--weight-decay": number(),
        "--max-grad-norm": number(), "--max-length": whole(2),
        **{name: whole(0) for name in ("--warmup-steps", "--seed")},
        **{name: whole(1) for name in (
            "--top-k", "--lora-rank", "--lora-alpha", "--max-steps", "--batch-size",
            "--micro-batch", "--held-out", "--eval-every",
        )},
    },
    "export": {
        **ALL, "--trust-remote-code": FREE, "checkpoint": FREE, "out": FREE, "--format": word(),
        "--dtype": word("--format dense"), "--weights": word("--format openvino"),
        "--converter": FREE,
    },
    "quantize": {
        **ALL, **LOADING, "model": FREE, "out": FREE, "--dtype": DTYPE,
        "--bits": Flag(("0", "2", "7", "-8", HUGE, "1.5", "nan")),
        "--activations": word(),
        "--group-size": Flag(("0", "-32", "48", HUGE, "nan"), "--bits 4"),
        "--embeddings": Flag(("0", "5", "32", "-8", HUGE, "nan")), "--layout": word(),
    },
    "eval": {
        **ALL, **LOADING, **TEXT, "model": FREE, "--against": FREE, "--dtype": DTYPE,
        "--output": FREE, "--ppl": Flag(LISTS), "--tasks": Flag(LISTS), "--task-data": FREE,
        "--num-fewshot": whole(0), "--generate": FREE, "--rolling": FREE, "--seq-len": whole(2),
        **{name: whole(1) for name in (
            "--limit", "--batch-size", "--stride", "--num-blocks", "--new-tokens",
        )},
    },
    "bench": {
        **ALL, **LOADING, "model": FREE, "--against": FREE, "--dtype": DTYPE, "--output": FREE,
        "--compile": FREE,
        "--batch-sizes": Flag(("0", "1,0", "-1", HUGE, f"1,{HUGE}", "1.5", "nan", ",", "1,,2")),
        **{name: whole(1) for name in ("--prompt-len", "--new-tokens", "--rounds")},
    },
    "compare": {
        **ALL, "--trust-remote-code": FREE, "--device": FREE, "experiment": FREE, "--output": FREE,
        "--dry-run": FREE, "--cell": FREE,
    },
    "report": {**ALL, "paths": FREE, "--output": FREE},
    "verify": {**ALL, "checkpoint": FREE},
    "demo": {**ALL, "--output": FREE, "--measure": FREE},
    "methods": {**ALL, "--plugin": FREE},
    "families": ALL,
    "data": ALL,
}  # fmt: skip
for method_, told in contracts().items():
    for name_, (_, refused) in told.get("flags", {}).items():
        FLAGS["compress"][name_] = Flag(refused, f"--method {method_}", recipe=True)


def parameters(verb: str) -> dict[str, click.Parameter]:
    """Every flag and argument of a command by its longest name."""
    command_ = cli.commands[verb]
    return {max(one.opts, key=len): one for one in command_.get_params(click.Context(command_))}


@pytest.mark.parametrize("verb", list(cli.commands))
def test_every_flag_is_declared_and_a_recipe_sets_those_that_say_so(verb):
    """Only `grasp compress` reads recipes, by --config."""
    found = {
        name: verb == "compress" and getattr(one, "recipe", False)
        for name, one in parameters(verb).items()
    }
    assert found == {name: flag.recipe for name, flag in FLAGS[verb].items()}


def test_every_verb_is_declared():
    assert set(FLAGS) == set(cli.commands)


@pytest.mark.parametrize(
    ("verb", "name"),
    [(verb, name) for verb, flags in FLAGS.items() for name, flag in flags.items() if flag.refused],
)
def test_a_value_out_of_bounds_is_one_line_before_a_model_is_loaded(
    verb, name, model_directory, text_file, tmp_path, monkeypatch
):
    def loaded(*_, **__):
        raise RuntimeError("a model was loaded")

    if name not in ("--device", "--data", "--ppl", "--layers"):
        monkeypatch.setattr(models.AutoConfig, "from_pretrained", loaded)
    out = (tmp_path / "out",) if "out" in FLAGS[verb] else ()
    data = (
        ("--data", text_file)
        if "--data" in FLAGS[verb]
        else ("--ppl", text_file)
        if verb == "eval"
        else ()
    )
    needed = {
        "export": ("--format", "dense"),
        "quantize": ("--bits", "8"),
        "compress": SMALL,
        "inspect": SMALL,
    }.get(verb, ())
    size = (
        (*PAPER.split(),)
        if verb == "compress"
        and name in ("--data", "--seed", "--num-samples", "--seq-len", "--device", "--dtype")
        else ()
    )
    beside = (*data, *needed, *size, *FLAGS[verb][name].beside.split())
    for value in FLAGS[verb][name].refused:
        error = command(verb, model_directory, *out, *beside, f"{name}={value}").error
        assert name in error and (
            value[:40] in error or f"{_number(value)}" in error or "," in value
        ), (value, error)
        assert len(error) < 600 and not (tmp_path / "out").exists()


def _number(value: str) -> object:
    """A value as Python writes it."""
    try:
        return float(value)
    except ValueError:
        return value


def test_the_same_values_are_refused_from_python():
    for options in (
        {"num_samples": 0},
        {"seq_len": True},
        {"seed": 2**70},
        {"num_samples": 2.0},
        {"seed": -1},
    ):
        with pytest.raises(
            RecipeError,
            match=f"--{next(iter(options)).replace('_', '-')} .*must be a whole number from",
        ):
            grasp.compress("nowhere", method="grasp", num_layers=1, **options)
    for options in (
        {"limit": -1},
        {"batch_size": -1},
        {"new_tokens": 10**9},
        {"num_blocks": 0},
        {"stride": math.nan},
    ):
        with pytest.raises(
            RecipeError, match=f"--{next(iter(options)).replace('_', '-')} .*must be"
        ):
            grasp.evaluate("nowhere", **options)


def test_numbers_of_numpy_are_numbers(calibration, decoder):
    share, layers = torch.tensor(0.5).numpy()[()], torch.tensor(1).numpy()[()]
    done = grasp.compress(
        decoder("llama"), data=calibration, method="grasp", num_layers=layers, retain_ratio=share
    )
    assert json.dumps(done.manifest["recipe"]) and done.manifest["recipe"]["retain_ratio"] == 0.5


# --- what needs the model to be seen as nonsense


@pytest.mark.parametrize("method", [PAPER, OURS])
def test_a_rank_multiple_beyond_every_matrix(method, model_directory, tmp_path):
    error = command(
        "compress",
        model_directory,
        tmp_path / "out",
        *method.split(),
        *SMALL,
        "--rank-multiple",
        "33",
    ).error
    assert error == "--rank-multiple 33: no matrix of the model has so large a rank; at most 32"


def test_more_new_tokens_than_the_model_reads(model_directory, text_file):
    error = command("eval", model_directory, "--generate", "--new-tokens", "200").error
    assert (
        error.startswith("--new-tokens 200: must be from 1 to ")
        and "the model reads 128 tokens" in error
    )


def test_bench_refuses_weights_that_are_not_numbers(copy):  # noqa: F811
    change_weights(
        copy, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"][3].fill_(torch.nan)
    )
    error = command("bench", copy, "--prompt-len", "4", "--new-tokens", "2", "--rounds", "1").error
    assert "'model.layers.2.mlp.down_proj.weight' holds 48 non-finite numbers" in error


# --- trust: what a recipe, which may be somebody else's, cannot say


GIVEN = {
    "model": "x",
    "method": "grasp",
    "data": "pydoc",
    "text_field": "t",
    "dtype": "float32",
    "score": "taylor",
    "sigma_split": "both",
    "basis": "plain",
    "allocation": "global",
    "budget": "bytes",
    "storage": "pair",
    "ratio": 0.1,
    "retain_ratio": 0.1,
    "threshold_ratio": 0.1,
    "layers": [1],
    "projections": ["q"],
    "exclude": ["k"],
    "num_layers": 1,
    "rank_multiple": 1,
    "parts": ["ranks"],
    "rounds": 2,
    "shape": "dense",
    "speedup": 1.5,
    "size": "1MB",
    "bits": [8, 16],
    "group_sizes": [64],
    "layout": "compressed-tensors",
    "uniform": True,
    "width_multiple": 8,
    "num_samples": 1,
    "seq_len": 8,
    "seed": 1,
    "angular": False,
    "iterative": False,
    **{
        name_.lstrip("-").replace("-", "_"): taken
        for told in contracts().values()
        for name_, (taken, _) in told.get("flags", {}).items()
    },
}


@pytest.mark.parametrize(
    "name", [name for name in FLAGS["compress"] if name not in ("--help", "--config")]
)
@pytest.mark.parametrize("form", ["toml", "grasp.json"])
def test_a_recipe_says_what_is_computed_and_nothing_else(name, form, model_directory, tmp_path):
    """A recipe of one key, which is refused with the words of the command line, or else is not what
    is wrong.
    """
    key = name.lstrip("-").replace("-", "_")
    value = GIVEN.get(
        key,
        (
            True
            if key in ("trust_remote_code", "dry_run", "resume", "json", "quiet", "debug")
            else str(tmp_path / "mine")
        ),
    )
    config = tmp_path / ("recipe.toml" if form == "toml" else form)
    config.write_text(
        f"{key} = {json.dumps(value)}" if form == "toml" else json.dumps({"recipe": {key: value}})
    )
    outcome = command(
        "compress", "--config", config, model_directory, tmp_path / "out", "--method", "nonsense"
    )
    if FLAGS["compress"][name].recipe:
        assert "--method nonsense: unknown" in outcome.error
    else:
        said = "OUT" if name == "out" else name
        assert (
            outcome.error
            == f"--config {config}: '{key}': only the command line may say {said}, not a recipe;"
            " take the line out"
        )
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("num_layers = 2.5", "must be a whole number, not 2.5"),
        ("seed = true", "must be a whole number, not True"),
        ('ratio = "a lot"', "must be a number, not 'a lot'"),
        ('angular = "yes"', "must be true or false, not 'yes'"),
        ('data = ["a", "b"]', "must be text, not ['a', 'b']"),
        ("layers = [1, 2.5]", "must be a list, or text, not 2.5"),
        ("layers = {a = 1}", "must be a list, or text, not {'a': 1}"),
        ("score = 3", "must be text, not 3"),
        ('data = "a\\u0000b"', "NUL"),
        ('model = "a\\u0000b"', "NUL"),
        ("seed = -1", "--seed -1"),
        ("num_samples = 1" + "0" * 30, "--num-samples 1000"),
        ("ratio = nan", "--ratio nan"),
        ("rank_multiple = 0", "--rank-multiple 0"),
        ("a = " + "[" * 5000, "cannot be read"),
    ],
)
def test_a_value_of_the_wrong_kind_in_a_recipe(line, said, model_directory, tmp_path):
    config = tmp_path / "recipe.toml"
    config.write_text(line)
    size = (
        () if "num_layers" in line or "ratio" in line or "layers" in line else ("--num-layers", "1")
    )
    given = ("--method", "grasp", *size) if "data" in line or "model" in line else size
    error = command(
        "compress",
        "--config",
        config,
        *(("--dry-run",) if "model" in line else (model_directory,)),
        tmp_path / "out",
        *given,
    ).error
    assert said in error and "unexpected" not in error


# --- ~


@pytest.fixture
def home(tmp_path, monkeypatch, model_directory, text_file) -> Path:
    """A home folder with a checkpoint, `small`, and a text in it; the folder a command runs in is
    another, and empty.
    """
    place = tmp_path / "home"
    grasp.compress(
        model_directory,
        place / "small",
        method="grasp",
        num_layers=1,
        data=text_file,
        num_samples=2,
        seq_len=16,
    )
    (place / "text.txt").write_text(Path(text_file).read_text())
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(tmp_path / "work")
    yield place
    assert list((tmp_path / "work").iterdir()) == []


def test_every_path_of_every_command_knows_the_home_folder():
    """MODEL and other texts that may be paths are the business of the functions behind."""
    paths = [
        (verb, name)
        for verb in cli.commands
        for name, one in parameters(verb).items()
        if isinstance(one.type, click.Path)
    ]
    assert len(paths) > 15 and all(
        isinstance(parameters(verb)[name].type, Place) for verb, name in paths
    )


def test_the_home_folder_on_the_command_line(home):
    """Quoted, so that no shell puts it in."""
    flags = ("--data", "~/text.txt", *SMALL, "--method", "grasp", "--num-layers", "1")
    assert command("compress", "~/small", "~/a", *flags).status == 0
    said = command(
        "eval",
        "~/small",
        "--ppl",
        "~/text.txt",
        "--seq-len=64",
        "--num-blocks=1",
        "--output=~/r.json",
        "--json",
    ).json
    assert said["rows"][0]["method"] == "grasp"
    (home / "e.toml").write_text(
        'model = "~/small"\n[[methods]]\nmethod = "grasp"\nnum_layers = 1\n'
    )
    assert command("compare", "~/e.toml", "--dry-run", "--output=~/s.json").status == 0
    (home / "c.toml").write_text("num_samples = -1")
    assert (
        "--num-samples -1"
        in command("compress", "~/small", "~/d", "--config=~/c.toml", "--num-layers", "1").error
    )
    assert {"a", "r.json"} <= {path.name for path in home.iterdir()}


def test_the_home_folder_from_python(home):
    assert grasp.load("~/small").manifest["method"]["name"] == "grasp"
    assert grasp.load(Path("~/small")).manifest["edits"]
    done = grasp.compress(
        Path("~/small"),
        "~/a",
        method="grasp",
        num_layers=1,
        data="~/text.txt",
        num_samples=2,
        seq_len=16,
    )
    assert (
        done.path == home / "a"
        and grasp.export("~/small", "~/b", format="dense").path == home / "b"
    )
    assert (
        grasp.evaluate("~/small", ppl="~/text.txt", seq_len=64, num_blocks=1).result.method
        == "grasp"
    )
    with pytest.raises(CheckpointError, match=f"{home}/nowhere: no grasp.json"):
        grasp.recover("~/nowhere", "~/c", data="~/text.txt")
    for nul in ("a\0b", Path("a\0b")):
        with pytest.raises(RecipeError, match="NUL"):
            grasp.load(nul)


# --- sweeps


def test_a_sweep_is_counted_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(itertools, "product", lambda *_: pytest.fail("the cells were made"))
    path = tmp_path / "e.toml"
    values = ", ".join(f"0.{n:03}" for n in range(1, 257))
    path.write_text(
        'model = "x"\n[[methods]]\nmethod = "grasp"\n[methods.sweep]\nratio ='
        f" [{values}]\nretain_ratio = [{values}]\nseed = [{', '.join(map(str, range(256)))}]\n"
    )
    outcome = command("compare", path, "--dry-run", "-o", tmp_path / "r.json")
    assert (
        outcome.error
        == f"{path}: methods table 1: its sweep brings the cells to 16,777,216; at most 1,000 are"
        " allowed, sweep fewer values"
    )


def test_as_many_cells_as_there_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "MOST_CELLS", 6)
    path = tmp_path / "e.toml"
    one = '[[methods]]\nmethod = "shortgpt"\nnum_layers = {}\n[methods.sweep]\nseed = [1, 2, 3]\n'
    path.write_text('model = "x"\ndense = false\n' + one.format(1) + one.format(2))
    assert len(read_experiment(path).cells) == 6
    path.write_text(path.read_text() + one.format(3))
    with pytest.raises(
        RecipeError, match="methods table 3: its sweep brings the cells to 9; at most 6"
    ):
        read_experiment(path)


def test_fields_that_are_not_of_the_result_are_no_recipe_keys():
    written = {
        field.name
        for method in available().values()
        for field in declared(method).values()
        if not field.recipe
    }
    assert written == {"scratch"}
