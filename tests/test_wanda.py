"""Method wanda: its masks by a loop in plain Python, the order of its sweeps, what it leaves."""

import math

import pytest
import torch
from closeness import same_weights
from conftest import LAYERS, build

import grasp
from grasp.core.decoder import Decoder
from grasp.errors import RecipeError
from grasp.methods import make

CONTRACT = {
    "recipe": {"sparsity": 0.5},
    "sizes": ({"sparsity": "2:4", "layers": (1, 3)}, {"sparsity": 0.3, "one_shot": True}),
    "neutral": {"sparsity": 0.0},
    "flags": {
        "--sparsity": (0.3, ("-0.5", "1", "nan", "inf", "1e400", "x", "1:4", "2:4,4:8")),
        "--one-shot": (True, ()),
    },
}


def run(data, name="llama", model=None, **fields):
    model = build(name) if model is None else model
    return grasp.compress(model, method="wanda", data=data, **fields)


def matrices(model):
    """path -> W (out, in) of every matrix."""
    return {
        linear.path: linear.weight.clone()
        for layer in Decoder(model).layers()
        for linear in layer.linears.values()
    }


def norms(model, layer, data):
    """path -> ||x_j|| of the matrices of one layer, by plain hooks, all tokens at once."""
    found = {}

    def keep(path):
        def hook(_module, inputs):
            real = inputs[0].flatten(0, -2)
            if data.mask is not None:
                real = real[data.mask.flatten()]
            found[path] = real.double().square().sum(0).sqrt()

        return hook

    linears = Decoder(model).layer(layer).linears.values()
    handles = [one.module.register_forward_pre_hook(keep(one.path)) for one in linears]
    with torch.no_grad():
        model(input_ids=data.ids, attention_mask=data.mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def zeros(scores, sparsity, group=None):
    """Columns of one row that go, the lowest first within the row or each group of it."""
    gone = []
    group = group or len(scores)
    for begin in range(0, len(scores), group):
        columns = sorted(range(begin, begin + group), key=lambda j: scores[j])
        gone += columns[: int(group * sparsity + 1e-9)]
    return set(gone)


def check_layer(found, dense, norm, sparsity, group):
    """The matrices of a layer as they were found, against the loop. Which of two scores that differ
    in the seventh place goes, is left open.
    """
    for path, size in norm.items():
        scores = dense[path].double().abs() * size
        for i, row in enumerate(scores.tolist()):
            gone = {j for j, value in enumerate(found[path][i].tolist()) if value == 0}
            expected = zeros(row, sparsity, group)
            assert len(gone) == len(expected), (path, i)
            for one, other in zip(
                sorted(row[j] for j in gone), sorted(row[j] for j in expected), strict=True
            ):
                assert math.isclose(one, other, rel_tol=1e-5), (path, i)
        kept = found[path] != 0
        assert torch.equal(found[path][kept], dense[path][kept]), path


@pytest.mark.parametrize(
    ("fields", "sparsity", "group"),
    [
        ({}, 0.5, None),
        ({"sparsity": 0.3}, 0.3, None),
        ({"sparsity": "2:4"}, 0.5, 4),
        ({"sparsity": "4:8"}, 0.5, 8),
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_masks_are_those_of_a_loop(name, fields, sparsity, group, calibration):
    """Layer by layer: the inputs of one come from the pruned ones before it and the dense matrices
    of its own.
    """
    found = matrices(run(calibration, name, **fields).model)
    model, dense = build(name), matrices(build(name))
    for layer in range(LAYERS):
        norm = norms(model, layer, calibration)
        check_layer(found, dense, norm, sparsity, group)
        for linear in Decoder(model).layer(layer).linears.values():
            linear.weight.copy_(found[linear.path])


def test_one_shot_scores_the_dense_model(calibration):
    dense = build("llama")
    once = matrices(run(calibration, one_shot=True).model)
    for layer in range(LAYERS):
        norm = norms(dense, layer, calibration)
        check_layer(once, matrices(dense), norm, 0.5, None)
    stepwise = matrices(run(calibration).model)
    differ = [path for path in once if not torch.equal(once[path], stepwise[path])]
    assert differ and not any(".layers.0." in path for path in differ)


def test_padding_is_not_read(calibration):
    mask = torch.arange(20) < torch.tensor([20, 13, 20, 20, 2, 18])[:, None]
    data = grasp.Calibration(calibration.ids, "random", mask=mask)
    found, dense = matrices(run(data, one_shot=True).model), build("llama")
    for layer in range(LAYERS):
        check_layer(found, matrices(dense), norms(dense, layer, data), 0.5, None)


@pytest.mark.parametrize(("one_shot", "sweeps"), [(False, 3), (True, 1)])
def test_it_sweeps_as_often_as_it_says(one_shot, sweeps, calibration, layer_runs):
    """Layer by layer, each but the last two runs twice: for itself and for the next."""
    model = build("llama")
    seen = layer_runs(model)
    chosen = make("wanda", {"one_shot": one_shot})
    plan = chosen.plan(Decoder(model))
    assert (plan.forward_sweeps, plan.backward_sweeps) == (sweeps, 0)
    run(calibration, model=model, one_shot=one_shot)
    runs = LAYERS if one_shot else LAYERS + 2 * LAYERS - 1
    assert len(seen) == runs * calibration.num_blocks
    assert sweeps - 1 < runs / LAYERS <= sweeps


@pytest.mark.parametrize(("pattern", "group"), [("2:4", 4), ("4:8", 8)])
def test_half_of_every_group_is_zero(pattern, group, calibration):
    """Exactly, in every group of every row."""
    for weight in matrices(run(calibration, sparsity=pattern).model).values():
        counts = (weight.unflatten(1, (-1, group)) == 0).sum(-1)
        assert bool((counts == group // 2).all())


def test_a_scope(calibration):
    result, dense = run(calibration, layers=(1, 2), exclude="k,v"), matrices(build("llama"))
    edited = {edit["path"] for edit in result.manifest["edits"]}
    assert len(edited) == 2 * 5
    for path, weight in matrices(result.model).items():
        assert torch.equal(weight, dense[path]) == (path not in edited)
    by_influence = run(calibration, layers="bi", num_layers=1).manifest
    scores = by_influence["redundancy"]["bi"]
    assert {edit["path"].split(".")[2] for edit in by_influence["edits"]} == {
        min(scores, key=scores.get)
    }


def test_nothing_becomes_smaller_and_that_is_said(calibration, tmp_path, caplog):
    """A plain checkpoint that transformers loads, and generates with."""
    result = grasp.compress(build("llama"), tmp_path / "out", method="wanda", data=calibration)
    assert result.ratio == 0 and result.parameters_after == result.parameters_before
    assert {edit["how"] for edit in result.manifest["edits"]} == {"masked 50 %"}
    assert "no smaller" in caplog.text
    assert "no smaller" in (tmp_path / "out" / "README.md").read_text()
    again = grasp.load(tmp_path / "out").model
    assert same_weights(again, result.model)
    share = [float((weight == 0).float().mean()) for weight in matrices(again).values()]
    assert share == [0.5] * len(share)
    text = again.generate(calibration.ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=258)
    assert text.shape[1] == calibration.ids.shape[1] + 4


def test_an_input_that_is_never_read_goes_first(calibration):
    """Norm 0: score 0, whatever the weight."""
    method = make("wanda", {"sparsity": 0.25})
    weight = torch.tensor([[9.0, 1.0, 2.0, 3.0], [1.0, 2.0, -0.5, 4.0]])
    assert method.mask(weight, torch.tensor([0.0, 1.0, 1.0, 1.0])).tolist() == [
        [False, True, True, True],
        [False, True, True, True],
    ]
    assert method.mask(weight, torch.ones(4)).tolist() == [
        [True, False, True, True],
        [True, True, False, True],
    ]


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--sparsity 1: must be at least 0 and below 1, or one of 2:4, 4:8", {"sparsity": 1}),
        ("--sparsity 1:4: must be at least 0 and below 1, or one of 2:4, 4:8", {"sparsity": "1:4"}),
        ("--pattern: not a flag of --method wanda", {"pattern": "2:4"}),
        ("--ratio: not a flag of --method wanda", {"ratio": 0.5}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)


def test_a_row_that_groups_do_not_fill(calibration):
    class Narrow:
        path, shape = "model.layers.0.mlp.up_proj", (4, 30)

    method = make("wanda", {"sparsity": "2:4"})
    object.__setattr__(method, "linears", lambda *_: [Narrow])
    with pytest.raises(RecipeError, match="up_proj' has 30 inputs, not a multiple of 4"):
        method.check(Decoder(build("llama")))
