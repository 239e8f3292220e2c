"""The export for servers' own kernels: the written numbers stand for those of the checkpoint, and
what the format has no words for is refused.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import build
from safetensors.torch import load_file
from test_export import run_readme
from transformers import AutoModelForCausalLM

import grasp
from grasp.core.compressed_tensors import alike
from grasp.core.decoder import Decoder
from grasp.core.edits import Quantize
from grasp.core.layers.packing_grasp import packed
from grasp.core.rounding import rounded
from grasp.serving.compressed_tensors import in_words

CT = "compressed-tensors"
IDS = torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(2))
READER = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="make test-export installs compressed-tensors"
)
FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "opt")
"""Tied, biased, with scaled norms, stored as one, with other names."""
SCHEMES = {
    "int4-symmetric": {"bits": 4},
    "int8": {"bits": 8},
    "int8-dynamic": {"bits": 8, "activations": "int8"},
}


def in_groups(name, **options):
    """A model whose matrices are all cut into whole groups of 32 columns."""
    return build(
        name, intermediate_size=64, **({"ffn_dim": 64} if name == "opt" else {}), **options
    )


def dequantized(tensors: dict[str, torch.Tensor], path: str, bits: int) -> torch.Tensor:
    """What the written tensors of a linear stand for, number by number as the format's description
    has it.
    """
    scale = tensors[f"{path}.weight_scale"]
    if f"{path}.weight" in tensors:
        return tensors[f"{path}.weight"] * scale
    (rows, columns), packed = tensors[f"{path}.weight_shape"].tolist(), f"{path}.weight_packed"
    found = torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            word, place = divmod(column, 32 // bits)
            number = (int(tensors[packed][row, word]) >> place * bits) % 2**bits - 2 ** (bits - 1)
            found[row, column] = number * scale[row, column * scale.shape[1] // columns]
    return found


def exported(model, folder: Path, **options) -> tuple[Path, Path]:
    grasp.quantize(model, folder / "ours", layout=CT, **options)
    return folder / "ours", grasp.export(folder / "ours", folder / "theirs", format=CT).path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_written_numbers_stand_for_ours(scheme, tmp_path):
    ours, theirs = exported(in_groups("qwen2"), tmp_path, **SCHEMES[scheme])
    model, tensors = grasp.load(ours).model, load_file(theirs / "model.safetensors")
    bits = 4 if scheme == "int4-symmetric" else 8
    for path in ("model.layers.0.self_attn.k_proj", "model.layers.3.mlp.down_proj"):
        module = model.get_submodule(path)
        assert module.scheme == scheme
        assert torch.equal(dequantized(tensors, path, bits), module.dequantized("weight"))
        if module.bias is not None:
            assert torch.equal(tensors[f"{path}.bias"], module.bias)
    plain = {name for name in tensors if "_proj." not in name}
    state = model.state_dict()
    assert plain and all(torch.equal(tensors[name], state[name]) for name in plain)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [1, 7, 32, 70])
def test_words_hold_the_first_number_lowest(bits, columns):
    numbers = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(1))
    words = in_words(in_bytes(numbers, bits))
    assert words.dtype == torch.int32 and words.shape == (3, -(-columns * bits // 32))
    for column in range(columns):
        word, place = divmod(column, 32 // bits)
        assert torch.equal(words[:, word].long() >> place * bits & 2**bits - 1, numbers[:, column])


@READER
@pytest.mark.parametrize("bits", [8, 4])
def test_the_package_itself_packs_and_unpacks_so(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    numbers = torch.randint(0, 2**bits, (5, 70), generator=torch.Generator().manual_seed(1))
    signed = (numbers - 2 ** (bits - 1)).to(torch.int8)
    words = in_words(in_bytes(numbers, bits))
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, (5, 70)), signed)


def in_bytes(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    return packed(numbers, "int4") if bits == 4 else numbers.to(torch.uint8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_config_is_that_of_the_format(scheme, tmp_path):
    _, theirs = exported(in_groups("llama"), tmp_path, **SCHEMES[scheme])
    config = json.loads((theirs / "config.json").read_text())
    told = config["quantization_config"]
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config
    assert told["quant_method"] == CT and told["quantization_status"] == "compressed"
    dynamic = scheme == "int8-dynamic"
    assert told["format"] == ("int-quantized" if dynamic else "pack-quantized")
    assert told["ignore"] == ["lm_head"]
    [group] = told["config_groups"].values()
    assert len(group["targets"]) == 4 * 7 and "model.layers.0.mlp.up_proj" in group["targets"]
    weights = {"type": "int", "symmetric": True, "dynamic": False}
    if scheme == "int4-symmetric":
        weights |= {"num_bits": 4, "strategy": "group", "group_size": 32}
    else:
        weights |= {"num_bits": 8, "strategy": "channel"}
    assert group["weights"] == weights and group["format"] == told["format"]
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    assert group["input_activations"] == ({**tokens, "dynamic": True} if dynamic else None)
    assert not (theirs / "grasp.json").exists() and not list(theirs.glob("*.py"))


@READER
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_gives_the_same_logits(name, scheme, tmp_path):
    """In float32, so that the order of sums does not matter; activations are rounded with other
    scales there.
    """
    ours, theirs = exported(in_groups(name), tmp_path, **SCHEMES[scheme])
    right = logits(grasp.load(ours).model)
    found = logits(AutoModelForCausalLM.from_pretrained(theirs))
    near = 0.05 if scheme == "int8-dynamic" else 1e-5
    assert float((found - right).abs().max()) < near * float(right.abs().max())


@READER
def test_kinds_mixed_in_one_model(tmp_path):
    """Each layer, and attention and MLP of one, in a kind of its own; one dense. In bfloat16, with
    an embedding in few bits, which is dense in the export.
    """
    decoder, kinds = mixed(in_groups("llama", dtype=torch.bfloat16), tmp_path / "ours")
    done = grasp.export(tmp_path / "ours", tmp_path / "theirs", format=CT)
    assert "dense again" in done.notes[0]
    told = json.loads((done.path / "config.json").read_text())["quantization_config"]
    assert told["format"] == "mixed-precision" and len(told["config_groups"]) == len(kinds)
    assert "model.layers.3.mlp.up_proj" in told["ignore"]
    again, right = AutoModelForCausalLM.from_pretrained(done.path), logits(decoder.model)
    assert float((logits(again) - right).abs().max()) < 0.04 * float(right.abs().max())
    for path, module in decoder.model.named_modules():
        if hasattr(module, "dequantized") and not path.endswith("lm_head"):
            weight = again.get_submodule(path).weight
            assert torch.equal(weight, module.dequantized("weight")), path


KINDS = {
    "0.self_attn": ("int4-symmetric", 32),
    "0.mlp": ("int8", 32),
    "1.self_attn": ("int8", 32),
    "1.mlp": ("int4-symmetric", 64),
    "2.self_attn": ("int8-dynamic", 32),
    "2.mlp": ("int8-dynamic", 32),
}


def mixed(model, folder: Path, embedding: bool = True) -> tuple[Decoder, set[tuple[str, int]]]:
    """A checkpoint with linears of all kinds: (itself, the kinds)."""
    decoder, kinds = Decoder(model), dict[tuple[str, int], None]()
    chosen = {
        path: next((kind for part, kind in KINDS.items() if f"layers.{part}." in path), None)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    if embedding:
        chosen["model.embed_tokens"] = ("int8", 32)
    for path, kind in chosen.items():
        if kind is not None:
            scheme, size = kind
            weight = decoder.module(path).weight.detach()
            if scheme == "int4-symmetric" and weight.shape[1] % size:
                size = 32
            numbers = rounded("weight", weight, scheme, size, weight.dtype)
            Quantize(path, scheme, size, numbers).apply(decoder)
            if path != "model.embed_tokens":
                kinds[scheme, size if scheme == "int4-symmetric" else 0] = None
    model.save_pretrained(folder)
    return decoder, set(kinds)


@READER
def test_the_readme_runs_without_grasp(tmp_path, tokenizer):
    model = in_groups("llama")
    done = grasp.quantize(Decoder(model, tokenizer), tmp_path / "ours", bits=4, layout=CT)
    assert done.path is not None
    out = grasp.export(done.path, tmp_path / "theirs", format=CT).path
    run_readme(out)
    assert "vllm serve theirs" in (out / "README.md").read_text()


def test_without_the_package_it_is_written_and_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exported(in_groups("llama"), tmp_path, bits=4)
    assert "not tried" in caplog.text and "pip install compressed-tensors" in caplog.text


def test_alike_are_those_that_servers_fuse():
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    paths = [f"layers.{n}.self_attn.{name}" for n in (0, 1) for name in names]
    paths += ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"]
    found = [tuple(path.rpartition(".")[2] for path in group) for group in alike(paths)]
    fused = [names[:3], names[3:]]
    assert found == [*fused, *fused, ("gate_proj", "up_proj"), ("down_proj",)]


# --- refusals


def with_matrices(folder: Path, **kinds) -> Path:
    """A checkpoint with matrices of the first layer rounded: {name: (scheme, group size)}."""
    model = in_groups("llama")
    decoder = Decoder(model)
    for name, (scheme, size) in kinds.items():
        part = "mlp" if name in ("gate", "up", "down") else "self_attn"
        path = f"model.layers.0.{part}.{name}_proj"
        weight = decoder.module(path).weight.detach()
        Quantize(path, scheme, size, rounded("weight", weight, scheme, size, weight.dtype)).apply(
            decoder
        )
    model.save_pretrained(folder)
    return folder


FOUR, EIGHT = ("int4-symmetric", 32), ("int8", 32)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({}, r"nothing in DIR is rounded; `grasp quantize --layout compressed-tensors` does"),
        ({"o": ("int4", 32)}, r"'model\.layers\.0\.self_attn\.o_proj' has 4 bits with minima"),
        ({"o": ("int6", 32)}, "has 6 bits, and servers have kernels for 8 bits and for 4"),
        ({"o": ("int4-symmetric", 256)}, "has groups of 256 in 32 columns"),
        ({"down": ("int4-symmetric", 128)}, "has groups of 128 in 64 columns"),
        ({"q": FOUR, "k": FOUR, "v": EIGHT}, r"q_proj' and .*v_proj' are not stored alike"),
        ({"q": FOUR}, r"q_proj' and .*k_proj' are not stored alike"),
        ({"up": EIGHT}, r"gate_proj' and .*up_proj' are not stored alike"),
        ({"gate": FOUR, "up": ("int4-symmetric", 64)}, "has groups of 64 in 32 columns"),
    ],
)
def test_what_the_format_cannot_say_is_one_line(kinds, said, tmp_path):
    place = with_matrices(tmp_path / "ours", **kinds)
    with pytest.raises(grasp.GraspError, match=rf"^--format {CT}: [^\n]*{said}[^\n]*$"):
        grasp.export(place, tmp_path / "out", format=CT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("round_it", [False, True])
def test_pairs_have_another_way_out(round_it, tmp_path, calibration):
    place = tmp_path / "small"
    grasp.compress(
        build("llama"), place, method="grasp", layers=(1,), retain_ratio=0.3, data=calibration
    )
    if round_it:
        grasp.quantize(place, tmp_path / "rounded", bits=8)
        place = tmp_path / "rounded"
    with pytest.raises(grasp.GraspError, match=r"is a low-rank pair.*--format dense, or serve DIR"):
        grasp.export(place, tmp_path / "out", format=CT)


def test_there_is_no_other_dtype(model_directory, tmp_path):
    with pytest.raises(grasp.GraspError, match=f"--dtype float16: --format {CT} has no"):
        grasp.export(model_directory, tmp_path / "out", format=CT, dtype="float16")
