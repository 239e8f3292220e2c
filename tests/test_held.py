"""Passes that begin at states that are held and end where nobody looks give the same statistics as
whole ones, run no layer that is not needed, and notice when the states no longer hold.
"""

import pytest
import torch
from closeness import close
from conftest import FAMILY_ROWS, build, quick

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Rewrite
from grasp.core.runner import Resident
from grasp.stages.closeness import Closeness, LastHidden
from grasp.stages.input_norms import InputNorms


@pytest.fixture(params=["whole", "padded"])
def text(request):
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return grasp.Calibration(ids, "text", mask if request.param == "padded" else None)


def norms(decoder, layer):
    return InputNorms([one.path for one in decoder.layer(layer).linears.values()])


def rewrite(decoder, layer, scale=0.5):
    linear = next(iter(decoder.layer(layer).linears.values()))
    Rewrite(linear.path, scale * linear.weight, how="scaled").apply(decoder)


def check_same(runner, layers, looked=None):
    """The statistics of a layer by the runner, which may hold states, and by another that does
    not.
    """
    decoder, layer = runner.decoder, layers[0] if looked is None else looked
    found = runner.sweep([norms(decoder, layer)], layers=layers)
    expected = Resident(decoder, runner.data).sweep([norms(decoder, layer)])
    assert found.num_tokens == expected.num_tokens
    for path, value in expected["input_norms"].items():
        assert close(found["input_norms"][path], value), path


@pytest.mark.parametrize("name", quick(FAMILY_ROWS))
def test_a_walk_through_the_layers_sees_what_whole_passes_see(name, text):
    """Each layer is changed behind its sweep, as by a sequential method."""
    decoder = Decoder(build(name))
    runner = Resident(decoder, text)
    for layer in decoder.kept:
        check_same(runner, (layer, layer))
        rewrite(decoder, layer)
    assert all("forward" not in vars(one.module) for one in decoder.layers())


def test_no_layer_runs_that_is_not_needed(text, layer_runs):
    decoder = Decoder(build("llama"))
    runner, seen = Resident(decoder, text), layer_runs(decoder)
    blocks = text.num_blocks
    for layer, expected in ((1, [0, 1]), (1, [1]), (2, [1, 2]), (3, [2, 3]), (0, [0])):
        seen.clear()
        runner.sweep([norms(decoder, layer)], layers=(layer, layer))
        assert seen == expected * blocks
        rewrite(decoder, layer)


def test_states_go_when_something_in_front_of_them_changes(text, layer_runs):
    decoder = Decoder(build("llama"))
    runner, seen = Resident(decoder, text), layer_runs(decoder)
    check_same(runner, (2, 2))
    for change in (
        lambda: rewrite(decoder, 1),
        lambda: Drop(1).apply(decoder),
        lambda: decoder.model.get_input_embeddings().weight.mul_(2),
        lambda: setattr(
            decoder.layer(0).module.mlp.up_proj,
            "weight",
            torch.nn.Parameter(decoder.layer(0).module.mlp.up_proj.weight + 1),
        ),
    ):
        with torch.no_grad():
            change()
        seen.clear()
        runner.sweep([norms(decoder, 2)], layers=(2, 2))
        assert 0 in seen
        check_same(runner, (2, 2))


def test_downwards_and_to_the_head(text, layer_runs):
    """Candidates that begin at ever lower layers, then again at a higher one."""
    decoder = Decoder(build("llama"))
    runner, seen = Resident(decoder, text), layer_runs(decoder)
    reference = runner.sweep([LastHidden()])[LastHidden.name]
    for layer, begins in ((3, 0), (2, 0), (1, 0), (3, 3), (2, 2)):
        seen.clear()
        found = runner.sweep([Closeness(reference)], layers=(layer, None))[Closeness.name]
        assert found["cosine"] == pytest.approx(1) and min(seen) == begins


def test_a_part_of_the_blocks_is_held(text, layer_runs):
    """Blocks whose states are missing, as after a run that was killed, are shown from the start."""
    decoder = Decoder(build("llama"))
    runner, seen = Resident(decoder, text), layer_runs(decoder)
    runner.sweep([norms(decoder, 2)], blocks=2, layers=(2, 2))
    seen.clear()
    check_same(runner, (2, 2))
    assert seen[:5] == [2, 2, 0, 1, 2]


def test_nothing_is_held_where_memory_is_short(text, layer_runs, monkeypatch):
    monkeypatch.setattr("grasp.core.held.available_memory", lambda: 1000)
    decoder = Decoder(build("llama"))
    runner, seen = Resident(decoder, text), layer_runs(decoder)
    for _ in range(2):
        seen.clear()
        check_same(runner, (2, 2))
        assert 0 in seen


def test_an_error_leaves_the_model_as_it_was(text):
    decoder = Decoder(build("llama"))
    runner = Resident(decoder, text)

    class Broken(InputNorms):
        def begin(self, block, mask):
            raise RuntimeError("broken")

    before = [dict(vars(one.module)) for one in decoder.layers()]
    with pytest.raises(RuntimeError, match="broken"):
        runner.sweep([Broken(["model.layers.1.mlp.up_proj"])], layers=(1, 1))
    for layer, own in zip(decoder.layers(), before, strict=True):
        assert vars(layer.module).keys() == own.keys()
        assert not layer.module._forward_pre_hooks and not layer.module._forward_hooks
