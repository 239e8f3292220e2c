"""A method of the user's own, in a file or in a package: run by the command line, shown among the
others, and one line where it is wrong.
"""

import importlib.metadata
import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import SMALL, command

import grasp
from grasp import methods
from grasp.errors import RecipeError
from grasp.methods import plugin as plugins

METHOD = '''"""Magnitude pruning: the smallest weights of every matrix become 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grasp.core.edits import Rewrite, Step
from grasp.core.fields import Share, flag
from grasp.methods.base import Method, Plan


@dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """Set the smallest weights to 0."""

    name: ClassVar[str] = "magnitude"
    paper: ClassVar[str] = "https://arxiv.org/abs/1506.02626"

    sparsity: Share = flag(0.5, "Share of each matrix's numbers that become 0.")
    harder: bool = False

    def plan(self, decoder):
        return Plan(decoder.num_layers, 1, decoder.num_parameters(), 0, 0)

    def needs(self, decoder):
        return []

    def edits(self, runner, stats):
        for layer in runner.decoder.layers():
            for linear in layer.linears.values():
                with runner.holding(layer.index):
                    weight = linear.weight.clone()
                count = int(self.sparsity * weight.numel())
                least = weight.abs().flatten().kthvalue(count).values
                weight[weight.abs() <= least] = 0
                yield Step(Rewrite(linear.path, weight, how=f"{self.sparsity} zeros"))
'''


@pytest.fixture
def plugin(tmp_path) -> Path:
    path = tmp_path / "my method.py"
    path.write_text(METHOD)
    return path


def test_a_method_in_a_file_is_run_and_repeated(
    plugin, model_directory, text_file, tmp_path, monkeypatch
):
    """By its flag alone; the card's command names the file too, from wherever it is given."""
    monkeypatch.chdir(tmp_path)
    said = ("--plugin", plugin.name, "--method", "magnitude", "--sparsity", "0.3", "--harder")
    given = (*said, "--data", text_file, *SMALL)
    out = tmp_path / "out"
    done = command("compress", model_directory, out, *given, "--json").json
    assert (done["recipe"]["method"], done["recipe"]["sparsity"]) == ("magnitude", 0.3)
    assert "plugin" not in done["recipe"]  # so that a recipe never runs code
    saved = load_file(out / "model.safetensors")
    zeros = saved["model.layers.1.mlp.up_proj.weight"] == 0
    assert float(zeros.float().mean()) == pytest.approx(0.3, abs=0.01)
    told = json.loads((out / "grasp.json").read_text())
    assert told["method"]["plugin"] == str(plugin) and told["method"]["harder"] is True
    [repeat] = re.findall(r"## Repeat\n\n```\n(.*)\n```", (out / "README.md").read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = command(*shlex.split(repeat)[1:], "--json").json
    assert again["recipe"] == done["recipe"]
    found = load_file(Path(again["path"]) / "model.safetensors")
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_the_recipe_of_a_plugins_checkpoint_needs_the_plugin_named(
    plugin, model_directory, text_file, tmp_path
):
    config = tmp_path / "recipe.toml"
    config.write_text(
        f'method = "magnitude"\nsparsity = 0.2\ndata = "{text_file}"\nnum_samples = 2\nseq_len ='
        " 16\n"
    )
    words = ("compress", model_directory, tmp_path / "out", "--config", config)
    assert "--method magnitude: unknown" in command(*words).error
    assert command(*words, "--plugin", plugin, "--json").json["recipe"]["sparsity"] == 0.2
    config.write_text(f'plugin = "{plugin}"\n')
    assert "only the command line may say --plugin" in command(*words).error


def test_an_experiment_runs_no_plugin(plugin, model_directory, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        f'model = "{model_directory}"\n[[methods]]\nmethod = "shortgpt"\nnum_layers = 1\nplugin ='
        f' "{plugin}"\n'
    )
    assert "--plugin: not a flag of" in command("compare", path, "--dry-run").error


def test_python_takes_it_too(plugin, model_directory, text_file, tmp_path):
    done = grasp.compress(
        model_directory,
        plugin=plugin,
        method="magnitude",
        sparsity=0.9,
        data=text_file,
        num_samples=2,
        seq_len=16,
    )
    assert len(done.log) == 28 and done.ratio == 0
    with pytest.raises(RecipeError, match="--method magnitude: unknown"):
        grasp.compress(model_directory, method="magnitude")


def test_it_is_shown_among_the_others(plugin, model_directory, tmp_path):
    words = command("compress", "--plugin", plugin, "--method", "magnitude", "--help").out.split()
    shown = " ".join(words)
    assert "Flags of --method magnitude:" in shown and "--sparsity FLOAT" in shown
    assert "Set the smallest weights to 0." in shown and "[default: 0.5]" in shown
    assert f"{', '.join(methods.available())}, magnitude" in shown
    assert "--sparsity" not in command("compress", "--plugin", plugin, "--help").out
    assert not re.search(r", magnitude(?!-)", " ".join(command("compress", "--help").out.split()))
    listed = command("methods", "--plugin", plugin, "--json").json
    assert set(listed) == {*methods.available(), "magnitude"}
    assert listed["magnitude"]["fields"]["sparsity"].startswith("Share of each")
    words = ("compress", model_directory, tmp_path / "out", "--plugin", plugin)
    said = command(*words, "--method", "magnitud").error
    assert "magnitude; did you mean 'magnitude'?" in said
    assert (
        "it belongs to sparsegpt, wanda, magnitude"
        in command(*words, "--ratio", "0.1", "--sparsity", "0.1").error
    )
    assert "--sparsity 7" in command(*words, "--method", "magnitude", "--sparsity", "7").error
    planned = command(*words, "--method", "magnitude", "--dry-run", *SMALL)
    assert planned.status == 0, planned.err
    assert (
        "'--sparsiti'" in command(*words, "--method", "magnitude", "--sparsiti", "1").error.lower()
    )


WRONG = {
    "no such file; give a Python file": None,
    "defines no method; one is a dataclass that inherits grasp.Method and has a name": "x = 1\n",
    "a method called 'shortgpt' is there already; give Magnitude another name": METHOD.replace(
        '"magnitude"', '"shortgpt"'
    ),
    "line 3: ZeroDivisionError: division by zero": "def f():\n    pass\n1 / 0\n",
    "line 2: SyntaxError: ": "x = 1\ndef\n",
    "line 1: ModuleNotFoundError: No module named 'nowhere'": "import nowhere\n",
    "line 1: SystemExit: 3": "raise SystemExit(3)\n",
    "Magnitude lacks needs, plan": METHOD.replace("def needs", "def a").replace(
        "def plan", "def b"
    ),
    "Magnitude lacks paper": METHOD.replace("paper: ClassVar", "other: ClassVar"),
    "": "x = '\0'\n",  # a SyntaxError, or before Python 3.11.4 a ValueError: its own words
}


@pytest.mark.parametrize("said", WRONG)
def test_a_file_that_is_wrong_is_one_line(said, model_directory, tmp_path):
    path = tmp_path / "mine.py"
    if WRONG[said] is not None:
        path.write_text(WRONG[said])
    before = set(sys.modules)
    for words in (
        ("compress", model_directory, tmp_path / "out", "--plugin", path, "--method", "magnitude"),
        ("methods", "--plugin", path),
    ):
        assert command(*words).error.startswith(f"--plugin {path}: {said}")
    left = {name for name in set(sys.modules) - before if name.startswith("grasp_plugin_")}
    assert all("magnitude" not in name for name in left) and not (tmp_path / "out").exists()


def test_a_folder_is_no_plugin(tmp_path):
    assert f"--plugin {tmp_path}: Is a directory" in command("methods", "--plugin", tmp_path).error


def test_a_file_is_run_once_and_again_when_it_has_changed(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        METHOD + f"\nwith open({str(tmp_path / 'runs')!r}, 'a') as file:\n    file.write('x')\n"
    )
    for _ in range(3):
        found = methods.known(path)["magnitude"]
    assert (tmp_path / "runs").read_text() == "x"
    path.write_text(path.read_text().replace("smallest weights to", "small weights to"))
    assert methods.known(path)["magnitude"].about() != found.about()
    assert (tmp_path / "runs").read_text() == "xx"


@pytest.fixture
def package(monkeypatch):
    """`package(text, *names)`: an installed package with that module, which announces the names."""

    def install(text: str, *names: str) -> None:
        module = types.ModuleType("their_package")
        monkeypatch.setitem(sys.modules, "their_package", module)
        exec(text, vars(module))
        points = [
            importlib.metadata.EntryPoint(name, f"their_package:{name}", plugins.GROUP)
            for name in names
        ]
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda group: points if group == GROUP else []
        )
        clear()

    def clear() -> None:
        plugins.of_packages.cache_clear()
        methods.available.cache_clear()

    yield install
    monkeypatch.undo()
    clear()


GROUP = plugins.GROUP


def test_a_package_brings_a_method(package, model_directory, text_file, tmp_path, caplog):
    package(METHOD, "Magnitude")
    assert "magnitude" in command("methods", "--json").json and caplog.text == ""
    given = ("--method", "magnitude", "--sparsity", "0.5", "--data", text_file, *SMALL)
    out = tmp_path / "out"
    command("compress", model_directory, out, *given, "--json").json  # noqa: B018, it checks
    told = json.loads((out / "grasp.json").read_text())
    assert told["method"]["name"] == "magnitude" and "plugin" not in told["method"]


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (METHOD, "Nothing", "Nothing = their_package:Nothing: AttributeError"),
        ("Broken = 3\n", "Broken", "Broken = their_package:Broken: is no grasp.Method"),
        (METHOD.replace("def needs", "def a"), "Magnitude", "Magnitude: lacks needs"),
        (METHOD.replace('"magnitude"', '"grasp"'), "Magnitude", "'grasp' is in grasp already"),
    ],
)
def test_a_broken_entry_point_is_a_warning(text, name, said, package):
    own = methods.available()
    package(text, name)
    done = command("methods", "--json")
    assert set(done.json) == set(own)
    [line] = [line for line in done.err.splitlines() if "WARNING" in line]
    assert said in line and methods.available()["grasp"] is own["grasp"]
