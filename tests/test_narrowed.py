"""Narrowed models behind the edit: as ordinary checkpoints, with pairs and few bits on top,
exported dense, trained, and what a server makes of their widths.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import close
from conftest import LAYERS, MANIFEST, WITHOUT_EXPERTS, build, quick
from transformers import AutoConfig, AutoModelForCausalLM

import grasp
from grasp.compensation.least_squares import pairs_of
from grasp.core.axes import width_entry
from grasp.core.checkpoint import save
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, EditLog, Entry, Factorize, Narrow, Rewrite
from grasp.core.edits.cuts import sizes_of
from grasp.core.edits.ordinary import dequantize, multiply_out
from grasp.core.edits.widening import dense_parameters
from grasp.core.layers.structure_grasp import structure_of
from grasp.core.linalg import pivoted
from grasp.errors import ModelError
from grasp.serving import dense, narrowing

IDS = torch.tensor([[5, 17, 60, 2, 99, 140, 7, 31], [9, 9, 80, 200, 3, 41, 77, 120]])
OUR_FILES = ("modeling_grasp.py", "narrow_grasp.py")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(params=quick(WITHOUT_EXPERTS))
def family(request) -> str:
    """The families of which all MLPs have channels."""
    return request.param


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def channels(decoder: Decoder, layer: int, left: int) -> Narrow:
    count = sizes_of(decoder, layer).channels
    return Narrow(layer, "channels", torch.arange(count)[layer % 2 :][:left])


def narrow(decoder: Decoder, *left: int) -> list:
    """Layer by layer, so many channels left; returns how to undo it, last first."""
    return [channels(decoder, *one).apply(decoder) for one in enumerate(left)][::-1]


def stored_width(path: Path) -> int:
    config = AutoConfig.from_pretrained(path)
    return int(getattr(config, width_entry(config)))


# One width for all: an ordinary model


def test_one_width_in_every_layer_is_an_ordinary_model(family, tmp_path):
    decoder, plain = Decoder(build(family)), build(family)
    undos = narrow(decoder, *[20] * LAYERS)
    said = logits(decoder.model)
    assert type(decoder.model) is type(plain) and not structure_of(decoder.model)
    assert {path: type(module) for path, module in decoder.model.named_modules()} == {
        path: type(module) for path, module in plain.named_modules()
    }
    decoder.model.save_pretrained(tmp_path)
    assert not any((tmp_path / name).exists() for name in OUR_FILES)
    config = json.loads((tmp_path / "config.json").read_text())
    assert stored_width(tmp_path) == 20 and not config.keys() & {"quantization_config", "auto_map"}
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), said)

    undos[0]()
    assert len({sizes_of(decoder, layer).channels for layer in decoder.kept}) == 2
    assert structure_of(decoder.model) and decoder.model.config.quantization_config
    for undo in undos[1:]:
        undo()
    assert torch.equal(logits(decoder.model), logits(plain))
    assert decoder.model.config.to_dict() == plain.config.to_dict()


def test_an_ordinary_one_is_narrowed_on(tmp_path):
    decoder = Decoder(build("gpt2"))
    narrow(decoder, *[64] * LAYERS)
    narrow(decoder, 30)
    said = logits(decoder.model)
    decoder.model.save_pretrained(tmp_path)
    assert stored_width(tmp_path) == 64 and len(structure_of(decoder.model)) == 2
    again = Decoder(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert close(logits(again.model), said)
    # the others follow, in a model that was loaded with modules of ours
    for layer in range(1, LAYERS):
        channels(again, layer, 30).apply(again)
    again.model.save_pretrained(tmp_path / "even")
    assert stored_width(tmp_path / "even") == 30 and not structure_of(again.model)
    even = AutoModelForCausalLM.from_pretrained(tmp_path / "even")
    assert close(logits(even), logits(again.model))


def test_the_odd_layer_goes():
    decoder = Decoder(build("llama"))
    narrow(decoder, 20, 24, 20, 20)
    assert structure_of(decoder.model)
    undo = Drop(1).apply(decoder)
    assert not structure_of(decoder.model) and decoder.config.intermediate_size == 20
    undo()
    assert len(structure_of(decoder.model)) == 3 * LAYERS
    assert decoder.config.intermediate_size == 48


def test_what_else_is_of_ours_stays():
    decoder = Decoder(build("llama"))
    path = "model.layers.1.self_attn.o_proj"
    undo = Factorize(path, random(5, 32), random(32, 5)).apply(decoder)
    narrow(decoder, *[20] * LAYERS)
    assert len(structure_of(decoder.model)) == 1 + 3 * LAYERS
    del undo
    heads = Decoder(build("llama"))
    for layer in range(LAYERS):
        Narrow(layer, "kv_groups", torch.tensor([1])).apply(heads)
    assert len(structure_of(heads.model)) == 4 * LAYERS


def test_the_log_knows_what_became_ordinary():
    def log(*edits, layers=3):
        return EditLog([Entry(edit) for edit in edits], layers)

    keep = torch.arange(20)
    even = [Narrow(layer, "channels", keep) for layer in range(3)]
    heads = Narrow(1, "kv_groups", keep)
    pair = Factorize("model.layers.1.mlp.up_proj", random(2, 4), random(4, 2))
    assert not log(*even).carried and log(*even[:2]).carried
    assert not log(*even[:2], Drop(2)).carried
    assert log(*even, Narrow(1, "channels", keep[:9])).carried
    assert not log(Narrow(1, "channels", torch.arange(30)), *even).carried
    assert log(*even, heads).carried and log(*even, pair).carried and log(pair, *even).carried
    assert not log(pair, Drop(1)).carried and not log(Rewrite("model.layers.0.x", None)).carried
    assert log(*even, pair).served and not log(*even, heads).served


# On top of narrowed matrices


def test_narrowed_twice_is_narrowed_once(family):
    twice, once = Decoder(build(family)), Decoder(build(family))
    Narrow(1, "channels", torch.arange(40)).apply(twice)
    Narrow(1, "channels", torch.arange(40)[::2]).apply(twice)
    Narrow(1, "channels", torch.arange(40)[::2]).apply(once)
    assert torch.equal(logits(twice.model), logits(once.model))
    assert structure_of(twice.model) == structure_of(once.model)


def pair(decoder: Decoder, layer: int, role: str, pivot: bool) -> Factorize:
    """A pair of rank 6 in the place of a narrowed matrix."""
    linear = decoder.layer(layer).linears[decoder.family.path(role)]
    rows, columns = linear.shape
    factors = random(rows, 6), random(6, columns, seed=1)
    return Factorize(linear.path, *(pivoted(*factors) if pivot else factors[::-1]))


def mixed(family: str, axes: bool = True) -> Decoder:
    """MLPs of four widths, plain and pivoted pairs on two of them; with `axes` KV groups and value
    dimensions gone too.
    """
    decoder = Decoder(build(family))
    narrow(decoder, 10, 20, 30, 40)
    if axes:
        sizes = sizes_of(decoder, 2)
        dims = torch.arange(sizes.kv_heads * sizes.head_dim)
        Narrow(2, "value_dims", dims[1::2]).apply(decoder)
    if axes and family != "olmo2":
        Narrow(1, "kv_groups", torch.tensor([1])).apply(decoder)
    pair(decoder, 2, "down", pivot=False).apply(decoder)
    pair(decoder, 3, "up", pivot=True).apply(decoder)
    return decoder


def test_pairs_on_narrowed_matrices(family, tmp_path):
    decoder = mixed(family)
    records, said = structure_of(decoder.model), logits(decoder.model)
    path = decoder.layer(3).module.get_submodule(decoder.family.path("up"))
    assert path.record()["of"]["kind"] == "narrow" and path.record()["pivoted"]
    decoder.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert structure_of(loaded) == records and close(logits(loaded), said)
    ids, options = IDS[:1], {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = loaded.generate(ids, **options, pad_token_id=258, use_cache=True)
    whole = loaded.generate(ids, **options, pad_token_id=258, use_cache=False)
    assert torch.equal(cached, whole)


def test_a_pair_on_a_narrowed_matrix_is_undone_and_trained():
    decoder = Decoder(build("phi3"))
    narrow(decoder, 10, 20)
    before, names = logits(decoder.model), dict(decoder.model.named_parameters())
    edit = pair(decoder, 1, "up", pivot=True)
    undo = edit.apply(decoder)
    assert not torch.equal(logits(decoder.model), before)
    log = EditLog([Entry(channels(decoder, 1, 9)), Entry(edit)], LAYERS)
    for path in log.trainable(decoder.family):
        decoder.model.get_parameter(path)
    assert [path.partition("mlp.")[2] for path in log.trainable(decoder.family)] == [
        "gate_up_proj.weight",
        "down_proj.weight",
        "gate_up_proj.weight_in",
    ]
    undo()
    assert torch.equal(logits(decoder.model), before)
    assert {n: id(p) for n, p in names.items()} == {
        n: id(p) for n, p in decoder.model.named_parameters()
    }


@pytest.mark.parametrize("name", quick(WITHOUT_EXPERTS))
def test_what_a_cut_leaves_may_be_trained(name):
    """The paths are there in the model, and hold the numbers of the narrowed matrices."""
    decoder, edits = Decoder(build(name)), [Narrow(1, "channels", torch.arange(9))]
    edits += [Narrow(1, "value_dims", torch.arange(3))]
    for edit in edits:
        edit.apply(decoder)
    ours = structure_of(decoder.model)
    found = [path for edit in edits for path in edit.trainable(decoder.family)]
    assert {path.rpartition(".")[0] for path in found} == ours.keys()
    assert len(set(found)) == len(found) and all(
        decoder.model.get_parameter(p).numel() for p in found
    )


WITHOUT = """
import sys
sys.modules["grasp"] = None
import torch
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    torch.save(model(torch.tensor([[5, 17, 60, 2]])).logits.detach(), path + "/logits.pt")
"""


@pytest.mark.slow
def test_loaded_where_grasp_is_not_installed(tmp_path):
    said = {}
    for name in ("llama", "gpt2"):
        decoder = mixed(name)
        decoder.model.save_pretrained(tmp_path / name)
        said[tmp_path / name] = logits(decoder.model)
        done = grasp.quantize(mixed(name), tmp_path / f"{name}8", bits=8)
        said[tmp_path / f"{name}8"] = logits(done.model)
    words = [sys.executable, "-c", WITHOUT, *map(str, said)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for path, right in said.items():
        assert close(torch.load(path / "logits.pt"), right[:1, :4]), path


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_few_bits(name, bits, tmp_path):
    """Also of matrices that keep their width; plain pairs only, since 4 bits takes no pivoted."""
    decoder = Decoder(build(name))
    narrow(decoder, 10, 20, 30)
    sizes = sizes_of(decoder, 2)
    Narrow(2, "value_dims", torch.arange(sizes.kv_heads * sizes.head_dim)[1::2]).apply(decoder)
    pair(decoder, 1, "down", pivot=False).apply(decoder)
    before, records = logits(decoder.model), structure_of(decoder.model)
    done = grasp.quantize(decoder, tmp_path / "few", bits=bits)
    said = logits(done.model)
    assert 0 < (said - before).abs().max() < (0.05 if bits == 8 else 0.5) * before.abs().max()
    assert done.manifest["quantization"]["matrices"] > len(decoder.family.matrices) * LAYERS
    loaded = Decoder(grasp.load(tmp_path / "few").model)
    assert close(logits(loaded.model), said)
    dequantize(loaded)
    assert structure_of(loaded.model) == records and close(logits(loaded.model), said)


def test_rounded_again_and_ordinary():
    """Of one width throughout: once its bits are whole again nothing of ours is left."""
    decoder = Decoder(build("gpt2"))
    narrow(decoder, *[20] * (LAYERS - 1))
    grasp.quantize(decoder, bits=8)
    assert any(isinstance(record, dict) for record in structure_of(decoder.model).values())
    dequantize(decoder)
    channels(decoder, LAYERS - 1, 20).apply(decoder)
    assert not structure_of(decoder.model) and decoder.config.n_inner == 20


# Exported dense


def test_filled_up_to_one_width(family, tmp_path):
    """Zeros in the place of what went: the same logits, the same class, as large as foretold."""
    decoder = mixed(family)
    said, foretold = logits(decoder.model), dense_parameters(decoder)
    notes = " ".join(dense.notes(decoder))
    assert "multiplied out" in notes and "filled up with zeros to 40" in notes
    assert "are smaller than before compression: 40 channels of" in notes
    assert "went are zeros again" in notes
    assert multiply_out(decoder) == 2
    assert torch.allclose(logits(decoder.model), said, atol=1e-4)
    assert decoder.num_parameters() == foretold < build(family).num_parameters()
    assert type(decoder.model) is type(build(family))
    decoder.model.save_pretrained(tmp_path)
    assert stored_width(tmp_path) == 40
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(loaded), said, atol=1e-4)


def checkpoint(decoder: Decoder, folder: Path, tokenizer, *edits) -> str:
    """A checkpoint as `compress` writes it."""
    log, size = EditLog(num_layers=LAYERS), decoder.num_parameters()
    for edit in edits:
        edit.apply(decoder)
        log.append(Entry(edit, parameters=decoder.num_parameters()))
    left = decoder.num_parameters()
    manifest = {
        **MANIFEST,
        "edits": log.to_json(),
        "parameters": {"before": size, "after": left, "ratio": 1 - left / size},
    }
    decoder.tokenizer = tokenizer
    save(decoder, folder, manifest, "# it\n")
    return str(folder)


def test_the_export_says_whether_it_is_smaller(tmp_path, tokenizer):
    decoder = Decoder(build("llama"))
    edits = [channels(decoder, layer, 24 + 4 * layer) for layer in range(LAYERS)]
    place = checkpoint(decoder, tmp_path / "narrow", tokenizer, *edits)
    done = grasp.export(place, tmp_path / "out", format="dense")
    size = build("llama").num_parameters()
    assert done.parameters_before < done.parameters_after < size
    assert done.parameters_after == AutoModelForCausalLM.from_pretrained(done.path).num_parameters()
    said = (done.path / "README.md").read_text()
    assert "The MLPs have 24 to 36 channels" in said and "36 channels of 48" in said
    assert stored_width(done.path) == 36

    one = checkpoint(Decoder(build("llama")), tmp_path / "one", tokenizer, edits[0])
    done = grasp.export(one, tmp_path / "whole", format="dense")
    assert done.parameters_after == size and "an MLP kept all 48 channels" in " ".join(done.notes)


def test_one_width_needs_no_filling(tmp_path, tokenizer):
    decoder = Decoder(build("llama"))
    edits = [channels(decoder, layer, 24) for layer in range(LAYERS)]
    place = checkpoint(decoder, tmp_path / "narrow", tokenizer, *edits)
    assert "import grasp" not in grasp.report.card.model_card(
        json.loads((tmp_path / "narrow" / "grasp.json").read_text()), "narrow"
    )
    done = grasp.export(place, tmp_path / "out", format="dense")
    assert done.parameters_before == done.parameters_after
    assert done.notes == ("the model has no low-rank matrix: the dense export is a copy",)


def test_a_span_is_still_refused(decoder):
    from grasp.core.edits import Replace

    model = decoder("llama")
    Replace("model.layers.1", 1, random(32, 32), random(32)).apply(model)
    with pytest.raises(ModelError, match="of the kind 'span'"):
        multiply_out(model)


# Trained, compiled, and other people's tools


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("llama", "factors"),
        ("gpt2", "lora"),
        *(pytest.param("llama", train, marks=pytest.mark.slow) for train in ("layers", "lora")),
    ],
)
def test_recovered(name, train, tmp_path, tokenizer, text_file):
    if train == "lora":
        pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    decoder = Decoder(build(name))
    layers, matrices = decoder.family.layers, {path for _, path in decoder.family.matrices}
    narrowed = channels(decoder, 1, 20)
    place = checkpoint(decoder, tmp_path / "narrow", tokenizer, narrowed)
    options = {"max_steps": 4, "batch_size": 4, "micro_batch": 2, "held_out": 4, "max_length": 64}
    options |= {"learning_rate": 1e-2, "eval_every": 1, "precision": "float32", "warmup_steps": 0}
    grasp.recover(place, tmp_path / "better", data=text_file, train=train, **options)
    old, new = (
        dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
        for path in (place, tmp_path / "better")
    )
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    put = set(narrowed.trainable(decoder.family))
    assert put == {f"{layers}.1.{path}.weight" for _, path in decoder.family.mlp}
    assert (
        changed
        == {
            "factors": put,
            "layers": {key for key in old if f"{layers}.1." in key},
            "lora": {f"{layers}.{index}.{path}.weight" for index in range(4) for path in matrices},
        }[train]
    )
    assert all(20 in new[key].shape for key in put)


def test_pairs_on_narrowed_matrices_have_no_closed_form_start(caplog):
    """The dense model gives outputs of another shape: they stay as they are, and it is said."""
    decoder, steps = Decoder(build("llama")), [channels(Decoder(build("llama")), 1, 20)]
    steps[0].apply(decoder)
    steps += [pair(decoder, 1, role, pivot=False) for role in ("o", "up", "down")]
    for edit in steps[1:]:
        edit.apply(decoder)
    log = EditLog([Entry(edit) for edit in steps], LAYERS)
    found = pairs_of(decoder, Decoder(build("llama")), log)
    assert [one.path for one in found] == ["model.layers.1.self_attn.o_proj"]
    assert "2 pairs are of narrowed matrices" in caplog.text


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_on_top(name, tmp_path):
    peft = pytest.importorskip("peft")
    decoder = mixed(name, axes=False)
    decoder.model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    paths = [path for _, path in decoder.family.mlp]
    config = peft.LoraConfig(target_modules=[path.rpartition(".")[2] for path in paths], r=2)
    wrapped = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    said = logits(wrapped)
    assert not close(said, logits(decoder.model))
    wrapped.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert close(logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")), said)


@pytest.mark.slow
def test_compiled_whole():
    model = mixed("llama").model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(logits(compiled), logits(model))


def test_padding_changes_nothing():
    model = mixed("llama").model
    long, short = IDS[0], IDS[1, :5]
    ids = torch.stack((long, torch.cat((torch.full((3,), 258), short))))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 258}
    both = model.generate(ids, attention_mask=mask, **options)[:, 8:]
    alone = model.generate(short[None], attention_mask=torch.ones(1, 5).long(), **options)[:, 5:]
    assert torch.equal(both[1:], alone)


# What a server makes of it (vLLM itself: tests/test_serving.py)

PAIR = {"kind": "low-rank", "rank": 3}
NARROW = {"kind": "narrow", "rows": 20, "columns": 32}
BITS = {"kind": "quantized", "scheme": "int8", "group_size": 32}
GATE = "model.layers.1.mlp.gate_proj"


def test_records_inside_records():
    inside = {**BITS, "of": {**PAIR, "of": NARROW}}
    assert list(narrowing.kinds(inside)) == ["quantized", "low-rank", "narrow"]
    assert narrowing.kinds(inside)["narrow"] == NARROW and narrowing.kinds(None) == {}
    narrowing.check({GATE: inside})


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"kind": "span"}, "is of the kind 'span'"),
        ({**BITS, "of": {**PAIR, "of": {"kind": "magic"}}}, "is of the kind 'magic'"),
        ({**NARROW, "scattered": True}, "lost KV groups or value dimensions"),
        ({**BITS, "of": {**NARROW, "gathered": True}}, "lost KV groups or value dimensions"),
    ],
)
def test_what_is_not_served(record, says):
    with pytest.raises(ValueError, match=says):
        narrowing.check({GATE: record})


@pytest.mark.parametrize("name", quick(WITHOUT_EXPERTS))
def test_only_mlps_may_be_narrow(name):
    decoder = Decoder(build(name))
    channels(decoder, 1, 20).apply(decoder)
    narrowing.check_axes(structure_of(decoder.model), name)
    path = f"{decoder.family.layers}.1.{decoder.family.path('v')}"
    with pytest.raises(ValueError, match=r"lost KV groups .*use transformers"):
        narrowing.check_axes({path: NARROW}, name)
    with pytest.raises(ValueError, match="lost KV groups"):
        narrowing.check_axes(structure_of(decoder.model), "unheard-of")


def test_widths_of_stacked_matrices():
    up = GATE.replace("gate", "up")
    assert narrowing.outputs([GATE, up], [NARROW, NARROW], [48, 48]) == [20, 20]
    assert narrowing.outputs(["x.gate_up_proj"], [{**NARROW, "rows": 40}], [48, 48]) == [20, 20]
    assert narrowing.outputs(["x.down_proj"], [{**NARROW, "rows": 32}], [32]) == [32]
    with pytest.raises(ValueError, match=r"gate_proj and .*up_proj have 20 and 48 channels"):
        narrowing.outputs([GATE, up], [NARROW, {}], [48, 48])


def test_widths_divide_among_devices():
    assert [narrowing.share(GATE, 24, devices) for devices in (1, 2, 3, 8)] == [24, 12, 8, 3]
    with pytest.raises(ValueError, match=r"20 channels left, which do not divide among 3 devices;"):
        narrowing.share(GATE, 20, 3)
