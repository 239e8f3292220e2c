"""Nothing is filled in, lost or guessed as a model is read: missing, surplus and ill-fitting
weights, and contents that make no sense.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import _GATED, _IDS, DIFFERENT, FAMILY_ROWS, build
from safetensors.torch import load_file, save_file
from test_checkpoint import NO_GRASP
from test_cli import SMALL, command

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize
from grasp.core.layers.modeling_grasp import GraspConfig
from grasp.core.runner import Resident
from grasp.errors import CheckpointError, ModelError
from grasp.serving.parts import Part

HEADS = {"AutoModelForSequenceClassification": 2, "AutoModelForTokenClassification": 2}


def factorised(name: str, path: Path, pivoted: bool = True) -> torch.nn.Module:
    """A tiny model with one pivoted pair and one plain, saved at `path`."""
    model = Decoder(build(name))
    for index, linear in enumerate((model.linears(1)[-1], model.linears(2)[0])):
        rows, columns = linear.shape
        places = (
            torch.randperm(rows, generator=torch.Generator().manual_seed(index)).int()
            if pivoted and index
            else None
        )
        shape = (rows - 4 if places is not None else rows, 4)
        Factorize(
            linear.path, torch.randn(4, columns) * 0.1, torch.randn(shape) * 0.1, places=places
        ).apply(model)
    model.model.save_pretrained(path)
    return model.model


def change_config(path: Path, **values: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_table(path: Path, **values: object) -> None:
    table = json.loads((path / "config.json").read_text())["quantization_config"]
    change_config(path, quantization_config={**table, **values})


def change_weights(path: Path, **change) -> None:
    """`change`: a function on the tensor whose name ends so (with _ for .); None takes it away."""
    tensors = load_file(path / "model.safetensors")
    for end, how in change.items():
        names = [name for name in tensors if name.endswith(end.replace("__", "."))]
        assert names, end
        for name in names:
            tensors[name] = how(tensors[name])
    save_file(
        {key: value.contiguous() for key, value in tensors.items() if value is not None},
        path / "model.safetensors",
        {"format": "pt"},
    )


def refused(path: Path, said: str) -> None:
    """Both a plain load and ours stop with a line that says `said`."""
    with pytest.raises(ValueError, match=said):
        transformers.AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(CheckpointError, match=said):
        grasp.load(path)


@pytest.fixture
def pair(tmp_path) -> Path:
    factorised("llama", tmp_path / "pair")
    return tmp_path / "pair"


# --- surplus, missing, mismatched


def test_a_layer_that_the_config_does_not_name_is_not_lost(tmp_path, model_directory, text_file):
    """In compress and eval of an ordinary model."""
    shorter = Path(shutil.copytree(model_directory, tmp_path / "model"))
    change_config(shorter, num_hidden_layers=3)
    for words in (
        ("compress", shorter, tmp_path / "out", "--ratio", "0.1", "--data", text_file, *SMALL),
        ("eval", shorter, "--ppl", text_file),
    ):
        error = command(*words).error
        assert "9 weights of the files have no place" in error and "model.layers.3." in error


def test_a_plain_load_of_ours_loses_no_layer_either(pair):
    change_config(pair, num_hidden_layers=3)
    refused(pair, r"9 weights of the files have no place .*model\.layers\.3\.")
    with pytest.raises(ValueError, match="no place"):
        transformers.AutoModel.from_pretrained(pair)


def test_a_missing_weight_of_ours_is_not_filled_in(pair):
    tensors = load_file(pair / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, pair / "model.safetensors", {"format": "pt"})
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModel,
        transformers.AutoModelForSequenceClassification,
    ):
        with pytest.raises(
            ValueError, match=r"missing from the files.*layers\.3\.mlp\.up_proj\.weight"
        ):
            auto.from_pretrained(pair)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_weight_of_another_shape_is_not_filled_in(pair, ignore):
    change_weights(pair, layers__3__mlp__up_proj__weight=lambda old: old[:-1])
    with pytest.raises((ValueError, RuntimeError)):
        transformers.AutoModelForCausalLM.from_pretrained(pair, ignore_mismatched_sizes=ignore)


def test_old_constants_among_the_weights_are_no_loss(pair, tmp_path, model_directory):
    """Rotary frequencies and masks, which earlier releases of transformers stored."""
    old = Path(shutil.copytree(model_directory, tmp_path / "model"))
    for place in (old, pair):
        tensors = load_file(place / "model.safetensors")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        assert grasp.load(place).model is not None


@pytest.mark.parametrize("method", ["no-such-method", "gtpq", None, 3])
def test_an_unknown_quant_method(method, tmp_path, model_directory):
    """transformers would warn, and go on as if there were none."""
    odd = Path(shutil.copytree(model_directory, tmp_path / "model"))
    change_config(odd, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CheckpointError, match="quantized by"):
        grasp.load(odd)
    with pytest.raises(CheckpointError, match="quantized by"):
        grasp.core.models.load_model(str(odd), empty=True)


# --- contents


@pytest.mark.parametrize("places", ["zero", "twice", "beyond", "negative"])
def test_places_that_are_no_order(places, pair):
    change = {
        "zero": torch.zeros_like,
        "twice": lambda old: torch.cat((old[1:2], old[1:])),
        "beyond": lambda old: old + 1,
        "negative": lambda old: old - 1,
    }[places]
    change_weights(pair, __places=change)
    refused(pair, r"places' is no order of the 32 outputs")


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["__weight_in", "q_proj__weight", "norm__weight"])
def test_weights_that_are_no_floats(name, kind, pair):
    change_weights(pair, **{name: lambda old: old.to(kind)})
    refused(pair, "not floating-point numbers")


RANK = {"model.layers.1.mlp.down_proj": 4, "model.layers.2.self_attn.q_proj": 4}
OLD_TABLES = {
    "scheme 'int7'": {
        "quantization": {
            "scheme": "int7",
            "group_size": 32,
            "modules": ["model.layers.0.mlp.up_proj"],
        }
    },
    "scheme 8": {"quantization": {"scheme": 8, "group_size": 32, "modules": []}},
    "group_size 0": {"quantization": {"scheme": "int4", "group_size": 0, "modules": []}},
    "group_size True": {"quantization": {"scheme": "int4", "group_size": True, "modules": []}},
    "must hold scheme": {"quantization": {"scheme": "int4"}},
    "list of paths": {"quantization": {"scheme": "int8", "group_size": 32, "modules": "model"}},
    "rank of 'model.layers.1.mlp.down_proj' is -1": {
        "ranks": {**RANK, "model.layers.1.mlp.down_proj": -1}
    },
    "rank of 'model.layers.1.mlp.down_proj' is '4'": {
        "ranks": {**RANK, "model.layers.1.mlp.down_proj": "4"}
    },
    "rank of 'model.layers.1.mlp.down_proj' is True": {
        "ranks": {**RANK, "model.layers.1.mlp.down_proj": True}
    },
    "only 32 outputs": {"ranks": {**RANK, "model.layers.2.self_attn.q_proj": 99}},
    "must give a rank to each path": {"ranks": [1]},
    "has no rank": {"pivoted": ["model.layers.0.mlp.up_proj"]},
    "names a path twice": {"pivoted": ["model.layers.2.self_attn.q_proj"] * 2},
    "LlamaForCausalLM lacks": {"ranks": {**RANK, "model.layers.0.mlp": 4}},
    "model.embed_tokens": {"ranks": {**RANK, "model.embed_tokens": 4}},
    "format 3.5": {"version": 3.5},
}
"""What formats 1 to 3 said."""
Q_PROJ = "model.layers.2.self_attn.q_proj"
TABLES = {
    "must give a record to each path": [1],
    "its kind must be one of": {Q_PROJ: {"kind": "magic"}},
    "is 'low-rank'; its kind": {Q_PROJ: "low-rank"},
    "rank of 'model.layers.2.self_attn.q_proj' is -1": {Q_PROJ: {"kind": "low-rank", "rank": -1}},
    "rank of 'model.layers.2.self_attn.q_proj' is True": {
        Q_PROJ: {"kind": "low-rank", "rank": True}
    },
    "'pivoted' of": {Q_PROJ: {"kind": "low-rank", "rank": 3, "pivoted": 1}},
    "only 32 outputs": {Q_PROJ: {"kind": "low-rank", "rank": 99, "pivoted": True}},
    "scheme 'int7'": {Q_PROJ: {"kind": "quantized", "scheme": "int7", "group_size": 32}},
    "group_size 0": {Q_PROJ: {"kind": "quantized", "scheme": "int4", "group_size": 0}},
    "inside: rank": {
        Q_PROJ: {
            "kind": "quantized",
            "scheme": "int8",
            "group_size": 32,
            "of": {"kind": "low-rank", "rank": -2},
        }
    },
    "the rows of": {Q_PROJ: {"kind": "narrow", "rows": -1, "columns": 32}},
    "only 32 x 32": {Q_PROJ: {"kind": "narrow", "rows": 64, "columns": 32}},
    "'scattered' of": {Q_PROJ: {"kind": "narrow", "rows": 4, "columns": 32, "scattered": 3}},
    "hidden size of 'model.layers.1'": {"model.layers.1": {"kind": "span", "hidden": 0}},
    "the width of 'model.layers.1'": {
        "model.layers.1": {"kind": "mlp-span", "hidden": 32, "width": "x"}
    },
    "names the layer 'model.layers.9'": {"model.layers.9": {"kind": "span", "hidden": 32}},
    "names the layer 'model.layers.1.mlp'": {"model.layers.1.mlp": {"kind": "span", "hidden": 32}},
    "LlamaForCausalLM lacks": {"model.layers.0.mlp": {"kind": "low-rank", "rank": 4}},
    "model.embed_tokens": {"model.embed_tokens": {"kind": "low-rank", "rank": 4}},
}
"""What this format may say wrongly."""


@pytest.mark.parametrize("said", OLD_TABLES)
def test_an_older_table_that_makes_no_sense(said, pair):
    older = {"quant_method": "grasp-llm", "version": 3, "ranks": RANK, "pivoted": [Q_PROJ]}
    older |= OLD_TABLES[said]
    change_config(pair, quantization_config=older)
    refused(pair, said.replace(".", r"\."))


@pytest.mark.parametrize("said", TABLES)
def test_a_table_that_makes_no_sense(said, pair):
    change_table(pair, structure=TABLES[said])
    words = said.removeprefix("inside: ").replace("[", r"\[")
    refused(pair, words.replace(".", r"\."))


@pytest.mark.parametrize("wrong", [{"scheme": "int7"}, {"group_size": -1}])
def test_the_server_checks_the_same_table(wrong):
    """vLLM's loader reads the table by `GraspConfig` (grasp.serving.vllm_linear)."""
    text = Path(grasp.__file__).with_name("serving").joinpath("vllm_linear.py").read_text()
    assert "GraspConfig(**" in text
    with pytest.raises(ValueError, match=r"config\.json"):
        GraspConfig(quantization={"scheme": "int4", "group_size": 32, "modules": [], **wrong})


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("places", torch.zeros(8, dtype=torch.int32), "no order"),
        ("places", torch.arange(1, 9), "no order"),
        ("weight", torch.ones(6, 2, dtype=torch.int64), "not floating"),
        ("weight_in", torch.ones(2, 5, dtype=torch.bool), "not floating"),
    ],
)
def test_the_server_checks_the_same_contents(name, tensor, said):
    part = Part("a.b", 8, 5, [range(8)], range(5), rank=2, pivoted=True)
    with pytest.raises(ValueError, match=said):
        part.load(name, tensor, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "qdata",
    [torch.ones(8, 5, dtype=torch.int32), torch.ones(8, 4, dtype=torch.int8), torch.ones(8, 5)],
)
def test_the_server_checks_numbers_in_few_bits(qdata):
    part = Part("a.b", 8, 5, [range(8)], range(5), scheme="int8", group_size=32)
    part.load("weight", torch.ones(8, 1), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="does not fit the quantization"):
        part.load("weight_qdata", qdata, torch.device("cpu"), torch.float32)


# --- other classes than the one saved


def body(model, ids):
    with torch.no_grad():
        return model.base_model(input_ids=ids).last_hidden_state


def test_the_body_alone_loads(family, tmp_path, calibration):
    """AutoModel, a classifier, what they save: the paths of config.json are the causal model's."""
    want = body(factorised(family, tmp_path / "out"), calibration.ids)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(body(loaded, calibration.ids), want)
    loaded.save_pretrained(tmp_path / "body")
    assert torch.equal(
        body(transformers.AutoModel.from_pretrained(tmp_path / "body"), calibration.ids), want
    )
    assert torch.equal(
        body(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "body"), calibration.ids),
        want,
    )
    for name in HEADS:
        auto = getattr(transformers, name)
        if type(loaded.config) in auto._model_mapping:
            model = auto.from_pretrained(tmp_path / "out", num_labels=2)
            assert torch.equal(body(model, calibration.ids), want), name
            model.save_pretrained(tmp_path / name)
            assert torch.equal(
                body(auto.from_pretrained(tmp_path / name), calibration.ids), want
            ), name


ALL = """
import json, sys, torch
{before}
import transformers
for path, auto in json.loads(sys.argv[1]):
    for place in (path, path + "-again"):
        model = getattr(transformers, auto).from_pretrained(place, trust_remote_code=True)
        ids, want = (torch.load(f"{{path}}.{{name}}") for name in ("ids", "want"))
        with torch.no_grad():
            found = model.base_model(input_ids=ids)[0]
        # products of experts may differ by their order
        far = float((found - want).abs().max() / want.abs().max())
        assert far < 3e-5 and "grasp" not in sys.modules, (place, auto, type(model), far)
        if place == path:
            model.save_pretrained(path + "-again")
print("RESULT all equal")
"""
OWN = '''"""A model with code of its own."""

from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = 2 * output.logits
        return output
'''
OWN_CONFIG = '''"""Its configuration."""

from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
'''


def own_code(path: Path, tokenizer=None) -> Path:
    """A directory as on the hub, with its own modelling file."""
    build("llama").save_pretrained(path)
    change_config(
        path,
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )
    (path / "modeling_own.py").write_text(OWN)
    (path / "configuration_own.py").write_text(OWN_CONFIG)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_model_with_code_of_its_own(tmp_path, calibration, monkeypatch):
    """Loads again with the flag, refuses without, and is what its code makes (logits doubled)."""
    own_code(tmp_path / "model")
    made = grasp.compress(
        tmp_path / "model", tmp_path / "out", ratio=0.1, data=calibration, trust_remote_code=True
    )
    want = logits(made.model, calibration.ids)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    )
    assert type(loaded).__name__ == "OwnForCausalLM" and torch.equal(
        logits(loaded, calibration.ids), want
    )
    loaded.save_pretrained(tmp_path / "again")
    again = grasp.load(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(again.model, calibration.ids), want)
    assert (tmp_path / "out" / "modeling_own.py").read_text().startswith(OWN)  # and one line more
    with pytest.raises(ModelError, match="--trust-remote-code"):
        grasp.load(tmp_path / "out")


@pytest.mark.parametrize(
    "families",
    [DIFFERENT[:2], pytest.param(tuple(FAMILY_ROWS), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_all_of_it_without_grasp(families, tmp_path, calibration):
    """In one process that has no grasp: the body of each family, a classifier, a multimodal model,
    and one with code of its own.
    """
    from test_wrappers import saved

    cases = []
    for name in families:
        model = factorised(name, tmp_path / name)
        cases.append((name, "AutoModel", body(model, calibration.ids)))
    model = factorised("llama", tmp_path / "classifier")
    cases.append(("classifier", "AutoModelForSequenceClassification", body(model, calibration.ids)))
    for name in ("gemma3", "llama4"):
        saved(name, tmp_path / f"{name}-dense")
        made = grasp.compress(
            tmp_path / f"{name}-dense", tmp_path / name, ratio=0.1, data=calibration
        )
        with torch.no_grad():
            cases.append(
                (
                    name,
                    "AutoModelForImageTextToText",
                    made.model.base_model(input_ids=calibration.ids)[0],
                )
            )
    own = own_code(tmp_path / "own-dense")
    made = grasp.compress(
        own, tmp_path / "own", ratio=0.1, data=calibration, trust_remote_code=True
    )
    cases.append(("own", "AutoModelForCausalLM", body(made.model, calibration.ids)))
    for name, _, want in cases:
        torch.save(want, tmp_path / f"{name}.want")
        torch.save(calibration.ids, tmp_path / f"{name}.ids")
    told = json.dumps([(str(tmp_path / name), auto) for name, auto, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", ALL.format(before=NO_GRASP), told],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RESULT all equal" in done.stdout, done.stderr[-3000:]


# --- classes in memory


class Mine(transformers.LlamaForCausalLM):
    pass


class Changed(transformers.LlamaForCausalLM):
    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("method", ["grasp-fisher", "shortgpt"])
def test_a_class_that_adds_nothing_is_saved_as_its_base(method, local, tmp_path, calibration):
    class Inside(transformers.LlamaForCausalLM):
        """Nothing."""

    model = (Inside if local else Mine)(transformers.LlamaConfig(**_GATED, **_IDS)).eval()
    size = {"ratio": 0.1} if method == "grasp-fisher" else {"num_layers": 1}
    made = grasp.compress(model, tmp_path / "out", method=method, data=calibration, **size)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, calibration.ids), logits(made.model, calibration.ids))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]


def test_a_class_that_adds_something_is_refused_before_any_work(calibration, tmp_path, monkeypatch):
    monkeypatch.setattr(Resident, "sweep", lambda *_, **__: pytest.fail("work was begun"))
    model = Changed(transformers.LlamaConfig(**_GATED, **_IDS))
    with pytest.raises(
        grasp.GraspError,
        match=r"Changed .* adds forward to LlamaForCausalLM.*register_for_auto_class",
    ):
        grasp.compress(model, tmp_path / "out", ratio=0.1, data=calibration)
    assert Decoder(model).num_layers == 4  # it can be run and looked into all the same
