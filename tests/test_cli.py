"""The command line as a user calls it: tables on stderr, one JSON object on stdout, recipes that
repeat, a light start.
"""

import contextlib
import io
import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
import pytest
from PIL import Image
from safetensors.torch import load_file

import grasp
from grasp import cli
from grasp.core.families import FAMILIES
from grasp.core.fields import declared
from grasp.core.results import Results
from grasp.evaluation import bench as benching
from grasp.evaluation import hardware
from grasp.methods import available

SMALL = ("--num-samples", "3", "--seq-len", "32")


@dataclass
class Outcome:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one JSON object, which must be all there is on stdout."""
        assert self.status == 0, self.err
        [line] = self.out.splitlines()
        value = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The one line that a mistake ends in; nothing else may have been printed."""
        assert self.status == 2 and self.out == "" and "Traceback" not in self.err, self.err
        [line] = self.err.splitlines()
        assert line.startswith("grasp: error: ")
        return line.removeprefix("grasp: error: ")


def command(*arguments: object) -> Outcome:
    """Run `grasp ...` in this process, as its entry point would."""
    out, err, root = io.StringIO(), io.StringIO(), logging.getLogger()
    handlers, level, status = root.handlers[:], root.level, 0
    argv = mock.patch.object(sys, "argv", ["grasp", *map(str, arguments)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
        except Exception:  # what the interpreter does with it
            traceback.print_exc()
            status = 1
        finally:
            root.handlers[:], root.level = handlers, level
    return Outcome(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def made(model_directory, text_file, tmp_path_factory) -> tuple[Path, Outcome]:
    """(OUT, outcome) of one `grasp compress` by the paper's method."""
    out = tmp_path_factory.mktemp("made") / "small"
    flags = (
        "--method",
        "grasp",
        "--layers",
        "1,3",
        "--retain-ratio",
        "0.3",
        "--seed",
        "5",
        "--data",
        text_file,
        *SMALL,
    )
    return out, command("compress", model_directory, out, *flags, "--json")


def edits(out: Path) -> list[dict]:
    return json.loads((out / "grasp.json").read_text())["edits"]


# --- verbs


def test_compress_says_what_it_did(made, model_directory):
    out, outcome = made
    said, manifest = outcome.json, json.loads((out / "grasp.json").read_text())
    assert Path(said["path"]) == out and said["parameters"] == manifest["parameters"]
    assert said["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert said["recipe"]["layers"] == [1, 3] and said["recipe"]["seed"] == 5
    stored = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert said["parameters"]["after"] == stored < said["parameters"]["before"]
    assert f"{stored:,}" in outcome.err and "14 low-rank matrices" in outcome.err


def test_the_default_method_is_grasp_fisher(model_directory, text_file, tmp_path):
    """Its pairs are pivoted, its MLPs may be narrower, and the manifest says so and what loss that
    is expected to cost.
    """
    said = command(
        "compress",
        model_directory,
        tmp_path / "out",
        "--ratio",
        "0.2",
        "--data",
        text_file,
        *SMALL,
        "--json",
    ).json
    manifest = json.loads((tmp_path / "out" / "grasp.json").read_text())
    assert said["recipe"]["method"] == manifest["method"]["name"] == "grasp-fisher"
    assert all(
        edit["note"]["predicted_loss"] >= 0 and (edit["edit"] == "narrow" or edit["pivoted"])
        for edit in manifest["edits"]
    )
    assert manifest["prediction"]["loss_rise"] == pytest.approx(
        sum(edit["note"]["predicted_loss"] for edit in manifest["edits"])
    )
    # 80: one rank of the widest matrix
    assert 0.2 <= said["parameters"]["ratio"] < 0.2 + 80 / said["parameters"]["before"]


def test_the_default_method_takes_the_most_redundant_layers(model_directory, text_file, tmp_path):
    flags = ("--layers", "bi", "--num-layers", "2", "--retain-ratio", "0.3")
    said = command(
        "compress", model_directory, tmp_path / "out", *flags, "--data", text_file, *SMALL, "--json"
    ).json
    scores = json.loads((tmp_path / "out" / "grasp.json").read_text())["redundancy"]["bi"]
    assert {edit["path"].split(".")[2] for edit in edits(tmp_path / "out")} == set(
        sorted(scores, key=lambda layer: scores[layer])[:2]
    )
    chosen = 2 * (32 * (32 + 32 + 16 + 16) + 3 * 32 * 48)  # numbers in two layers
    removed = said["parameters"]["before"] - said["parameters"]["after"]
    assert 0 <= removed - 0.7 * chosen < 80


def test_the_path_is_shown_as_it_is(model_directory, text_file, tmp_path):
    """Brackets in a name are no markup."""
    outcome = command(
        "compress",
        model_directory,
        tmp_path / "a[b]",
        "--ratio",
        "0.1",
        "--data",
        text_file,
        *SMALL,
    )
    assert outcome.status == 0 and "a[b]" in "".join(outcome.err.split())


def test_eval_of_the_result(made, model_directory, text_file, tmp_path):
    out, outcome = made
    flags = ("--ppl", text_file, "--seq-len", "64", "--num-blocks", "2")
    said = command(
        "eval",
        out,
        "--against",
        model_directory,
        *flags,
        "--generate",
        "--new-tokens",
        "3",
        "-o",
        tmp_path / "r.json",
        "--json",
    )
    dense, small = said.json["rows"]
    assert (dense["parameters"], small["parameters"]) == tuple(
        outcome.json["parameters"][key] for key in ("before", "after")
    )
    score = small["scores"][0]
    assert (score["seq_len"], score["num_blocks"], score["num_tokens"]) == (64, 2, 2 * 63)
    assert score["value"] > 0 and score["value"] != dense["scores"][0]["value"]
    for shown in (
        f"{score['value']:.3f}",
        "KL (nats/token)",
        "top-1 agreement",
        "bits/byte",
        "LEAKAGE",
        "2 blocks, 126 tokens counted",
        "def fibonacci(n):",
    ):
        assert shown in said.err, shown
    assert json.loads((tmp_path / "r.json").read_text()) == said.json
    alone = command("eval", model_directory, *flags, "--json").json
    assert alone["rows"][0]["scores"][0]["value"] == pytest.approx(
        dense["scores"][0]["value"], rel=1e-6
    )


@pytest.mark.parametrize("output", ["nowhere/r.json", "r.txt", "."])
def test_eval_checks_its_output_first(output, model_directory, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = command("eval", model_directory, "--ppl", text_file, "-o", output)
    assert outcome.status == 2 and f"--output {output}" in outcome.error


def test_bench_beside_the_dense_model(made, model_directory, tmp_path, monkeypatch):
    """Both models' speeds in one JSON line and one file, which a report shows. (The bandwidth from
    a small buffer, memory without new processes.)
    """
    monkeypatch.setattr(hardware, "BUFFER", {"cpu": 1 << 16})
    monkeypatch.setattr(
        benching, "peak_memory", lambda *_: {"peak": 7_000, "before_loading": 5_000}
    )
    out, _ = made
    flags = ("--batch-sizes", "1", "--prompt-len", "8", "--new-tokens", "4", "--rounds", "1")
    said = command(
        "bench",
        out,
        "--against",
        model_directory,
        *flags,
        "--json",
        "-o",
        tmp_path / "results.json",
    )
    dense, small = said.json["rows"]
    assert (dense["label"], small["label"]) == ("tiny-llama", "small") and small[
        "parameters"
    ] < dense["parameters"]
    for row in (dense, small):
        speeds = {score["name"]: score for score in row["scores"]}
        for name in ("prefill", "decode"):
            setting = {
                "unit": "tokens/s",
                "batch_size": 1,
                "prompt_len": 8,
                "new_tokens": 4,
                "rounds": 1,
            }
            assert speeds[name]["value"] > 0 and setting.items() <= speeds[name].items()
    ratio = next(score for score in small["scores"] if score["name"] == "decode vs dense")
    shown = (
        "batch size 1",
        "decode, tokens/s",
        "share of memory",
        "8 tokens read, 4 written",
        f"{ratio['value']:.2f} [",
    )
    assert all(words in said.err for words in shown), said.err
    assert Results.read(tmp_path / "results.json").to_json() == said.json
    assert command("report", tmp_path / "results.json", "-o", tmp_path / "page.html").status == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "tiny-llama" in page and "prefill" in page.lower() and "decode" in page.lower()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--prompt-len", "100000"), ("--prompt-len 100000", "128 positions", "at most 124")),
        (("--batch-sizes", "x"), ("--batch-sizes x", "whole numbers")),
        (("--batch-sizes", "1,0"), ("--batch-sizes 0", "from 1 to")),
        (("-o", "r.txt"), ("--output r.txt", ".json")),
    ],
)
def test_a_bad_value_of_bench_is_one_line(flags, said, model_directory):
    error = command("bench", model_directory, "--new-tokens", "4", *flags).error
    assert all(part in error for part in said), error


@pytest.mark.parametrize("flags", [(), ("--angular",)])
def test_inspect_draws_a_picture_and_changes_nothing(flags, model_directory, text_file, tmp_path):
    before = {file: file.read_bytes() for file in Path(model_directory).iterdir()}
    picture = tmp_path / "seen.png"
    said = command(
        "inspect", model_directory, "-o", picture, "--data", text_file, *SMALL, *flags, "--json"
    ).json
    assert sorted(said["most_redundant_first"]) == [0, 1, 2, 3] and set(said["scores"]) == {
        "0",
        "1",
        "2",
        "3",
    }
    assert said["most_redundant_first"][0] == min(
        range(4), key=lambda layer: said["scores"][str(layer)]
    )
    with Image.open(picture) as image:
        dark, light = image.convert("L").getextrema()
        assert dark < 64 and light == 255 and len(image.convert("RGB").getcolors(1 << 20)) > 8
    assert {file: file.read_bytes() for file in Path(model_directory).iterdir()} == before


def test_lists_of_what_there_is():
    assert set(command("methods", "--json").json) == set(available())
    assert set(command("families", "--json").json) == {family.name for family in FAMILIES}
    said = command("data", "--json").json
    assert {"pydoc", "self", "wikitext2", "ptb", "c4", "alpaca"} <= set(
        said["named"]
    ) and ".jsonl.gz" in said["file_types"]


@pytest.mark.parametrize("verb", ["methods", "families", "data"])
def test_without_json_stdout_is_empty(verb):
    outcome = command(verb)
    assert outcome.status == 0 and outcome.out == "" and len(outcome.err.splitlines()) > 3


def shown_flags(text: str) -> set[str]:
    """The flags that a help text has a line for."""
    return {line.split()[0] for line in text.splitlines() if line.startswith("  --")}


@pytest.mark.parametrize("name", available())
def test_the_help_shows_the_flags_of_the_method_and_no_other(name):
    shown = command("compress", "--method", name, "--help").out
    own = {one.flag for one in declared(available()[name]).values()}
    others = {one.flag for other in available().values() for one in declared(other).values()}
    assert f"Flags of --method {name}:" in shown and available()[name].about()[:40] in shown
    assert shown_flags(shown) & others == own
    assert "grasp compress --method NAME --help" in shown
    assert all(other in shown for other in available())
    assert {"--data", "--num-samples", "--device", "--config"} <= shown_flags(shown)


def test_the_help_is_of_the_default_method_or_of_the_recipes(tmp_path):
    assert "Flags of --method grasp-fisher:" in command("compress", "--help").out
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('method = "shortgpt"\n')
    for flags in (("--help", "--config", recipe), ("--config", recipe, "--help")):
        assert "Flags of --method shortgpt:" in command("compress", *flags).out
    assert "--method x: unknown" in command("compress", "--method", "x", "--help").error


@pytest.mark.parametrize("columns", [60, 100])
def test_the_help_fits_into_a_terminal(columns):
    for verb, one in cli.cli.commands.items():
        context = click.Context(one, info_name=f"grasp {verb}", terminal_width=columns)
        assert max(map(len, one.get_help(context).splitlines())) <= columns, verb


# --- dry run


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "grasp", "--num-layers", "2"),
        ("--method", "grasp", "--ratio", "0.2"),
        ("--method", "grasp", "--ratio", "0.2", "--rank-multiple", "4", "--angular"),
        ("--method", "grasp", "--layers", "0,2", "--projections", "mlp", "--retain-ratio", "0.4"),
        ("--method", "shortgpt", "--ratio", "0.2"),
        ("--method", "shortgpt", "--layers", "2"),
    ],
    ids=" ".join,
)
def test_a_dry_run_writes_nothing_and_knows_the_size(flags, model_directory, text_file, tmp_path):
    given = (*flags, "--data", text_file, *SMALL, "--json")
    dry = command("compress", model_directory, tmp_path / "out", *given, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    real = command("compress", model_directory, tmp_path / "out", *given).json["parameters"]
    assert (dry.json["parameters_before"], dry.json["parameters_after"]) == (
        real["before"],
        real["after"],
    )
    assert dry.json["num_edits"] == len(edits(tmp_path / "out"))
    assert f"{real['after']:,}" in dry.err


def test_a_dry_run_of_the_default_method_knows_size_and_loss(model_directory, text_file, tmp_path):
    """Ranks follow from the losses: the size is met to within one rank, and the perplexity expected
    is the one the manifest then names.
    """
    given = ("--ratio", "0.2", "--data", text_file, *SMALL, "--json")
    dry = command("compress", model_directory, tmp_path / "out", *given, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    real = command("compress", model_directory, tmp_path / "out", *given).json["parameters"]
    assert (
        dry.json["parameters_before"] == real["before"]
        and 0 <= dry.json["parameters_after"] - real["after"] < 80
    )
    found = json.loads((tmp_path / "out" / "grasp.json").read_text())["prediction"]
    expected = dry.json["expected_perplexity"]["0.2"]
    assert expected == pytest.approx(math.exp(found["loss_before"] + found["loss_rise"]), rel=1e-3)
    assert f"{expected:.2f}" in dry.err


def test_a_dry_run_knows_the_size_of_a_compressed_model(made, text_file, tmp_path):
    given = ("--method", "grasp", "--layers", "0", "--data", text_file, *SMALL, "--json")
    dry = command("compress", made[0], tmp_path / "out", *given, "--dry-run").json
    real = command("compress", made[0], tmp_path / "out", *given).json["parameters"]
    assert (dry["parameters_before"], dry["parameters_after"]) == (real["before"], real["after"])


def test_a_dry_run_refuses_what_the_run_would(model_directory, tmp_path):
    out = tmp_path / "out"
    for method in (
        ("--method", "grasp", "--num-layers", "1"),
        ("--layers", "bi", "--num-layers", "1", "--ratio", "0.1"),
    ):
        for flags in (
            ("--dtype", "flaot32"),
            ("--device", "cdua"),
            ("--num-layers", "7"),
            ("--seq-len", "1000"),
        ):
            given = (*method, *SMALL, *flags, "--dry-run")
            assert " ".join(flags) in command("compress", model_directory, out, *given).error, given


# --- recipes


def recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_recipe_is_read_and_the_command_line_wins(model_directory, text_file, tmp_path):
    lines = (
        'method = "grasp"',
        "num-layers = 1",
        "retain_ratio = 0.3",
        "seed = 9",
        'projections = ["q", "down"]',
        f'data = "{text_file}"',
    )
    config = recipe(
        tmp_path / "recipe.toml", "\n".join((*lines, "num-samples = 2", "seq-len = 16"))
    )
    said = command(
        "compress",
        "--config",
        config,
        model_directory,
        tmp_path / "out",
        "--seed",
        "4",
        "--retain-ratio",
        "0.2",
        "--json",
    ).json
    assert said["recipe"] == {
        "model": model_directory,
        "method": "grasp",
        "num_layers": 1,
        "retain_ratio": 0.2,
        "projections": ["q", "down"],
        "data": text_file,
        "num_samples": 2,
        "seq_len": 16,
        "seed": 4,
    }


def test_a_dry_run_of_a_recipe(model_directory, text_file, tmp_path):
    config = recipe(tmp_path / "recipe.toml", 'method = "grasp"\nnum-layers = 1\nseq-len = 32\n')
    assert (
        command(
            "compress", "--config", config, model_directory, tmp_path / "out", "--dry-run", "--json"
        ).json["num_layers"]
        == 1
    )


def test_an_unknown_key_of_a_recipe(model_directory, tmp_path):
    config = recipe(tmp_path / "recipe.toml", "retain_rato = 0.2\n")
    error = command(
        "compress", "--config", config, model_directory, tmp_path / "out", "--num-layers", "1"
    ).error
    assert (
        f"--config {config}" in error
        and "'retain_rato'" in error
        and "did you mean 'retain_ratio'?" in error
    )


@pytest.mark.parametrize("content", ["a = = 1", "[1, 2]", '{"recipe": 3}', "\xff"])
@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_an_unreadable_recipe(content, suffix, model_directory, tmp_path):
    config = tmp_path / f"recipe{suffix}"
    config.write_bytes(content.encode("latin-1"))
    assert (
        f"--config {config}"
        in command("compress", "--config", config, model_directory, tmp_path / "out").error
    )


def test_a_missing_recipe(model_directory, tmp_path):
    assert (
        "--config nowhere.toml"
        in command("compress", "--config", "nowhere.toml", model_directory, tmp_path / "out").error
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--method grasp --layers 1,3 --retain-ratio 0.3",
        "--layers 1,3 --retain-ratio 0.3",
        "--layers bi --num-layers 1 --ratio 0.1 --exclude k",
    ],
)
def test_the_manifest_of_a_checkpoint_repeats_it(flags, model_directory, text_file, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    first = command(
        "compress",
        model_directory,
        out,
        *flags.split(),
        "--seed",
        "5",
        "--data",
        text_file,
        *SMALL,
        "--json",
    ).json
    second = command(
        "compress", "--config", out / "grasp.json", model_directory, again, "--json"
    ).json
    assert second["recipe"] == first["recipe"]
    assert edits(again) == edits(out)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        "--method grasp --ratio 0.2 --score taylor-per-sample --angular --sigma-split left",
        (
            "--method grasp --layers 0,2 --threshold-ratio 0.5 --iterative --projections q,mlp"
            " --dtype bfloat16"
        ),
        "--method shortgpt --num-layers 1",
        "--ratio 0.2",
        (
            "--layers bi --num-layers 2 --retain-ratio 0.3 --basis input --storage pair --dtype"
            " bfloat16"
        ),
        (
            "--layers 0,2 --ratio 0.1 --exclude k,v --score random --allocation per-layer"
            " --rank-multiple 2"
        ),
    ],
)
def test_the_repeat_command_of_the_model_card_repeats_it(
    flags, model_directory, text_file, tmp_path, monkeypatch
):
    given = (*flags.split(), "--data", text_file, *SMALL, "--seed", "2")
    first = command("compress", model_directory, tmp_path / "small one", *given, "--json").json
    card = (tmp_path / "small one" / "README.md").read_text()
    [repeat] = re.findall(r"## Repeat\n\n```\n(.*)\n```", card)
    assert shlex.split(repeat)[0] == "grasp"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = command(*shlex.split(repeat)[1:], "--json").json
    assert again["recipe"] == first["recipe"]
    assert edits(Path(again["path"])) == edits(tmp_path / "small one")


# --- mistakes; more of them in test_faults.py


@pytest.mark.parametrize(
    ("flags", "flag", "method", "owners"),
    [
        (
            "--method shortgpt --num-layers 1 --retain-ratio 0.1",
            "--retain-ratio",
            "shortgpt",
            "asvd, fwsvd, grasp, grasp-fisher, magnitude-svd, obd-llm, svd-llm",
        ),
        ("--method grasp --num-layers 1 --basis input", "--basis", "grasp", "grasp-fisher"),
        ("--ratio 0.2 --iterative", "--iterative", "grasp-fisher", "grasp"),
        ("--ratio 0.2 --angular", "--angular", "grasp-fisher", "grasp, shortgpt"),
    ],
)
def test_a_flag_of_another_method_says_whose_it_is(
    flags, flag, method, owners, model_directory, tmp_path
):
    error = command("compress", model_directory, tmp_path / "out", *flags.split()).error
    assert error == f"{flag}: not a flag of --method {method}; it belongs to {owners}"


@pytest.mark.parametrize("flags", ["--layers bi", "--layers all"])
def test_layers_of_the_papers_method_are_numbers(flags, model_directory, tmp_path):
    error = command(
        "compress", model_directory, tmp_path / "out", "--method", "grasp", *flags.split()
    ).error
    assert error == f"{flags}: not a list of whole numbers; write it like 21,22,25"


def test_debug_shows_the_traceback_and_the_status_stays(model_directory, tmp_path):
    given = (
        "compress",
        model_directory,
        tmp_path / "out",
        "--method",
        "grasp",
        "--layers",
        "7",
        *SMALL,
    )
    assert "--layers 7" in command(*given).error
    outcome = command(*given, "--debug")
    assert "Traceback (most recent call last)" in outcome.err and "RecipeError" in outcome.err
    assert outcome.status == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seq-len", "long"), ("--seq-len", "long")),
        (("--method", "grasp", "--layers", "1,x"), ("--layers", "1,x", "21,22")),
        (("--ratio", "0.2", "--layers", "1,x"), ("--layers", "1,x", "21,22")),
        (("--retain-raito", "0.1"), ("--retain-raito", "--retain-ratio")),
    ],
)
def test_a_flag_that_cannot_be_parsed_is_one_line_too(words, said, model_directory, tmp_path):
    error = command("compress", model_directory, tmp_path / "out", *words).error
    assert all(part in error for part in said)


def test_an_unknown_verb_is_one_line_too():
    assert "comprss" in command("comprss").error


# --- a light start


def fresh(*words: str) -> tuple[float, set[str], str]:
    """(seconds of processor time, modules imported, stdout) of `python words...`, a new process.
    Other work takes none of that time.
    """
    begin = os.times()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=True
    )
    end = os.times()
    seconds = end.children_user + end.children_system - begin.children_user - begin.children_system
    return seconds, set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE)), done.stdout


HEAVY = {"torch", "transformers", "numpy", "matplotlib"}


def test_help_is_light_and_answers_within_a_third_of_a_second():
    best = 9.0
    for _ in range(8):
        seconds, modules, shown = fresh("-m", "grasp", "--help")
        assert not HEAVY & modules and "compress" in shown
        best = min(best, seconds)
        if best < 0.3:
            break
    assert best < 0.3


def test_importing_grasp_is_light():
    _, modules, _ = fresh("-c", "import grasp; grasp.__version__; dir(grasp)")
    assert "grasp" in modules and not HEAVY & modules


def test_the_checks_of_lightness_can_fail():
    seconds, modules, _ = fresh("-c", "import grasp; grasp.Calibration")
    assert "torch" in modules and seconds > 0.3


def test_every_public_name_is_there():
    assert all(getattr(grasp, name) is not None for name in grasp.__all__)
    with pytest.raises(AttributeError):
        _ = grasp.nothing


# --- results on a page


def test_report_of_a_checkpoint_and_results(made, model_directory, text_file, tmp_path):
    out, _ = made
    command(
        "eval",
        out,
        "--against",
        model_directory,
        "--ppl",
        text_file,
        "--seq-len",
        "64",
        "-o",
        tmp_path / "r.json",
    )
    said = command("report", out, tmp_path / "r.json", "-o", tmp_path / "page.html", "--json").json
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert said == {"path": str(tmp_path / "page.html"), "bytes": len(page.encode())}
    assert "tiny-llama" in page and "top-1 agreement" in page and "LEAKAGE" in page


def test_report_needs_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys; import grasp.verbs.report, grasp.report.html; print([name for name in"
        " ('torch', 'transformers') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("what", ["nowhere", "empty"])
def test_report_of_nothing_names_the_path(what, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (
        str(tmp_path / what)
        in command("report", tmp_path / what, "-o", tmp_path / "page.html").error
    )
    assert not (tmp_path / "page.html").exists()
