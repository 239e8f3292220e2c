"""Embedding and head in few bits: stored once where they are tied, through all that is done with a
model; and every width in every family, loaded where grasp is not installed.
"""

import copy
import json
import subprocess
import sys

import pytest
import torch
from closeness import close
from conftest import FAMILY_ROWS, build
from safetensors import safe_open
from test_checkpoint import NO_GRASP
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Quantize
from grasp.core.edits.ordinary import dequantize
from grasp.core.edits.placing import vocabulary_paths
from grasp.core.layers import quantized_grasp
from grasp.core.rounding import rounded
from grasp.errors import RecipeError

IDS = torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def is_tied(model) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return all(getattr(head, name) is p for name, p in table.named_parameters())


def edit(decoder: Decoder, path: str, scheme: str) -> Quantize:
    weight = decoder.model.get_submodule(path).weight
    return Quantize(path, scheme, 32, rounded("weight", weight, scheme, 32, weight.dtype))


@pytest.mark.parametrize(
    "embeddings", [4, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (8, 6))]
)
def test_every_family(family, embeddings, tmp_path):
    """Saved, loaded, saved again, copied, cast, dequantised: the same model, tied where it was."""
    model = build(family)
    tied, numbers = is_tied(model), Decoder(model).num_parameters()
    before = logits(model)
    done = grasp.quantize(model, tmp_path / "out", bits=8, embeddings=embeddings)
    after, decoder = logits(done.model), done.decoder
    assert (
        0 < float((after - before).norm() / before.norm()) < {8: 0.05, 6: 0.1, 4: 0.3}[embeddings]
    )
    assert decoder.num_parameters() == numbers
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = [t for key, t in stored.items() if not key.endswith("correction_bias")]  # a buffer
    assert sum(t.nbytes for t in weights) == decoder.num_bytes()
    assert decoder.num_bytes() == done.manifest["quantization"]["bytes_after"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert close(logits(again), after) and is_tied(again) == is_tied(done.model) == tied
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    twin = copy.deepcopy(third)
    assert close(logits(twin), after) and is_tied(twin) == tied
    twin.half().float()
    assert is_tied(twin) == tied and torch.allclose(logits(twin), after, atol=0.05)
    twin.tie_weights()
    assert is_tied(twin) == tied
    text = third.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=258)
    assert text.shape == (4, 23)
    with pytest.raises(ValueError, match=rf"few bits \(int{embeddings}\) and cannot be resized"):
        third.resize_token_embeddings(300)
    dequantize(Decoder(third))
    assert close(logits(third), after)
    assert (third.get_output_embeddings().weight is third.get_input_embeddings().weight) == tied
    third.resize_token_embeddings(300)


def test_undone(family):
    decoder = Decoder(build(family))
    before, numbers = logits(decoder.model), decoder.num_bytes()
    tied, ends = is_tied(decoder.model), vocabulary_paths(decoder)
    undo = edit(decoder, ends["embedding"], "int4").apply(decoder)
    assert decoder.num_bytes() < numbers and not torch.equal(logits(decoder.model), before)
    undo()
    assert torch.equal(logits(decoder.model), before) and is_tied(decoder.model) == tied
    assert decoder.num_bytes() == numbers
    assert "weight_qdata" not in str(decoder.model.all_tied_weights_keys)


def test_a_tied_head_has_no_numbers_of_its_own():
    decoder = Decoder(build("llama"))
    with pytest.raises(RecipeError, match=r"'lm_head' is tied to 'model\.embed_tokens'.*give that"):
        edit(decoder, "lm_head", "int8").apply(decoder)
    edit(decoder, "model.embed_tokens", "int8").apply(decoder)
    with pytest.raises(RecipeError, match="quantized already"):
        edit(Decoder(decoder.model), "model.embed_tokens", "int8").apply(decoder)


def test_only_rows_that_are_looked_up_are_dequantised(monkeypatch):
    from grasp.core.layers import embedding_grasp

    decoder = Decoder(build("gemma"))
    edit(decoder, "model.embed_tokens", "int6").apply(decoder)
    table, seen = decoder.model.get_input_embeddings(), []
    whole = embedding_grasp.dequantized

    def watched(qdata, *rest):
        seen.append(len(qdata))
        return whole(qdata, *rest)

    monkeypatch.setattr(embedding_grasp, "dequantized", watched)
    found = table(torch.tensor([[3, 5], [3, 259]]))
    assert seen == [4] and found.shape == (2, 2, 32)
    scaled = whole(
        table.weight_qdata, table.weight, table.weight_zero, "int6", 32, 32
    ) * table.embed_scale  # fmt: skip
    assert torch.equal(found[1, 1], scaled[259])


def test_the_head_is_multiplied_in_slices(monkeypatch):
    decoder = Decoder(build("llama"))
    edit(decoder, "model.embed_tokens", "int6").apply(decoder)
    before = logits(decoder.model)
    monkeypatch.setattr(quantized_grasp, "SLICE", 7 * 32)
    assert close(logits(decoder.model), before)


LOAD_ALL = """
import json, sys, torch
{before}
from transformers import AutoModelForCausalLM
wrong = []
for path in json.load(open(sys.argv[1])):
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    with torch.no_grad():
        found = model(input_ids=torch.load(sys.argv[2])).logits.float()
    right = torch.load(path + "/logits.pt")
    if not (found - right).abs().max() <= 1e-5 * right.abs().max():
        wrong.append(path)
print("RESULT", wrong, "grasp" in sys.modules)
"""


@pytest.mark.slow
def test_every_width_of_every_family_where_grasp_is_not_installed(tmp_path):
    schemes = [(8, 4), (6, 8), (5, 6), (4, 16), (3, 4)]
    paths = []
    for family in FAMILY_ROWS:
        for bits, embeddings in schemes:
            path = tmp_path / f"{family}-{bits}"
            model = grasp.quantize(build(family), bits=bits, embeddings=embeddings).model
            model.save_pretrained(path)
            torch.save(logits(model), path / "logits.pt")
            paths.append(str(path))
    (tmp_path / "paths.json").write_text(json.dumps(paths))
    torch.save(IDS, tmp_path / "ids.pt")
    code = LOAD_ALL.format(before=NO_GRASP)
    words = [sys.executable, "-c", code, tmp_path / "paths.json", tmp_path / "ids.pt"]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "RESULT [] False" in run.stdout, run.stdout + run.stderr[-2000:]


def test_read_by_other_classes(tmp_path):
    """A body and a classifier have no head; what they share is the same."""
    done = grasp.quantize(build("llama"), tmp_path / "tied", bits=4, embeddings=4)
    body = AutoModel.from_pretrained(tmp_path / "tied")
    with torch.no_grad():
        states = body(input_ids=IDS).last_hidden_state
        assert close(states, done.model.model(input_ids=IDS).last_hidden_state)
    kind = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tied")
    assert kind.get_input_embeddings().scheme == "int4"


def test_widths_mixed_in_one_model(tmp_path):
    decoder = Decoder(build("qwen3"))
    for layer, scheme in enumerate(("int3", "int5", "int6", "int8")):
        path = f"model.layers.{layer}.mlp.up_proj"
        weight = decoder.model.get_submodule(path).weight
        numbers = rounded("weight", weight, scheme, 8 * 2**layer, weight.dtype)
        Quantize(path, scheme, 8 * 2**layer, numbers).apply(decoder)
    edit(decoder, "lm_head", "int6").apply(decoder)
    edit(decoder, "model.embed_tokens", "int4").apply(decoder)
    decoder.model.save_pretrained(tmp_path)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(decoder.model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_of_a_sliced_model(name, tmp_path, calibration):
    """Its embedding is of a class of ours already, and its head no longer tied."""
    small = grasp.compress(build(name), method="slicegpt", ratio=0.1, data=calibration)
    done = grasp.quantize(small.decoder, tmp_path / "few", bits=6, embeddings=4)
    again = grasp.load(tmp_path / "few").model
    assert close(logits(again), logits(done.model))
    dequantize(Decoder(again))
    assert close(logits(again), logits(done.model))
    assert again.get_input_embeddings().record()["kind"] == "sliced"


def test_what_dequantises_it(model_directory, text_file, tmp_path):
    data = grasp.Calibration(IDS, "random")
    done = grasp.quantize(model_directory, tmp_path / "few", bits=6, embeddings=6)
    said = logits(done.model)
    looked = grasp.inspect(str(tmp_path / "few"), data=text_file, seq_len=20, num_samples=4)
    assert len(looked.singular_values) == 4 * 7
    small = grasp.compress(str(tmp_path / "few"), tmp_path / "small", ratio=0.2, data=data)
    assert type(small.model.get_input_embeddings()) is torch.nn.Embedding
    dense = grasp.export(tmp_path / "few", tmp_path / "dense", format="dense").path
    assert close(logits(AutoModelForCausalLM.from_pretrained(dense)), said)
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scheme": "int7"}, "scheme 'int7' of 'model.embed_tokens' is unknown"),
        ({"group_size": 0}, "group_size 0 of 'model.embed_tokens' must be a whole number"),
        ({"part": "tail"}, "part of 'model.embed_tokens' is 'tail', which Embedding is not"),
        ({"scheme": "int8"}, r"missing from the files.*weight_zero'"),
        ({"group_size": 8}, "model.embed_tokens"),
    ],
)
def test_a_config_that_does_not_fit(change, says, tmp_path):
    grasp.quantize(build("llama"), tmp_path / "out", bits=8, embeddings=4)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["structure"]["model.embed_tokens"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(grasp.GraspError, match=says) as said:
        grasp.load(tmp_path / "out")
    assert "\n" not in str(said.value)
