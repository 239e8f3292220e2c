"""The flag that methods share which set weights to zero: a share or a pattern, on the command line,
in Python, in recipes and in experiments.
"""

import json

import numpy
import pytest
import torch
from conftest import build
from test_cli import SMALL, command

import grasp
from grasp.core.decoder import Decoder
from grasp.core.fields import check
from grasp.errors import RecipeError
from grasp.methods import available, make
from grasp.methods.sparse import Pattern, Share, Sparse, lowest
from grasp.recipes.experiment import read_experiment

METHODS = [name for name, method in available().items() if issubclass(method, Sparse)]
of_both = pytest.mark.parametrize("method", METHODS)
as_given = pytest.mark.parametrize(
    ("given", "kept"), [("0.25", 0.25), (0.25, 0.25), (0, 0.0), ("2:4", "2:4"), ("4:8", "4:8")]
)


def test_both_are_here():
    assert METHODS == ["sparsegpt", "wanda"]


@as_given
@of_both
def test_a_share_is_a_number_and_a_pattern_a_text(method, given, kept):
    made = make(method, {"sparsity": given})
    assert made.sparsity == kept and type(made.sparsity) is type(kept)
    assert made.recipe() == {"sparsity": kept}
    assert made.share == (0.5 if isinstance(kept, str) else kept)
    assert made.group == {"2:4": 4, "4:8": 8}.get(kept)
    assert type(available()[method](sparsity=kept).sparsity) is type(kept)


@of_both
def test_half_is_the_default_however_it_is_said(method):
    for fields in ({}, {"sparsity": "0.5"}, {"sparsity": numpy.float32(0.5)}):
        assert make(method, fields).sparsity == 0.5 and make(method, fields).recipe() == {}


@pytest.mark.parametrize("value", ["1:4", "2 of 4", "1", "-0.1", "nan", "inf", True, None, [0.5]])
def test_all_else_is_one_line(value):
    with pytest.raises(RecipeError) as caught:
        check("sparsity", value, Share | Pattern)
    assert str(caught.value).startswith("--sparsity ")
    assert str(caught.value).endswith("must be at least 0 and below 1, or one of 2:4, 4:8")


@pytest.mark.parametrize(("said", "kept"), [("0.25", 0.25), ("4:8", "4:8")])
@of_both
def test_on_the_command_line(method, said, kept, model_directory, text_file, tmp_path):
    """And in a recipe, which may be the grasp.json that it left."""
    words = ("compress", model_directory, "--data", text_file, *SMALL, "--json")
    done = command(*words, tmp_path / "out", "--method", method, "--sparsity", said)
    assert done.status == 0, done.err
    manifest = tmp_path / "out" / "grasp.json"
    first = json.loads(manifest.read_text())
    assert first["recipe"]["sparsity"] == first["method"]["sparsity"] == kept
    assert {edit["how"] for edit in first["edits"]} == {
        "masked 25 %" if kept == 0.25 else "masked 4:8"
    }
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'method = "{method}"\nsparsity = {json.dumps(kept)}\n')
    for number, config in enumerate((recipe, manifest)):
        out = tmp_path / str(number)
        again = command(*words, out, "--config", config)
        assert again.status == 0, again.err
        assert json.loads((out / "grasp.json").read_text())["edits"] == first["edits"]


def test_a_recipe_of_another_kind(model_directory, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('method = "wanda"\nsparsity = [0.5]\n')
    error = command("compress", model_directory, tmp_path / "out", "--config", recipe).error
    assert "'sparsity': must be a number or text, not [0.5]" in error


@of_both
def test_in_an_experiment(method, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        f'model = "smollm2"\n[[methods]]\nmethod = "{method}"\n[methods.sweep]\n'
        'sparsity = [0.25, "2:4"]\n'
    )
    _, *cells = read_experiment(path).cells
    assert [cell.label for cell in cells] == [f"{method} sparsity 0.25", f"{method} sparsity 2:4"]
    assert [cell.fields["sparsity"] for cell in cells] == [0.25, "2:4"]


@of_both
def test_a_row_that_groups_do_not_fill(method):
    class Narrow:
        path, shape = "model.layers.0.mlp.up_proj", (4, 30)

    made = make(method, {"sparsity": "2:4"})
    object.__setattr__(made, "linears", lambda *_: [Narrow])
    with pytest.raises(RecipeError, match=r"--sparsity 2:4: .*up_proj' has 30 inputs, not a multi"):
        made.check(Decoder(build("llama")))


@of_both
def test_what_it_plans(method):
    """A sweep of the dense model, then of each layer for itself and for the next; the statistics of
    one layer at a time.
    """
    decoder = Decoder(build("llama"))
    all_, two, none = (
        make(method, fields).plan(decoder)
        for fields in ({}, {"layers": "bi", "num_layers": 2}, {"sparsity": 0})
    )
    at_once = make(method, {"one_shot": True}).plan(decoder)
    assert (all_.num_layers, all_.num_edits, all_.forward_sweeps) == (4, 28, 3)
    assert (two.num_layers, two.num_edits, two.forward_sweeps) == (2, 14, 2)
    assert (none.num_layers, none.num_edits, none.statistics_bytes) == (0, 0, 0)
    assert (at_once.num_edits, at_once.forward_sweeps) == (28, 1)
    assert all_.statistics_bytes == two.statistics_bytes < at_once.statistics_bytes
    assert {plan.parameters for plan in (all_, two, none)} == {decoder.num_parameters()}


@of_both
def test_the_scope_and_that_nothing_becomes_smaller(method, calibration):
    result = grasp.compress(
        build("llama"), method=method, data=calibration, layers=(1, 2), exclude="k,v", sparsity=0.3
    )
    edited = {edit["path"] for edit in result.manifest["edits"]}
    assert len(edited) == 2 * 5 and result.ratio == 0
    assert {edit["how"] for edit in result.manifest["edits"]} == {"masked 30 %"}
    assert any("no smaller" in note for note in result.manifest["notes"])


def test_the_lowest_of_every_row():
    """Rounded down, but not for what a product of floats lacks; of equal scores the first."""
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert lowest(scores, 0.5).tolist() == [
        [False, True, False, True, False],
        [True, True, False, False, False],
    ]
    assert not lowest(scores, 0.19).any() and int(lowest(torch.ones(1, 100), 0.29).sum()) == 29
