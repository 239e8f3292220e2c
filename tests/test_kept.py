"""What every layer kept: the record in the manifest, the cells made of it, words and picture."""

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
import torch
from conftest import WITHOUT_EXPERTS, build, quick

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Entry, Factorize, Narrow
from grasp.core.edits.cuts import sizes_of
from grasp.core.manifest import read_manifest
from grasp.core.seal import PICTURE
from grasp.core.shapes import Shapes
from grasp.errors import CheckpointError
from grasp.report import look, picture, svg
from grasp.report.anatomy import layer_losses
from grasp.report.card import model_card, picture_for
from grasp.report.kept import Cell, Kept
from grasp.report.kept_words import facts
from grasp.report.picture import Box, Cross, Words, picture_of
from grasp.report.plots import overview
from grasp.report.reading import Checkpoint


def manifest_of(decoder, edits):
    """What `grasp.json` would hold after these edits."""
    shapes, entries = Shapes.of(decoder), []
    before = decoder.num_parameters()
    for edit in edits:
        edit.apply(decoder)
        entries.append(Entry(edit, parameters=decoder.num_parameters()).to_json())
    after = decoder.num_parameters()
    return {
        "format_version": 4,
        "model": {"source": "tiny", "family": "x", "num_layers": 4, "dtype": "float32"},
        "method": {"name": "mine", "paper": ""},
        "parameters": {"before": before, "after": after, "ratio": 1 - after / before},
        "edits": entries,
        "layers": shapes.beside(Shapes.of(decoder)),
        "versions": {},
        "recipe": {"model": "tiny"},
    }


def pair(decoder, layer, role, rank):
    """A pair in the place of a matrix, which has the shape that an earlier edit left."""
    path = f"{decoder.family.layers}.{layer}.{decoder.family.path(role)}"
    rows, columns = decoder.layer(layer).linears[decoder.family.path(role)].shape
    return Factorize(path, torch.ones(rank, columns), torch.ones(rows, rank))


@pytest.fixture(scope="module")
def mixed():
    """The manifest of a model of which every layer kept something else."""
    decoder = Decoder(build("llama"))
    narrow = Narrow(1, "channels", torch.arange(0, 48, 3), of=48)
    edits = [narrow, Narrow(1, "kv_groups", torch.tensor([1]), of=2)]
    edits += [Narrow(0, "value_dims", torch.arange(10)), pair(decoder, 2, "q", 3), Drop(3)]
    made = manifest_of(decoder, edits)
    later = pair(decoder, 1, "down", 4)
    layers = made["layers"]
    after = manifest_of(decoder, [later])
    for layer, found in zip((0, 1, 2), after["layers"], strict=True):
        for part in ("attention", "mlp"):
            for name, told in found[part].items():
                layers[layer][part][name] |= {**told, "of": layers[layer][part][name]["of"]}
    return {**made, "edits": made["edits"] + after["edits"], "parameters": made["parameters"]}


def cells(kept):
    return {(strip.name, layer): c for strip in kept.strips for layer, c in strip.cells.items()}


def test_every_kind_of_cell(mixed):
    found = cells(Kept.of(mixed))
    assert found["up_proj", 0] == Cell(48 * 32, 48 * 32) and found["up_proj", 0].whole
    assert found["up_proj", 1] == Cell(48 * 32, 16 * 32, narrower=True)
    assert found["q_proj", 2] == Cell(32 * 32, 3 * 64, rank=3)
    assert found["down_proj", 1] == Cell(32 * 48, 4 * (32 + 16), rank=4, narrower=True)
    assert {found[key].how for key in found if key[1] == 3} == {"gone"}
    assert found["v_proj", 0].share == 10 / 16 and found["o_proj", 0].share == 20 / 32
    assert [found[key, 1].how for key in ("gate_proj", "down_proj", "k_proj", "up_proj")] == [
        "narrower",
        "narrower and low-rank, rank 4",
        "narrower",
        "narrower",
    ]


def test_widths(mixed):
    """Only axes that were cut; a layer that is gone has none, value dimensions go with a group."""
    widths = {strip.name: strip for strip in Kept.of(mixed).widths}
    lefts = {name: [strip.cells[n].left for n in range(4)] for name, strip in widths.items()}
    assert lefts == {
        "MLP channels": [48, 16, 48, 0],
        "KV groups": [2, 1, 2, 0],
        "value dims": [10, 8, 16, 0],
    }


def test_words(mixed):
    kept = Kept.of(mixed)
    told = dict(facts(kept))
    assert told["MLP channels"] == "58.3 % kept, 16 to 48 of 48 a layer"
    assert told["low-rank matrices"] == "2 in layers 1, 2; ranks 3 to 4"
    assert told["removed layers"] == "3"
    left = sum(cell.left for cell in cells(kept).values())
    assert (
        f"{left:,} of {4 * (32 * 32 * 3 + 32 * 48 * 3):,} numbers" in told["matrices of the layers"]
    )


def test_a_sublayer_that_is_gone(mixed):
    changed = copy.deepcopy(mixed)
    for told in changed["layers"][2]["attention"].values():
        told |= {"left": [0, 0], "numbers": 0}
    kept = Kept.of(changed)
    assert dict(facts(kept))["layers without attention"] == "2"
    assert kept.without("mlp") == [] and kept.widths[1].cells[2].left == 0


@pytest.mark.parametrize("name", quick(WITHOUT_EXPERTS))
def test_the_record_counts_what_the_model_stores(name):
    """In every family: the numbers that the record says are gone are those that the model lost,
    biases aside, and the widths are those that edits cut.
    """
    decoder = Decoder(build(name))
    lost = decoder.num_parameters()
    sizes = sizes_of(decoder, 1)
    biases = sum(p.numel() for p in decoder.layer(1).module.parameters() if p.dim() == 1)
    edits = [
        Narrow(1, "channels", torch.arange(0, sizes.channels, 2), of=sizes.channels),
        Narrow(2, "value_dims", torch.arange(5)),
        pair(decoder, 1, "o", 2),
    ]
    made = manifest_of(decoder, edits)
    kept = Kept.of(made)
    gone = sum(cell.of - cell.left for cell in cells(kept).values())
    assert 0 <= (lost - decoder.num_parameters()) - gone <= 2 * biases
    assert made["layers"][0]["widths"] == {
        "channels": sizes.channels,
        "kv_groups": sizes.kv_heads,
        "value_dims": sizes.kv_heads * sizes.head_dim,
        "key_dims": sizes.kv_heads * sizes.head_dim,
    }
    assert [round(strip.share, 3) for strip in kept.widths] == [
        round((3 * sizes.channels + -(-sizes.channels // 2)) / (4 * sizes.channels), 3),
        round((3 * sizes.kv_heads * sizes.head_dim + 5) / (4 * sizes.kv_heads * sizes.head_dim), 3),
    ]
    assert len(picture_of(made, kept).marks) > 50


@pytest.mark.parametrize("storage", ["pair", "pivoted"])
def test_a_manifest_from_before_the_record(storage):
    """What ranks and counts of parameters tell is what the record says."""
    data = grasp.Calibration(torch.randint(0, 256, (4, 16)), "random")
    asked = {"method": "svd-llm", "ratio": 0.3, "storage": storage}
    made = grasp.compress(build("llama"), data=data, **asked).manifest
    new = cells(Kept.of(made))
    old = Kept.of({key: value for key, value in made.items() if key != "layers"})
    assert len(cells(old)) > 20
    for place, cell in cells(old).items():
        assert (cell.of, cell.left, cell.rank) == (new[place].of, new[place].left, new[place].rank)


def test_what_each_part_costs(mixed, tmp_path):
    """Of pairs and narrower layers by attention and MLP, of a layer that went as a whole."""
    told = copy.deepcopy(mixed)
    for edit in told["edits"]:
        edit["note"] = {"predicted_loss": 0.5}
    (tmp_path / "grasp.json").write_text(json.dumps(told))
    losses = layer_losses(Checkpoint.read(tmp_path))
    assert {(one["layer"], one["part"]): one["loss"] for one in losses} == {
        (0, "attention"): 0.5,
        (1, "MLP"): 1.0,
        (1, "attention"): 0.5,
        (2, "attention"): 0.5,
        (3, "whole layer"): 0.5,
    }
    del told["edits"][0]["note"]
    (tmp_path / "grasp.json").write_text(json.dumps(told))
    assert layer_losses(Checkpoint.read(tmp_path)) == []


def test_an_old_log_of_narrowed_and_dropped_layers():
    """Without the record and without how many there were, layers that are gone are still said."""
    edits = [{"edit": "drop", "layer": 1, "parameters": 9}]
    edits += [{"edit": "narrow", "layer": 0, "axis": "channels", "left": 3, "parameters": 8}]
    old = {"model": {"num_layers": 3, "source": ""}, "method": {"name": "m"}, "edits": edits}
    old["parameters"] = {"before": 10, "after": 8}
    kept = Kept.of(old)
    assert facts(kept) == [("removed layers", "1")]
    edits[1]["of"] = 4
    assert facts(Kept.of(old))[0] == ("MLP channels", "75.0 % kept, 3 of 4 a layer")
    assert picture_of(old, Kept.of(old)).height > 100


def test_a_checkpoint_has_the_picture_and_the_words(tmp_path):
    """Beside the card that shows it, sealed, in both sets of colours; none of a model of which
    nothing went.
    """
    data = grasp.Calibration(torch.randint(0, 256, (4, 16)), "random")
    grasp.compress(build("llama"), tmp_path / "a", data=data, ratio=0.2)
    card = (tmp_path / "a" / "README.md").read_text()
    assert re.search(rf"!\[matrices of the layers: .*\]\({PICTURE}\)", card)
    assert "| low-rank matrices |" in card
    text = (tmp_path / "a" / PICTURE).read_text()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and "prefers-color-scheme:dark" in text
    assert not set(re.findall(r"var\(--([\w-]+)\)", text)) - set(re.findall(r"--([\w-]+):", text))
    assert PICTURE in read_manifest(tmp_path / "a")["seal"]["files"]
    same = {"edits": [], "layers": [], "model": {"num_layers": 2}}
    picture_for(same)(tmp_path)
    assert not (tmp_path / PICTURE).exists()


def test_a_picture_that_is_changed_or_gone_changes_no_model(tmp_path, caplog):
    data = grasp.Calibration(torch.randint(0, 256, (4, 16)), "random")
    grasp.compress(build("llama"), tmp_path / "a", data=data, ratio=0.2)
    (tmp_path / "a" / PICTURE).unlink()
    caplog.clear()
    grasp.load(tmp_path / "a")
    assert not caplog.records


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer["mlp"]["mlp.up_proj"].update(of=[3]),
        lambda layer: layer["mlp"]["mlp.up_proj"].update(numbers=-1),
        lambda layer: layer["mlp"]["mlp.up_proj"].pop("left"),
        lambda layer: layer.update(widths={"channels": "many"}),
    ],
)
def test_a_damaged_record_is_named(mixed, tmp_path, change):
    damaged = copy.deepcopy(mixed)
    (tmp_path / "grasp.json").write_text(json.dumps(damaged))
    assert Kept.of(read_manifest(tmp_path)).changed
    change(damaged["layers"][0])
    (tmp_path / "grasp.json").write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match=r"layers\[0?.*\]"):
        read_manifest(tmp_path)


def test_of_is_told_and_kept():
    edit = Narrow(1, "channels", torch.tensor([0, 2]), of=48)
    again = Narrow.from_spec(edit.spec(), {})
    assert again.summary() == edit.summary() and again.of == 48
    assert edit.summary().text == "layer 1: 2 of 48 channels left"
    assert "of" not in Narrow(1, "channels", torch.tensor([0])).spec()


# --- the picture


def large(layers):
    """The manifest of a model of so many layers, each second matrix low-rank."""
    whole = {"of": [64, 64], "left": [64, 64], "numbers": 4096}
    low = {**whole, "numbers": 1280, "rank": 10}
    part = {f"m.{name}": low if place % 2 else whole for place, name in enumerate("abcd")}
    one = {"widths": {}, "attention": part, "mlp": {}}
    model = {"source": "m", "num_layers": layers}
    sizes = {"before": 10**6, "after": 10**5}
    return {
        "model": model,
        "method": {"name": "m"},
        "parameters": sizes,
        "edits": [],
        "layers": [one] * layers,
    }


@pytest.mark.parametrize("layers", [1, 4, 30, 80, 5000])
def test_marks_stand_on_the_sheet_and_apart(layers):
    """Bars do not overlap, texts of the axis neither; a model of thousands of layers makes no
    larger picture than one of hundreds.
    """
    manifest = large(layers)
    drawn = picture_of(manifest, Kept.of(manifest))
    boxes = [mark for mark in drawn.marks if isinstance(mark, Box)]
    for box in boxes:
        assert 0 <= box.x <= box.x + box.width <= drawn.width
        assert 0 <= box.y <= box.y + box.height <= drawn.height
    for y in {box.y for box in boxes if box.colour == picture.BEHIND}:
        row = sorted(b.x for b in boxes if b.colour == picture.BEHIND and b.y == y)
        assert all(after - before > 2.5 for before, after in pairwise(row))
    axis = [m.x for m in drawn.marks if isinstance(m, Words) and m.text.isdigit()]
    assert all(after - before > 20 for before, after in pairwise(axis))
    assert len(svg.file(drawn)) < 150_000


def test_a_low_rank_bar_is_two_and_what_is_gone_a_cross(mixed):
    drawn = picture_of(mixed, Kept.of(mixed))
    told = [mark for mark in drawn.marks if getattr(mark, "told", "").startswith("layer 2, q_proj")]
    assert len(told) == 2 and {mark.colour for mark in told} == {picture.PAIR}
    both = [m for m in drawn.marks if getattr(m, "told", "").startswith("layer 1, down_proj")]
    assert {mark.colour for mark in both} == {picture.PAIR, picture.NARROW}
    crosses = [m for m in drawn.marks if isinstance(m, Cross) and m.told]
    assert len(crosses) == 7 + 3 + 1  # matrices, widths, the whole layer
    words = [mark.text for mark in drawn.marks if isinstance(mark, Words)]
    assert {"gone", "narrower and low-rank", "dense, but narrower"} <= set(words)


def test_names_of_a_stranger_stay_text(mixed):
    evil = "</title><script>alert(1)</script>\"'"
    changed = copy.deepcopy(mixed)
    changed["model"]["source"] = changed["method"]["name"] = evil
    changed["layers"][0]["attention"][evil] = {"of": [1, 1], "left": [0, 0], "numbers": 0}
    drawn = picture_of(changed, Kept.of(changed))
    for text in (svg.file(drawn), svg.inline(drawn, "x")):
        assert "<script" not in text
        ElementTree.fromstring(text)
    assert "<script" not in model_card({**changed, "model": mixed["model"]}, "out").split("##")[1]


def test_two_matrices_with_the_same_last_name_stay_apart():
    decoder = Decoder(build("gpt2"))
    names = [strip.name for strip in Kept.of(manifest_of(decoder, [])).strips]
    assert names == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]


def test_in_a_page_it_has_the_pages_colours(mixed):
    text = svg.inline(picture_of(mixed, Kept.of(mixed)), "kept-0")
    assert not [light for light, _ in look.COLOURS.values() if f'"{light}"' in text]
    assert 'id="kept-0"' in text and "prefers-color-scheme" not in text


def test_a_picture_of_a_file(mixed, tmp_path):
    mixed = copy.deepcopy(mixed)
    mixed["model"]["source"] = "$x_1$ costs $2"
    assert overview(mixed, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
