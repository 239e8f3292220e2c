"""A model whose layers are on the disk computes what it computes in memory: sweeps, edits and the
checkpoint; and no more than a layer is in memory.
"""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from closeness import close, same_weights
from conftest import DIFFERENT, FAMILY_ROWS, build, quick
from contracts import contracts
from safetensors.torch import load_file, save_file
from test_collectors import COLLECTORS, FAMILIES, MASKS, ON, check_equal, paths

import grasp
from grasp.core import collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Factorize, trial
from grasp.core.experts import mixture
from grasp.core.models import load_model
from grasp.core.offload import Offload
from grasp.core.offloaded import Offloaded
from grasp.core.runner import Resident
from grasp.core.scratch import Scratch
from grasp.core.several import runner_for
from grasp.errors import NumericsError
from grasp.methods import make
from grasp.stages.curvature import Curvatures, InputCurvatures
from grasp.stages.statistics import Similarity, WeightGrad
from grasp.stages.sublayers import LayerLosses

RECIPES = {
    "grasp": {"num_layers": 2, "retain_ratio": 0.3},
    "grasp-fisher": {"ratio": 0.2, "parts": "ranks"},
    "shortgpt": {"num_layers": 2},
    **{name: told["recipe"] for name, told in contracts().items()},
}
REFUSES = {name: told.get("refuses", ()) for name, told in contracts().items()}
SHOWN = ("grasp", "grasp-fisher", "shortgpt", "svd-llm", "wanda")
"""One that goes by weight gradients, by gradients at outputs, by none, by inputs, and one that
sweeps again after every layer.
"""
WITH_EXPERTS = [
    name
    for name in FAMILY_ROWS
    for decoder in (Decoder(build(name)),)
    if any(mixture(decoder, layer) is not None for layer in decoder.kept)
]
OVER_EXPERTS = [name for name, fields in RECIPES.items() if make(name, fields).over_experts]
"""Methods that decompose experts."""
PAIRS = [
    pytest.param(
        family,
        method,
        marks=()
        if (method in SHOWN and DIFFERENT.index(family) % 5 == SHOWN.index(method))
        or (family, method) == ("mixtral", "grasp-fisher")
        else pytest.mark.slow,
    )
    for family in DIFFERENT
    for method in (RECIPES if family == "llama" else SHOWN)
    if family not in REFUSES.get(method, ())
]
PAIRS += [
    pytest.param(family, method, marks=pytest.mark.slow)
    for family in WITH_EXPERTS
    for method in OVER_EXPERTS
    if family not in DIFFERENT and family not in REFUSES.get(method, ())
]


@pytest.fixture
def saved(tmp_path):
    """`saved(family)`: the folder of a tiny model."""

    def make(family, dtype=torch.float32):
        if not (tmp_path / family).exists():
            build(family, dtype).save_pretrained(tmp_path / family, max_shard_size="40KB")
        return str(tmp_path / family)

    return make


@pytest.fixture
def opened(saved, tmp_path):
    """`opened(family)`: the tiny model with its layers on the disk."""

    def make(family, most=10**8, **options):
        return load_model(saved(family), offload=Offload(tmp_path, most), **options)

    return make


def in_memory(decoder):
    """Weights of the layers that may be on the disk and are not."""
    return [
        name
        for name, one in decoder.stack.named_parameters()
        if one in decoder.offload.places and not torch.isnan(one).all()
    ]


def test_what_is_kept_in_a_finer_dtype_is_not_rounded(saved, opened):
    """DeepSeek's routers choose with a buffer in 32 bits, in a model of 16."""
    path = Path(saved("deepseek_v3", torch.bfloat16))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    file = next(one for one in path.glob("*.safetensors") if name in load_file(one))
    fine = torch.linspace(-1, 1, 8) / 3
    save_file({**load_file(file), name: fine}, file, {"format": "pt"})
    for decoder in (load_model(str(path)), opened("deepseek_v3")):
        assert torch.equal(dict(decoder.model.named_buffers())[name], fine)


# --- sweeps


def check_sweeps(kinds, resident, offloaded, data):
    expected = Resident(resident, data).sweep([COLLECTORS[kind](resident) for kind in kinds])
    found = runner_for(offloaded, data).sweep([COLLECTORS[kind](resident) for kind in kinds])
    assert found.tables.keys() == expected.tables.keys() and found.loss == expected.loss
    for name, table in expected.tables.items():
        check_equal(found[name], table)
    assert in_memory(offloaded) == []
    assert all(p.requires_grad and p.grad is None for p in offloaded.model.parameters())


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", quick(FAMILIES))
def test_all_statistics_are_the_same(name, padding, saved, opened, calibration):
    data = grasp.Calibration(calibration.ids, "random", mask=MASKS[padding])
    of_any = [kind for kind in COLLECTORS if kind not in ON]
    check_sweeps(of_any, load_model(saved(name)), opened(name), data)


def test_statistics_of_every_family(family, saved, opened, calibration):
    check_sweeps(
        (Similarity, WeightGrad, Curvatures, InputCurvatures, LayerLosses),
        load_model(saved(family)),
        opened(family),
        calibration,
    )


def test_a_statistic_of_forward_passes_alone(family, saved, opened, calibration):
    check_sweeps(
        (Similarity, InputCurvatures), load_model(saved(family)), opened(family), calibration
    )


@pytest.mark.parametrize("layers", [[1], [3], [0, 2]])
def test_gradients_of_some_layers(layers, saved, opened, calibration):
    """Layers before the first that is asked for run once, without a graph; the others again."""
    resident, offloaded = load_model(saved("llama")), opened("llama")
    wanted = [linear.path for layer in layers for linear in resident.linears(layer)]
    runs = []
    for layer in offloaded.stack:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
    expected = Resident(resident, calibration).sweep([WeightGrad(wanted)])
    found = runner_for(offloaded, calibration).sweep([WeightGrad(wanted)])
    check_equal(found["weight_grad"], expected["weight_grad"])
    again = 4 - layers[0]
    assert len(runs) == calibration.num_blocks * (4 + again)


def test_one_layer_is_in_memory_at_a_time(opened, calibration):
    decoder, seen = opened("llama"), {"forward": [], "backward": []}
    for task, kinds in (("forward", [Similarity()]), ("backward", [Curvatures(paths(decoder))])):
        handles = [
            layer.mlp.register_forward_hook(
                lambda *_, task=task: seen[task].append(
                    {n.split(".")[0] for n in in_memory(decoder)}
                )
            )
            for layer in decoder.stack
        ]
        runner_for(decoder, calibration).sweep(kinds)
        for handle in handles:
            handle.remove()
    forward = [{str(index)} for index in range(4)]
    assert seen == {"forward": forward * 6, "backward": [*forward, *reversed(forward)] * 6}


def test_a_layer_that_need_not_run_is_not_read(opened, calibration, monkeypatch):
    """A method that goes from layer to layer reads each of them a few times, not once for every
    layer behind it.
    """
    decoder, reads = opened("llama"), []
    weight = decoder.stack[0].mlp.down_proj.weight
    hold = Offload._hold

    def counted(self, weights):
        weights = list(weights)
        fresh = any(one is weight for one in weights) and not self._held[weight]
        reads.extend([1] * fresh)
        return hold(self, weights)

    monkeypatch.setattr(Offload, "_hold", counted)
    runner = Offloaded(decoder, calibration)
    for layer in decoder.kept:
        paths = [one.path for one in decoder.layer(layer).linears.values()]
        runner.sweep([InputCurvatures(paths)], layers=(layer, layer))
    # the sweeps of layers 0 and 1, and what reads weights for the collectors
    assert len(reads) <= 2 * calibration.num_blocks + 2 < 4 * calibration.num_blocks


def test_a_weight_that_is_away_is_no_number(opened, calibration):
    decoder = opened("llama")
    linear = decoder.linears(1)[0]
    assert torch.isnan(linear.weight).all() and linear.shape == tuple(linear.weight.shape)
    runner = runner_for(decoder, calibration)
    with runner.holding(1):
        with runner.holding(1):
            assert torch.isfinite(linear.weight).all()
        assert torch.isfinite(linear.weight).all()
    assert torch.isnan(linear.weight).all()


def test_nothing_stays_in_memory_after_an_error(opened, calibration):
    class Failing(WeightGrad):
        def _take(self, path, grad):
            raise NumericsError("here")

    decoder = opened("llama")
    with pytest.raises(NumericsError, match="here"):
        runner_for(decoder, calibration).sweep([Failing(paths(decoder)[9:])])
    assert in_memory(decoder) == []
    assert all(p.requires_grad and p.grad is None for p in decoder.model.parameters())
    hooks = [module._forward_hooks for module in decoder.model.modules()]
    assert sum(map(len, hooks)) == 4  # those that bring the layers in


def test_large_sums_are_kept_in_files(opened, calibration, monkeypatch):
    monkeypatch.setattr(collector, "LARGE", 100)
    decoder, kept = opened("llama"), []
    zeros = Scratch.zeros
    monkeypatch.setattr(Scratch, "zeros", lambda *a, **o: kept.append(a[1:]) or zeros(*a, **o))
    wanted = WeightGrad(paths(decoder))
    found = runner_for(decoder, calibration).sweep([wanted])["weight_grad"]
    expected = Resident(Decoder(build("llama")), calibration).sweep([WeightGrad(wanted.paths)])
    check_equal(found, expected["weight_grad"])
    assert len(kept) == len(found)


def test_sums_come_back_when_their_pages_were_given_back(tmp_path):
    scratch = Scratch(tmp_path)
    kept = [scratch.hold(torch.full((40, 50), float(n))) for n in range(9)]
    scratch.release()
    assert all(torch.equal(one, torch.full((40, 50), float(n))) for n, one in enumerate(kept))
    kept[3].add_(1)
    scratch.release()
    assert float(kept[3].sum()) == 4 * 2000 and float(kept[2].sum()) == 2 * 2000


# --- edits


def check_weights(found, expected):
    """Equal to 1e-5 of the largest number of each."""
    check_equal(*({k: v for k, v in one.items() if v.numel()} for one in (found, expected)))
    assert found.keys() == expected.keys()


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_the_checkpoint_is_the_same(family, method, saved, opened, calibration, tmp_path):
    """Every weight that an edit brings goes to a file, and the log keeps none."""
    options = {"method": method, "data": calibration, **RECIPES[method]}
    expected = grasp.compress(saved(family), tmp_path / "a", **options)
    decoder = opened(family)
    result = grasp.compress(decoder, tmp_path / "b", **options)
    one, other = grasp.load(tmp_path / "a").model, grasp.load(tmp_path / "b").model
    assert result.manifest["edits"] == expected.manifest["edits"]
    check_weights(other.state_dict(), one.state_dict())
    assert in_memory(decoder) == []
    matrices = [p for p in decoder.stack.parameters() if p.dim() > 1 and p.numel()]
    assert all(one in decoder.offload.places for one in matrices)
    assert not any(entry.edit.tensors() for entry in result.log)
    names = [
        {p.name for p in (tmp_path / one).iterdir() if "model.saf" not in p.name} for one in "ab"
    ]
    assert names[0] == {name for name in names[1] if not name.startswith("model-")}
    ids = calibration.ids[:2]
    with torch.no_grad():
        assert close(result.model(ids).logits, expected.model(ids).logits)


def test_a_checkpoint_of_several_shards_is_compressed_again(saved, opened, calibration, tmp_path):
    """Low-rank pairs are left on the disk like dense matrices."""
    first = {"method": "grasp", "layers": (1,), "data": calibration}
    again = {"method": "grasp", "layers": (2,), "data": calibration}
    grasp.compress(opened("llama", most=1), tmp_path / "once", **first)
    shards = sorted(path.name for path in (tmp_path / "once").glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    decoder = load_model(str(tmp_path / "once"), offload=Offload(tmp_path, 10**8))
    pair = decoder.stack[1].mlp.up_proj
    assert {"weight", "weight_in"} <= {name for name, _ in pair.named_parameters()}
    assert pair.weight in decoder.offload.places and torch.isnan(pair.weight_in).all()
    grasp.compress(decoder, tmp_path / "b", **again)
    grasp.compress(str(tmp_path / "once"), tmp_path / "a", **again)
    assert same_weights(grasp.load(tmp_path / "b").model, grasp.load(tmp_path / "a").model)


def test_small_shards(opened, calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(Offload, "shard_bytes", 30_000)
    options = {"method": "shortgpt", "layers": (1,), "data": calibration}
    result = grasp.compress(opened("qwen2"), tmp_path / "b", **options)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    again = grasp.load(tmp_path / "b").model
    with torch.no_grad():
        assert close(again(calibration.ids).logits, result.model(calibration.ids).logits)


def test_the_checkpoint_is_written_part_by_part(opened, calibration, tmp_path, monkeypatch):
    """What was written is in nobody's hands when the next part is asked for."""
    state, before = Offload.state, []

    def asked(self, model, names=None):
        gc.collect()
        assert [one for one in before if one() is not None] == []
        found = state(self, model, names)
        before.extend(weakref.ref(found[name]) for name in found if "layers" in name)
        return found

    monkeypatch.setattr(Offload, "shard_bytes", 30_000)
    monkeypatch.setattr(Offload, "state", asked)
    options = {"method": "shortgpt", "layers": (1,), "data": calibration}
    grasp.compress(opened("llama"), tmp_path / "b", **options)
    assert len(before) == 3 * 9


@pytest.mark.parametrize(
    ("stored", "wanted"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")]
)
def test_another_dtype_than_the_files(stored, wanted, tmp_path, calibration):
    build("llama", stored).save_pretrained(tmp_path / "model")
    decoder = load_model(str(tmp_path / "model"), dtype=wanted, offload=Offload(tmp_path, 10**8))
    expected = load_model(str(tmp_path / "model"), dtype=wanted)
    assert same_weights_of(decoder, expected.model)
    options = {"method": "grasp", "layers": (1,), "data": calibration}
    grasp.compress(decoder, tmp_path / "b", **options)
    grasp.compress(expected, tmp_path / "a", **options)
    assert same_weights(grasp.load(tmp_path / "b").model, grasp.load(tmp_path / "a").model)


def same_weights_of(decoder, model):
    found, expected = decoder.offload.state(decoder.model), model.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].to(value), value) for name, value in expected.items()
    )


def test_what_is_tried_is_as_in_memory_and_leaves_nothing(saved, opened, calibration):
    resident, offloaded = load_model(saved("llama")), opened("llama")
    path = f"{resident.family.layers}.2.mlp.up_proj"
    factors = torch.randn(3, 32), torch.randn(48, 3)
    edits = {"drop": lambda: Drop(1), "pair": lambda: Factorize(path, *factors)}
    expected = Resident(resident, calibration).tried(edits, 3)
    assert runner_for(offloaded, calibration).tried(edits, 3) == pytest.approx(expected)
    assert same_weights_of(offloaded, resident.model) and in_memory(offloaded) == []
    with trial(offloaded, Drop(1)):
        pass
    assert runner_for(offloaded, calibration).tried(edits, 3) == pytest.approx(expected)


@pytest.mark.parametrize("fields", [{"net": "layer"}, {"net": "ffn"}])
def test_a_net_learns_in_the_place_of_layers(fields, saved, opened, calibration):
    """The gradient goes through layers that come and go, to a module that stays."""
    fields |= {"num_layers": 2, "loss": "lm", "learning_rate": 1e-3, "epochs": 2}
    options = {"method": "streamline", "data": calibration, **fields}
    expected = grasp.compress(saved("llama"), **options)
    result = grasp.compress(opened("llama"), **options)
    with torch.no_grad():
        found, wanted = (one.model(calibration.ids).logits for one in (result, expected))
    assert close(found, wanted)


def test_it_goes_on_from_its_journal(saved, opened, calibration, tmp_path, monkeypatch):
    """Edits are written down at once, since nothing of them waits in memory."""
    options = {"method": "svd-llm", "ratio": 0.2, "data": calibration}
    applied, apply = [], Offloaded.apply

    def interrupted(self, edit):
        if len(applied) == 5:
            raise KeyboardInterrupt
        applied.append(edit)
        return apply(self, edit)

    monkeypatch.setattr(Offloaded, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grasp.compress(opened("llama"), tmp_path / "b", **options)
    lines = (tmp_path / "b.journal").rglob("*")
    assert len([line for line in lines if line.name.startswith("edit")]) == 5
    monkeypatch.setattr(Offloaded, "apply", apply)
    grasp.compress(opened("llama"), tmp_path / "b", resume=True, **options)
    grasp.compress(saved("llama"), tmp_path / "a", **options)
    one, other = grasp.load(tmp_path / "a").model, grasp.load(tmp_path / "b").model
    check_weights(other.state_dict(), one.state_dict())


def test_the_folder_goes_with_the_model(opened, calibration, tmp_path):
    decoder = opened("llama")
    result = grasp.compress(decoder, method="grasp", layers=(1,), data=calibration)
    folder = decoder.offload.folder
    assert folder.parent == tmp_path and list(folder.glob("*.safetensors"))
    del decoder, result
    gc.collect()
    assert not folder.exists()


def test_the_model_that_is_read_stays_as_it_is(saved, opened, calibration, tmp_path):
    files = sorted((tmp_path / "llama").iterdir()) if saved("llama") else []
    before = [file.read_bytes() for file in files]
    grasp.compress(opened("llama"), tmp_path / "b", method="wanda", data=calibration)
    assert [file.read_bytes() for file in files] == before
