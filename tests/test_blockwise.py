"""Training one layer after the other: states and calls are those of the model itself, the error is
the one that is named, and what is on the disk or in memory makes no difference.
"""

import json

import pytest
import test_recovery
import torch
from conftest import build
from test_recovery import SMALL, changed, factors, weights

import grasp
from grasp.compensation import blockwise
from grasp.compensation.recipe import Recipe
from grasp.compensation.walk import Walk
from grasp.core.decoder import Decoder
from grasp.data.rows import Collate, Row, Rows, pack_or_pad, read_by_model
from grasp.errors import CheckpointError, RecipeError

alpaca, checkpoints, dense = test_recovery.alpaca, test_recovery.checkpoints, test_recovery.dense

BLOCK = {
    **{key: value for key, value in SMALL.items() if key != "eval_every"},
    "objective": "block",
    "learning_rate": 1e-3,
    "max_steps": 3,
    "epochs": 2,
}


def batches(decoder):
    """Two rows of several examples, or padded ones, and one of another length."""
    packed = pack_or_pad(decoder, False)
    places = [*range(9), *range(7)] if packed else list(range(16))
    ids = torch.randint(3, 250, (3, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Row(one, places, [True] * 16) for one in ids[:2]]
    rows.append(Row(ids[2][:5], places[:5], [True] * 5))
    found, collate = Rows(rows, every=True), Collate(packed)
    return [collate([found[0], found[2]]), collate([found[1]])]


@torch.no_grad()
def test_states_and_logits_are_those_of_the_model(family):
    """With masks, windows and positions of every layer's own; padding aside."""
    decoder = Decoder(build(family))
    given = batches(decoder)
    for batch in given:
        found = []
        handles = [
            layer.register_forward_hook(
                lambda _m, _a, out, found=found: found.append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            for layer in decoder.stack
        ]
        logits = decoder.model(**read_by_model(batch), use_cache=False).logits
        for handle in handles:
            handle.remove()
        alone = Walk(decoder, [batch])
        real = alone.real(0)
        for place in range(len(decoder.stack)):
            alone.step()
            torch.testing.assert_close(alone.states[0][real], found[place][real])
        torch.testing.assert_close(alone.logits(0)[real], logits[real])


def test_the_error_is_relative_to_what_is_wanted():
    mine, theirs = Decoder(build("llama")), Decoder(build("llama", seed=1))
    given = batches(mine)
    one, other = Walk(mine, given), Walk(theirs, given)
    other.step()
    errors = blockwise._Errors(one, other, count=1)
    hidden = [
        model.model(
            **read_by_model(given[0]), output_hidden_states=True, use_cache=False
        ).hidden_states[1]
        for model in (mine.model, theirs.model)
    ]
    real = one.real(0)
    difference = (hidden[0] - hidden[1])[real].square().sum(-1)
    expected = (difference / hidden[1][real].square().sum(-1)).sum()
    total, tokens = errors(0)
    torch.testing.assert_close(total, expected)
    assert tokens == int(real.sum()) == 21
    # the gradient of the mean, against finite differences
    weight = mine.stack[0].mlp.down_proj.weight.requires_grad_(True)
    errors.backward([0])
    place, step = (3, 5), 1e-2
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * step
            found.append(float(errors(0)[0]) / tokens)
            weight[place] -= sign * step
    slope = (found[0] - found[1]) / (2 * step)
    assert float(weight.grad[place]) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("method", ["grasp", "grasp-fisher"])
def test_factors_alone_change_and_each_layer_comes_nearer(checkpoints, alpaca, tmp_path, method):
    done = grasp.recover(checkpoints[method], tmp_path / "out", data=alpaca, **BLOCK)
    assert changed(checkpoints[method], tmp_path / "out") == factors(checkpoints[method])
    told = done.manifest["recovery"]
    assert len(told["curve"]) == 2 + (2 if method == "grasp" else 4)
    first, *layers, last = (look["held_out_loss"] for look in told["curve"])
    assert last < first and last == pytest.approx(sum(layers) / len(layers))
    assert not list(tmp_path.glob("*.recovery"))


def test_on_the_disk_as_in_memory(checkpoints, alpaca, tmp_path):
    for name, more in {"memory": {}, "disk": {"offload": str(tmp_path / "layers")}}.items():
        grasp.recover(checkpoints["grasp-fisher"], tmp_path / name, data=alpaca, **BLOCK, **more)
    one, other = (weights(tmp_path / name) for name in ("memory", "disk"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_the_layer_before_a_gap_learns_what_the_removed_ones_gave(checkpoints, alpaca, tmp_path):
    grasp.recover(checkpoints["shortgpt"], tmp_path / "out", data=alpaca, train="layers", **BLOCK)
    found = changed(checkpoints["shortgpt"], tmp_path / "out")
    assert {name.split(".")[2] for name in found} == {"0", "1"}


def test_a_run_goes_on_behind_the_last_layer(checkpoints, alpaca, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    grasp.recover(checkpoints["grasp-fisher"], whole, data=alpaca, **BLOCK)
    fit, seen = blockwise.Blockwise._fit, []

    def stops(self, weights, errors, place):
        if place == 2:
            raise KeyboardInterrupt
        return fit(self, weights, errors, place)

    with monkeypatch.context() as patch:
        patch.setattr(blockwise.Blockwise, "_fit", stops)
        with pytest.raises(KeyboardInterrupt):
            grasp.recover(checkpoints["grasp-fisher"], cut, data=alpaca, **BLOCK)
    with pytest.raises(CheckpointError, match="holds a run, at layer 1; go on from it"):
        grasp.recover(checkpoints["grasp-fisher"], cut, data=alpaca, **BLOCK)

    def counts(self, weights, errors, place):
        seen.append(place)
        return fit(self, weights, errors, place)

    monkeypatch.setattr(blockwise.Blockwise, "_fit", counts)
    grasp.recover(checkpoints["grasp-fisher"], cut, data=alpaca, resume=True, **BLOCK)
    assert seen == [2, 3]
    one, other = weights(whole), weights(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (json.loads((out / "grasp.json").read_text()) for out in (whole, cut))
    assert one["recovery"]["curve"] == other["recovery"]["curve"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"objective": "distill", "offload": "x"}, "--objective block trains one after the other"),
        ({"objective": "block", "train": "lora"}, "--train lora: --objective block trains"),
        ({"objective": "block", "start": "least-squares"}, "--start least-squares: --objective"),
    ],
)
def test_what_does_not_go_together_is_said(fields, said):
    with pytest.raises(RecipeError, match=said):
        Recipe(**fields)


def test_a_folder_that_cannot_be_made_is_named(checkpoints, alpaca, tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "layers"
    with pytest.raises(RecipeError, match=r"--offload .*layers: cannot be made \(Not a directory"):
        grasp.recover(
            checkpoints["grasp"], tmp_path / "out", data=alpaca, offload=str(place), **BLOCK
        )


def test_worse_text_after_all_is_said(checkpoints, alpaca, tmp_path, monkeypatch, caplog):
    """Each layer may come nearer, and the whole be worse."""
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(blockwise.Blockwise, "_lm_loss", staticmethod(lambda *_: next(losses)))
    grasp.recover(checkpoints["grasp"], tmp_path / "out", data=alpaca, **BLOCK)
    assert "held-out text is dearer than before: 2.0000 nats a token, 1.0000 before" in caplog.text
