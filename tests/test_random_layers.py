"""Method random-layers: which layers go is drawn by the seed, and by nothing else."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from conftest import LAYERS, build

import grasp
from grasp.errors import RecipeError
from grasp.methods import available, make
from grasp.methods.random_layers import RandomLayers

CONTRACT = {"recipe": {"num_layers": 2}, "sizes": ({"ratio": 0.2}, {"num_layers": 3})}


def run(data, name="llama", **fields):
    return grasp.compress(build(name), method="random-layers", data=data, **fields)


def dropped(result):
    assert {edit["edit"] for edit in result.manifest["edits"]} <= {"drop"}
    return {edit["layer"] for edit in result.manifest["edits"]}


def seeded(calibration, seed):
    return grasp.Calibration(calibration.ids, "random", seed)


def test_one_seed_is_one_choice(calibration):
    """Whatever the text and the model's weights; more layers are the same ones and others."""
    for seed in range(3):
        data = seeded(calibration, seed)
        other = grasp.Calibration(calibration.ids[:2].flip(1), "other", seed)
        found = [dropped(run(data, num_layers=count)) for count in range(LAYERS)]
        assert [len(layers) for layers in found] == list(range(LAYERS))
        assert all(one < more for one, more in pairwise(found))
        assert dropped(run(data, num_layers=2)) == dropped(run(other, num_layers=2)) == found[2]
        assert dropped(run(data, "gpt2", num_layers=2)) == found[2]


def test_the_global_generator_is_neither_read_nor_moved(calibration):
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), dropped(run(calibration, num_layers=1))
    torch.manual_seed(99)
    assert dropped(run(calibration, num_layers=1)) == first
    torch.manual_seed(0)
    method = make("random-layers", {"num_layers": 2})
    list(method.edits(_Runner(4, 7), None))
    assert torch.equal(torch.get_rng_state(), before)


class _Runner:
    """Layers and a seed are all that is looked at."""

    def __init__(self, layers, seed):
        self.decoder = self.data = self
        self.kept, self.num_layers, self.seed = list(range(layers)), layers, seed


def test_every_layer_is_drawn_as_often():
    """400 seeds, 3 of 12 layers: 100 times each, give or take four standard deviations."""
    method = RandomLayers(num_layers=3)
    drawn = Counter(
        step.edit.layer for seed in range(400) for step in method.edits(_Runner(12, seed), None)
    )
    assert drawn.keys() == set(range(12))
    assert all(abs(times - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5 for times in drawn.values())


def test_the_rest_is_untouched(calibration):
    result, dense = run(calibration, num_layers=1), build("llama")
    [gone] = dropped(result)
    kept = [layer for layer in range(LAYERS) if layer != gone]
    assert result.model.config.num_hidden_layers == LAYERS - 1
    for place, layer in enumerate(kept):
        expected = dense.model.layers[layer].state_dict()
        for name, value in result.model.model.layers[place].state_dict().items():
            assert torch.equal(value, expected[name])


def test_the_ratio_says_how_many(calibration):
    dense = build("llama")
    layer = sum(p.numel() for p in dense.model.layers[0].parameters())
    share = layer / dense.num_parameters()
    for ratio, count in ((0.0, 0), (share / 2, 1), (share, 1), (1.01 * share, 2), (3 * share, 3)):
        result = run(calibration, ratio=ratio)
        assert len(dropped(result)) == count and result.ratio == pytest.approx(count * share)


def test_only_its_own_flags():
    assert available()["random-layers"] is RandomLayers
    with pytest.raises(RecipeError, match="--angular: not a flag of --method random-layers"):
        make("random-layers", {"num_layers": 1, "angular": True})


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("--method random-layers: say how much .*--ratio, --num-layers; none was given", {}),
        ("got --ratio and --num-layers", {"ratio": 0.1, "num_layers": 1}),
        ("--num-layers 4: the model has 4 layers; at most 3", {"num_layers": LAYERS}),
        ("--ratio 0.9: cannot be reached; .*all layers but one", {"ratio": 0.9}),
    ],
)
def test_mistakes_are_one_line(message, fields, calibration):
    with pytest.raises(RecipeError, match=message):
        run(calibration, **fields)
