"""One dial in bytes: `--size`, with bits beside ranks and channels."""

import json
from pathlib import Path

import pytest
import torch
from closeness import close
from conftest import FAMILY_ROWS, LAYERS, WITH_EXPERTS, WITHOUT_EXPERTS, build, quick
from safetensors.torch import load_file
from test_cli import command
from transformers import AutoModelForCausalLM

import grasp
from grasp.core.compressed_tensors import COMPRESSED_TENSORS, alike
from grasp.core.decoder import Decoder
from grasp.core.edits import Quantize, SplitExperts
from grasp.core.experts import mixtures
from grasp.core.layers.experts_grasp import matrix_of
from grasp.core.layers.quantized_grasp import QuantizedLinear
from grasp.errors import RecipeError
from grasp.methods import make
from grasp.stages.sensitivity import Sensitivity
from grasp.verbs.compress import predict

QUICK = ("gpt2", "phi3")
"""Families that differ in what is stored; the others take their time."""
FEW = {"bits": (16, 8, 4), "group_sizes": (32,)}
"""Of every width once: what every one of them costs, is tried in `tests/test_rounding.py`."""


@pytest.fixture
def data(calibration):
    """Two blocks: a half each."""
    return grasp.Calibration(calibration.ids[:2], "random")


def in_16_bits(model) -> int:
    return 2 * Decoder(model).num_parameters()


def run(data, name="llama", out=None, model=None, share=0.5, **fields):
    """Compressed to a share of what the model takes in 16 bits."""
    model = build(name) if model is None else model
    options = {"width_multiple": 8, "size": f"{int(share * in_16_bits(model))}B"} | FEW | fields
    return grasp.compress(model, out, method="grasp-fisher", data=data, **options)


def on_disk(folder: Path) -> int:
    return sum(one.stat().st_size for one in folder.glob("*.safetensors"))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def widths(result) -> set[str]:
    return {step.edit.scheme for step in result.log if isinstance(step.edit, Quantize)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in WITHOUT_EXPERTS
    ],
)
def test_it_fits_loads_and_says_the_same(name, data, tmp_path):
    size = int(0.5 * in_16_bits(build(name)))
    result = run(data, name, tmp_path / "small", size=f"{size}B")
    assert 0.85 * size < on_disk(tmp_path / "small") <= 1.02 * size
    assert widths(result)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.dtype == torch.bfloat16
    assert close(logits(loaded, data.ids), logits(result.model, data.ids))


@pytest.mark.parametrize("name", quick(WITH_EXPERTS))
def test_experts_have_bits_of_their_own(name, calibration, tmp_path):
    """They are taken apart for that, and are in one tensor again in a dense export."""
    data = grasp.Calibration(calibration.ids.repeat(3, 1), "random")
    result = run(data, name, tmp_path / "small", share=0.65)
    steps = [step.edit for step in result.log]
    rounded = [edit.path for edit in steps if isinstance(edit, Quantize)]
    of_experts = [path for path in rounded if ".split." in path]
    assert of_experts and len(of_experts) < len(rounded)
    assert len([edit for edit in steps if isinstance(edit, SplitExperts)]) <= LAYERS
    told = [row for row in result.manifest["bytes"] if row["part"] == "experts"]
    assert any("bits" in row["stored"] and "16" not in row["stored"] for row in told)
    assert not any("experts are not rounded" in note for note in result.manifest["notes"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert close(logits(loaded, data.ids), logits(result.model, data.ids))
    grasp.export(tmp_path / "small", tmp_path / "dense", format="dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense) is type(build(name))
    seen = 0
    for one, other in zip(mixtures(result.decoder), mixtures(Decoder(dense)), strict=True):
        for number, expert in enumerate(getattr(one.experts, "split", ())):
            for part, module in expert.named_children():
                if isinstance(module, QuantizedLinear) and module.rank is None:
                    numbers = module.dequantized("weight")
                    assert close(matrix_of(other.experts, part, number)[0], numbers, 1)
                    seen += 1
    assert seen


def test_experts_that_are_left_out_keep_16_bits(data):
    result = run(data, "mixtral", share=0.8, exclude="experts")
    rounded = [step.edit.path for step in result.log if isinstance(step.edit, Quantize)]
    assert rounded and not any("experts" in path for path in rounded)
    assert any("experts are not rounded" in note for note in result.manifest["notes"])


def test_the_manifest_says_where_the_bytes_are(data, tmp_path):
    result = run(data, out=tmp_path / "small")
    told = json.loads((tmp_path / "small" / "grasp.json").read_text())["bytes"]
    assert sum(one["bytes"] for one in told) == result.decoder.num_bytes()
    assert any("bits, groups of" in one["stored"] for one in told)
    assert "## Where the bytes are" in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.slow
def test_the_more_bytes_the_less_is_lost(data):
    """What is expected of text that was not seen, and the more bits."""
    rises = [
        run(data, share=share, bits=(16, 8, 6, 5, 4, 3)).manifest["prediction"]["loss_rise"]
        for share in (0.35, 0.5, 0.8)
    ]
    assert rises[0] > rises[1] > rises[2] >= 0


def test_bits_can_be_restricted(data):
    assert widths(run(data, bits=(8, 4))) <= {"int8", "int4"}
    without = run(data, share=0.9, bits=(16,))
    assert not widths(without)
    assert without.ratio > 0.05  # then only fewer numbers make it smaller


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_8_bits_may_be_of_activations_too(name, data, tmp_path):
    """Of dense matrices; pairs and the embedding keep their inputs."""
    result = run(data, name, tmp_path / "small", bits=(16, 8), rounds=1, activations="int8")
    edits = [step.edit for step in result.log if isinstance(step.edit, Quantize)]
    inside = {edit.path: edit.scheme for edit in edits if edit.layers}
    assert "int8-dynamic" in inside.values()
    assert {edit.scheme for edit in edits if not edit.layers} <= {"int8"}
    for path, scheme in inside.items():
        is_pair = result.model.get_submodule(path).rank is not None
        assert scheme == ("int8" if is_pair else "int8-dynamic")
    told = json.loads((tmp_path / "small" / "grasp.json").read_text())
    assert told["method"]["activations"] == told["recipe"]["activations"] == "int8"
    assert "8 bits, activations too" in {one["stored"] for one in told["bytes"]}
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| 8 bits, activations too |" in card and "--activations int8" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert close(logits(loaded, data.ids), logits(result.model, data.ids))


def test_the_dial_weighs_what_activations_cost(data, monkeypatch, caplog):
    """Where they cost much, weights take other widths, and it says so."""
    monkeypatch.setattr(Sensitivity, "loss_of_activations", 100.0)
    schemes = widths(run(data, bits=(8, 6), share=0.5, rounds=1, activations="int8"))
    assert "int6" in schemes and "int8-dynamic" not in schemes
    assert "--activations int8: none is, since weights in other widths cost less" in caplog.text


def test_group_sizes_can_be_restricted(data):
    result = run(data, group_sizes=(128,))
    edits = [step.edit for step in result.log if isinstance(step.edit, Quantize)]
    inside = [edit for edit in edits if edit.layers and edit.scheme != "int8"]
    assert inside and {edit.group_size for edit in inside} == {128}
    outside = [edit for edit in edits if not edit.layers and edit.scheme != "int8"]
    assert all(edit.group_size == 128 for edit in outside)


def test_a_share_of_the_bytes_with_bits(data):
    """`--ratio 0.5 --budget bytes --bits ...` is `--size` of half the bytes."""
    by_share = run(data, size=None, ratio=0.5, budget="bytes")
    whole = in_16_bits(build("llama"))
    assert 0.35 * whole < by_share.decoder.num_bytes() < 0.53 * whole  # the file's index is extra
    assert widths(by_share)


@pytest.mark.slow
def test_one_round_and_two(data):
    many = {"share": 0.3, "bits": (16, 8, 6, 5, 4, 3)}
    one, two = run(data, rounds=1, **many), run(data, rounds=2, **many)
    sizes = [result.decoder.num_bytes() for result in (one, two)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    assert widths(one) and widths(two)


def test_what_is_left_out_keeps_16_bits(data):
    result = run(data, share=0.7, exclude=("mlp",))
    paths = [step.edit.path for step in result.log if isinstance(step.edit, Quantize)]
    assert paths and not any(".mlp." in path for path in paths)


def test_it_says_what_to_expect_at_several_ratios(data):
    fields = {"budget": "bytes", "ratio": 0.5, "width_multiple": 8} | FEW
    told = predict(build("llama"), [0.3, 0.5], method="grasp-fisher", data=data, **fields)
    assert 0 <= told.rises[0.3] < told.rises[0.5]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": "small"}, "--size small: not a size; write it like 90MB or 4.5GB"),
        ({"size": "1MB", "ratio": 0.2}, "one of --ratio, --retain-ratio, --speedup, --size"),
        ({"size": "1MB", "budget": "latency"}, "--size 1MB: is in bytes; leave --budget latency"),
        ({"ratio": 0.2, "bits": (8, 4)}, "--bits 8,4: bits are weighed in bytes; give --size"),
        ({"size": "1MB", "bits": (8, 8)}, "--bits 8,8: name at least one of 16, 8, 6, 5, 4, 3"),
        ({"size": "1MB", "bits": (7,)}, "--bits 7: must be one of 16, 8, 6, 5, 4, 3"),
        ({"size": "1MB", "group_sizes": (64, 64)}, "--group-sizes 64,64: name at least one"),
        (
            {"size": "1MB", "group_sizes": (48,)},
            "--group-sizes 48: must be one of 32, 64, 128, 256",
        ),
        ({"size": "1MB", "bits": (4,), "activations": "int8"}, "8 bits; allow them in --bits"),
        ({"ratio": 0.2, "activations": "int8"}, "--activations int8: goes with weights in 8 bits"),
        ({"size": "1MB", "activations": "8"}, "--activations 8: unknown; allowed: float, int8"),
        ({"size": "1MB", "uniform": True}, "--size 1MB: not together with --uniform"),
        ({"size": "1MB", "score": "random", "parts": ("ranks",)}, "scores that are not losses"),
    ],
)
def test_mistakes_are_one_line(fields, said, data):
    with pytest.raises(RecipeError, match=r"^[^\n]+$") as error:
        grasp.compress(build("llama"), method="grasp-fisher", data=data, **fields)
    assert said in str(error.value)


def test_a_size_that_cannot_be_reached_names_the_smallest(data):
    with pytest.raises(RecipeError, match="--size 100B: cannot be reached") as error:
        run(data, size="100B")
    smallest = str(error.value).partition("reachable is ")[2].partition(" ")[0]
    assert run(data, size=smallest).decoder.num_bytes() > 0


def test_the_command_line(model_directory, tmp_path):
    (tmp_path / "own.txt").write_text("A dial has one hand. " * 300)
    words = [model_directory, tmp_path / "out", "--size", "45kB", "--rounds", "1", "--bits", "16,8"]
    more = ["--activations", "int8", "--data", tmp_path / "own.txt", "--quiet", "--json"]
    done = command("compress", *words, *more, "--num-samples", "2", "--seq-len", "32")
    assert done.json["path"] == str(tmp_path / "out")
    assert "8 bits, activations too" in done.err


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in FAMILY_ROWS],
)
def test_the_layers_may_be_on_the_disk(name, data, tmp_path):
    """The same plan and, but for ties of rounding, the same numbers; also of the embedding."""
    build(name, torch.float32).save_pretrained(tmp_path / "dense")
    share = (0.65 if name in WITH_EXPERTS else 0.4) * in_16_bits(build(name))
    options = {"width_multiple": 8, "size": f"{int(share)}B", "dtype": "float32"} | FEW
    made = [
        grasp.compress(str(tmp_path / "dense"), out, data=data, **options, **where)
        for out, where in (
            (tmp_path / "memory", {}),
            (tmp_path / "disk", {"offload": tmp_path / "layers"}),
        )
    ]
    assert widths(made[1])
    places = made[1].decoder.offload.places
    rounded = [one for one in made[1].decoder.stack.parameters() if one.dtype == torch.uint8]
    assert rounded and all(one in places and not one.any() for one in rounded)
    # the proof has run it, and no copy for kernels is left
    assert not any(vars(one).get("packed") for one in made[1].decoder.stack.modules())
    one, other = ([step.edit.spec() for step in result.log] for result in made)
    assert one == other
    stored = [
        {
            key: (value.dtype, value.shape)
            for file in (tmp_path / out).glob("*.safetensors")
            for key, value in load_file(file).items()
        }
        for out in ("memory", "disk")
    ]
    assert stored[0] == stored[1]

    expected = logits(made[0].model, data.ids)
    apart = logits(made[1].model, data.ids) - expected
    assert float(apart.norm() / expected.norm()) < 0.02
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "disk")
    assert close(logits(again, data.ids), logits(made[1].model, data.ids))


# --- for servers: --layout compressed-tensors

CT = "compressed-tensors"


def for_servers(data, name="qwen2", out=None, share=0.6, **fields):
    """Matrices of a tiny model that 32 divides, and a vocabulary that is a small part of it."""
    model = build(name, hidden_size=64, intermediate_size=128)
    return run(data, out=out, model=model, share=share, layout=CT, **fields)


def kinds_of(result) -> dict[str, tuple[str, int]]:
    edits = [step.edit for step in result.log if isinstance(step.edit, Quantize)]
    assert len(edits) == len(result.log)
    return {edit.path: (edit.scheme, edit.group_size) for edit in edits}


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("qwen2", 0.5),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("qwen2", 0.75), ("opt", 0.5), ("phi3", 0.75))
        ),
    ],
)
def test_what_servers_fuse_is_alike_and_can_be_exported(name, share, data, tmp_path):
    result = for_servers(data, name, tmp_path / "small", share)
    found = kinds_of(result)
    assert {scheme for scheme, _ in found.values()} <= {"int8", "int4-symmetric"}
    linears = [one.path for layer in result.decoder.layers() for one in layer.linears.values()]
    for group in alike([*found, *(path for path in linears if path not in found)]):
        assert len({found.get(path) for path in group}) == 1
    assert not any("embed" in path or "head" in path for path in found)
    assert 0.85 * share < result.decoder.num_bytes() / in_16_bits(dense(name)) <= share
    loaded = grasp.load(tmp_path / "small").model
    written = grasp.export(tmp_path / "small", tmp_path / "out", format=CT)
    assert written.bytes == pytest.approx(on_disk(tmp_path / "small"), rel=0.05)
    assert close(logits(loaded, data.ids), logits(result.model, data.ids))


def dense(name):
    return build(name, hidden_size=64, intermediate_size=128)


def test_for_servers_bits_and_groups_can_be_restricted(data):
    found = kinds_of(for_servers(data, share=0.55, bits=(16, 4), group_sizes=(64,)))
    assert set(found.values()) == {("int4-symmetric", 64)}


def test_a_share_of_the_bytes_for_servers(data):
    fields = {"size": None, "ratio": 0.4, "budget": "bytes", "bits": (16, 8, 4)}
    assert kinds_of(for_servers(data, **fields))


def test_for_servers_nothing_else_is_measured(data):
    """Neither ranks nor widths are priced, so nothing they need is collected."""
    decoder = Decoder(dense("qwen2"))
    method = make("grasp-fisher", {"size": "90kB", "layout": CT})
    names = [type(one).__name__ for one in method.needs(decoder)]
    assert names == ["Similarity", "Sensitivities"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": None, "ratio": 0.2}, f"--layout {CT}: is about bits; give --size"),
        ({"bits": (8, 6)}, f"--layout {CT} --bits 6: it has 16, 8, 4"),
        ({"group_sizes": (256,)}, f"--layout {CT} --group-sizes 256: it has 32, 64, 128"),
        ({"parts": ("ranks",)}, f"--parts ranks: with --layout {CT} only layers may go"),
        ({"layout": "x"}, f"--layout x: unknown; allowed: grasp, {CT}"),
    ],
)
def test_mistakes_about_the_layout_are_one_line(fields, said, data):
    options = {"size": "1MB", "layout": CT} | fields
    with pytest.raises(RecipeError, match=r"^[^\n]+$") as error:
        grasp.compress(dense("qwen2"), method="grasp-fisher", data=data, **options)
    assert said in str(error.value)


def test_for_servers_a_model_is_an_ordinary_one(data):
    with pytest.raises(RecipeError, match=r"Conv1D.*leave --layout out"):
        grasp.compress(build("gpt2"), method="grasp-fisher", size="1MB", layout=CT, data=data)


def test_activations_in_a_layout_for_servers(data):
    """The two together: 8 bits are of activations too, and shards are alike."""
    model = build("qwen3", hidden_size=64, intermediate_size=96, head_dim=16)
    result = run(
        data, model=model, share=0.75, bits=(8,), layout=COMPRESSED_TENSORS, activations="int8"
    )
    assert widths(result) == {"int8-dynamic"}
    losses = result.manifest["prediction"]["loss_rise"]
    model = build("qwen3", hidden_size=64, intermediate_size=96, head_dim=16)
    weights_alone = run(data, model=model, share=0.75, bits=(8,), layout=COMPRESSED_TENSORS)
    assert losses > weights_alone.manifest["prediction"]["loss_rise"] > 0
