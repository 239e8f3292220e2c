"""GGUF: blocks hold the numbers of the checkpoint, whatever the order of rows; what llama.cpp's
converter makes of it, transformers reads.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYERS, build
from test_cli import command
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Quantize
from grasp.core.models import embedded_model
from grasp.core.rounding import rounded
from grasp.serving.gguf import TYPES, Rows, _rounded, blocks, write_again

gguf = pytest.importorskip("gguf")

CONVERTER = Path(sys.prefix) / "llama.cpp" / "convert_hf_to_gguf.py"
needs_converter = pytest.mark.skipif(
    not CONVERTER.is_file() or importlib.util.find_spec("sentencepiece") is None,
    reason="make test-export fetches llama.cpp's converter",
)
MATRICES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
PATHS = [f"model.layers.{layer}.{name}" for layer in (0, 2) for name in MATRICES]


def quantized(scheme, group_size=32, dtype=torch.float32):
    """A tiny Llama with a few matrices and the embedding in few bits."""
    decoder = Decoder(build("llama", dtype))
    for path in (*PATHS, "model.embed_tokens"):
        weight = decoder.model.get_submodule(path).weight
        edit = Quantize(
            path, scheme, group_size, rounded("weight", weight, scheme, group_size, dtype)
        )
        edit.apply(decoder)
    return decoder


def read(tensor):
    """The matrix (rows, columns) of a tensor, by the format's own reader."""
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("scheme", TYPES)
def test_blocks_hold_the_numbers(scheme, group_size, dtype):
    """Scales and minima are rounded to float16, which is far less than a step of the numbers; what
    has no type is rounded again to 8 bits, by half a step of these at most.
    """
    decoder = quantized(scheme, group_size, dtype)
    decoder.model.float()  # the stored numbers stand for this; in bfloat16 they would be rounded
    for module in _rounded(decoder).values():
        kind = gguf.GGMLQuantizationType[TYPES[scheme]]
        found = torch.from_numpy(gguf.quants.dequantize(blocks(module), kind))
        expected = module.dequantized("weight")
        most = float(expected.abs().max())
        assert (found - expected).abs().max() <= (1 / 250 if scheme == "int6" else 2**-9) * most


@pytest.fixture
def written(tmp_path):
    """`written(tensors)`: a GGUF file in float32 with these."""

    def write(tensors):
        file = gguf.GGUFWriter(tmp_path / "wide.gguf", "llama")
        file.add_block_count(2)
        file.add_array("some.words", ["a", "b"])
        file.add_string("general.name", "tiny")
        for name, tensor in tensors.items():
            file.add_tensor(name, tensor.float().numpy())
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        return tmp_path / "wide.gguf"

    return write


def test_rows_are_found_in_any_order(written, tmp_path):
    decoder = quantized("int4")
    modules = _rounded(decoder)
    q, v, up = (modules[path].dequantized("weight") for path in PATHS[:3])
    order = torch.randperm(len(q), generator=torch.Generator().manual_seed(1))
    tensors = {
        "turned": q[order],
        "together": torch.cat((v, up)),
        "columns": up.flip(1),
        "halved": v / 2,
        "norm": torch.ones(32),
    }
    rows = Rows(modules, torch.float32)
    found = write_again(written(tensors), tmp_path / "small.gguf", rows)
    assert found == set(PATHS[:3])
    file = gguf.GGUFReader(tmp_path / "small.gguf")
    types = {one.name: one.tensor_type.name for one in file.tensors}
    assert types == {
        "turned": "Q4_1",
        "together": "Q4_1",
        "columns": "F32",
        "halved": "F32",
        "norm": "F32",
    }
    for one in file.tensors:
        assert torch.allclose(read(one), tensors[one.name], atol=2e-3), one.name
    told = {name: field.contents() for name, field in file.fields.items()}
    assert told["general.architecture"] == "llama" and told["general.name"] == "tiny"
    assert told["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    assert told["some.words"] == ["a", "b"] and told["llama.block_count"] == 2


def test_equal_rows_of_other_types_do_not_disturb(written, tmp_path):
    """A row of zeros is in both matrices, of which one has 8 bits."""
    decoder = Decoder(build("llama"))
    for path, scheme in zip(PATHS[:2], ("int4", "int8"), strict=True):
        weight = decoder.model.get_submodule(path).weight
        with torch.no_grad():
            weight[1] = 0
        Quantize(path, scheme, 32, rounded("weight", weight, scheme, 32, torch.float32)).apply(
            decoder
        )
    modules = _rounded(decoder)
    tensors = {path: modules[path].dequantized("weight") for path in PATHS[:2]}
    found = write_again(written(tensors), tmp_path / "small.gguf", Rows(modules, torch.float32))
    kinds = [one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "small.gguf").tensors]
    assert found == set(PATHS[:2]) and kinds == ["Q4_1", "Q8_0"]


OWN_CONVERTER = """
import sys
from pathlib import Path
import gguf
from safetensors.numpy import load_file

source, _, target, _, kind = sys.argv[1:]
assert kind == "f32" and (Path(source) / "tokenizer.json").is_file()
file = gguf.GGUFWriter(target, "opt")
for name, tensor in load_file(Path(source) / "model.safetensors").items():
    file.add_tensor(name, (tensor[:, ::-1] if "fc2.w" in name else tensor[::-1]).copy())
file.write_header_to_file()
file.write_kv_data_to_file()
file.write_tensors_to_file()
file.close()
"""
"""Another order of rows, which is found again, and for one matrix of columns, which is not; of a
family whose files transformers does not read.
"""


def test_what_is_not_found_stays_dense_and_is_named(tokenizer, tmp_path, caplog):
    build("opt").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    grasp.quantize(tmp_path / "dense", tmp_path / "small", bits=4, group_size=32)
    (tmp_path / "own.py").write_text(OWN_CONVERTER)
    done = grasp.export(
        tmp_path / "small", tmp_path / "out", format="gguf", converter=tmp_path / "own.py"
    )
    file = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    kinds = {one.name: one.tensor_type.name for one in file.tensors if len(one.shape) > 1}
    for name, kind in kinds.items():
        is_rounded = ".layers." in name and "fc2" not in name
        assert kind == ("Q4_1" if is_rounded else "F32"), name
    assert f"{LAYERS} of {6 * LAYERS} matrices in few bits are in float32" in caplog.text
    assert (
        "layers.0.fc2" in caplog.text and "transformers reads no GGUF files of opt" in caplog.text
    )
    assert done.bytes == (tmp_path / "out" / "model.gguf").stat().st_size
    assert {one.name for one in (tmp_path / "out").iterdir()} >= {"README.md", "tokenizer.json"}
    assert not [one for one in (tmp_path / "out").iterdir() if one.is_dir()]


# --- by llama.cpp's converter


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Llama with SmolLM2's tokenizer, since the converter takes known ones only."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
            pad_token_id=2, tie_word_embeddings=True,
        )
    )  # fmt: skip
    path = tmp_path_factory.mktemp("dense") / "dense"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@needs_converter
@pytest.mark.parametrize(
    ("bits", "embeddings", "kinds"),
    [
        (4, 8, {"Q4_1", "Q8_0"}),
        pytest.param(5, 4, {"Q5_1", "Q4_1"}, marks=pytest.mark.slow),
        pytest.param(6, 16, {"Q8_0"}, marks=pytest.mark.slow),
    ],
)
def test_a_rounded_model_keeps_its_bits(bits, embeddings, kinds, dense, tmp_path, monkeypatch):
    """What is not in few bits is stored in bfloat16."""
    small = tmp_path / "small"
    given = {"bits": bits, "embeddings": embeddings, "group_size": 32}
    grasp.quantize(dense, small, **given, dtype="bfloat16")
    done = command("export", small, tmp_path / "out", "--format", "gguf", "--converter", CONVERTER)
    assert done.status == 0, done.err
    file = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    found = {one.name: one.tensor_type.name for one in file.tensors if len(one.shape) > 1}
    assert len(found) == 2 * 7 + 1
    assert set(found.values()) == kinds | ({"BF16"} if embeddings == 16 else set())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-cli -m out/model.gguf" in card and "blocks of 32 columns" in card
    monkeypatch.chdir(tmp_path)
    readme: dict = {}
    exec(card.split("```python")[1].split("```")[0], readme)
    ids = readme["tokenizer"]("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        right = grasp.load(small, dtype="float32").model(input_ids=ids.input_ids).logits
        said = readme["model"](input_ids=ids.input_ids).logits
        raw = AutoModelForCausalLM.from_pretrained(dense)(input_ids=ids.input_ids).logits
    # scales are in float16, and 6 bits are rounded again
    lost = 0.4 if bits == 6 else 0.05
    assert (said - right).norm() < lost * (raw - right).norm()


# --- mistakes


def test_without_a_converter(model_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    asked = ("export", model_directory, tmp_path / "out", "--format", "gguf")
    assert "give a copy with --converter FILE" in command(*asked).error
    assert "no such file" in command(*asked, "--converter", tmp_path / "nowhere.py").error
    (tmp_path / "broken.py").write_text("raise NotImplementedError('Model Own is not supported')")
    said = command(*asked, "--converter", tmp_path / "broken.py").error
    assert "status 1 (NotImplementedError: Model Own is not supported)" in said
    assert not (tmp_path / "out").exists()
    asked = ("export", model_directory, tmp_path / "out", "--format", "dense")
    said = command(*asked, "--converter", tmp_path / "broken.py").error
    assert "--format dense needs no converter" in said
