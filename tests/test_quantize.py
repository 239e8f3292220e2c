"""Weights in few bits: what rounding may change, the checkpoint contract, and what a user can
get wrong.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from closeness import close
from conftest import build
from safetensors import safe_open
from safetensors.torch import save_file
from test_checkpoint import LOAD, NO_GRASP
from test_families import NoAttention
from transformers import AutoModelForCausalLM

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Narrow
from grasp.core.layers import quantized_grasp
from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.layers.modeling_grasp import FORMAT_VERSION
from grasp.core.layers.quantized_grasp import QuantizedLinear, quantized_like
from grasp.core.rounding import rounded

IDS = torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(2))
SCHEMES = {
    "int8": {"bits": 8},
    "int8-dynamic": {"bits": 8, "activations": "int8"},
    **{f"int{bits}": {"bits": bits} for bits in (6, 5, 4, 3)},
}
CT = "compressed-tensors"
LOSES = {"int8": 0.05, "int8-dynamic": 0.05, "int6": 0.15, "int5": 0.3, "int4": 0.5, "int3": 0.9}
"""At most so much of the logits' norm, in tiny random models."""


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def filled(module: torch.nn.Linear, scheme: str, group_size: int = 32) -> QuantizedLinear:
    """`module`, quantized, with nothing around it."""
    new = quantized_like(module, scheme, group_size)
    for name, value in rounded(
        "weight", module.weight, scheme, group_size, module.weight.dtype
    ).items():
        getattr(new, name).data = value
    if module.bias is not None:
        new.bias.data = module.bias.data.clone()
    return new


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory, model_directory):
    """Checkpoints with pairs and with pivoted pairs, in bfloat16."""
    folder = tmp_path_factory.mktemp("low-rank")
    data = grasp.Calibration(IDS, "random")
    grasp.compress(
        model_directory,
        folder / "pairs",
        method="grasp",
        num_layers=2,
        retain_ratio=0.3,
        data=data,
        dtype="bfloat16",
    )
    grasp.compress(model_directory, folder / "pivoted", ratio=0.2, data=data, dtype="bfloat16")
    return folder


@pytest.mark.parametrize("scheme", [*SCHEMES, "int4-symmetric"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
def test_every_kernel_computes_the_same_product(scheme, tokens, monkeypatch):
    """Few tokens in bfloat16 go through the processor's own kernels: as through the stored numbers,
    up to bfloat16.
    """
    torch.manual_seed(0)
    linear = torch.nn.Linear(70, 37).bfloat16()
    module, x = filled(linear, scheme), torch.randn(tokens, 70).bfloat16()
    with torch.no_grad():
        exact = x.float() @ module.dequantized("weight").float().T + linear.bias.float()
        assert torch.allclose(module(x).float(), exact, atol=0.05, rtol=0.02)
        monkeypatch.setattr(quantized_grasp, "SLICE", 5 * 70)  # rows in slices of five
        assert torch.allclose(module(x).float(), exact, atol=0.05, rtol=0.02)
        assert module(x[None]).shape == (1, tokens, 37)
    again = x.clone().requires_grad_()
    module(again).sum().backward()
    assert torch.allclose(
        again.grad.float(),
        module.dequantized("weight").float().sum(0).expand(tokens, -1),
        atol=0.1,
        rtol=0.05,
    )


def in_16_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (tokens, columns) times b (columns, rows) as oneDNN sums without VNNI: a shifted to
    0 ... 255, two products at a time in 16 bits, which saturate.
    """
    products = (a.int() + 128)[:, :, None] * b.int()
    pairs = torch.nn.functional.pad(products, (0, 0, 0, a.shape[1] % 2)).unflatten(1, (-1, 2))
    return pairs.sum(2).clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.int().sum(0)


def test_a_kernel_that_saturates_is_not_used(monkeypatch):
    """torch takes oneDNN's kernel where the processor has VNNI; `ONEDNN_MAX_CPU_ISA` may forbid it
    there.
    """
    torch.manual_seed(0)
    module, x = filled(torch.nn.Linear(70, 37), "int8-dynamic"), torch.randn(8, 70)
    with torch.no_grad():
        exact = x @ module.dequantized("weight").T + module.bias
        asked = quantized_grasp.sums_are_exact.__wrapped__
        monkeypatch.setattr(torch, "_int_mm", in_16_bits)
        monkeypatch.setattr(quantized_grasp, "sums_are_exact", lambda: True)
        assert (module(x) - exact).abs().max() > 0.1
        monkeypatch.setattr(quantized_grasp, "sums_are_exact", asked)
        assert (module(x) - exact).abs().max() < 0.05


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_products_of_whole_numbers_compile(scheme):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(70, 37).bfloat16(), torch.randn(9, 70).bfloat16()
    module = filled(linear, scheme)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), module(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(scheme, marks=() if scheme == "int4" else pytest.mark.slow)
        for scheme in SCHEMES
    ],
)
def test_every_family_quantizes_reloads_and_generates(family, scheme, tmp_path):
    dense = build(family, dtype=torch.bfloat16 if scheme in ("int4", "int3") else torch.float32)
    before = logits(dense)
    done = grasp.quantize(dense, tmp_path / "out", **SCHEMES[scheme])
    after = logits(done.model)
    assert float((after - before).norm() / before.norm()) < LOSES[scheme]
    again = grasp.load(tmp_path / "out").model
    assert close(logits(again), after)
    told = done.manifest["quantization"]
    assert (
        told["matrices"]
        == sum(isinstance(module, QuantizedLinear) for module in again.modules())
        > 0
    )
    assert told["bytes_after"] == Decoder(again).num_bytes() < told["bytes_before"]
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    text = again.generate(
        IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=258
    )
    assert text.shape == (4, 23)


@pytest.mark.parametrize(
    ("made", "scheme"),
    [*(("pairs", scheme) for scheme in SCHEMES), ("pivoted", "int8"), ("pivoted", "int8-dynamic")],
)
def test_low_rank_factors_are_quantized_too(low_rank, made, scheme, tmp_path, caplog):
    before = logits(grasp.load(low_rank / made).model)
    done = grasp.quantize(low_rank / made, tmp_path / "out", **SCHEMES[scheme])
    assert ("lose far more by rounded activations" in caplog.text) == (
        (made, scheme) == ("pivoted", "int8-dynamic")
    )
    pairs = [
        module
        for module in done.model.modules()
        if isinstance(module, QuantizedLinear) and module.rank
    ]
    assert pairs and all(module.pivoted == (made == "pivoted") for module in pairs)
    after = logits(done.model)
    assert float((after - before).norm() / before.norm()) < 2 * LOSES[scheme]
    assert close(logits(grasp.load(tmp_path / "out").model), after)
    manifest = json.loads((tmp_path / "out" / "grasp.json").read_text())
    assert (
        manifest["format_version"] == FORMAT_VERSION
        and manifest["edits"]
        and manifest["quantization"]["scheme"] == scheme
    )
    decoder = Decoder(done.model)
    assert decoder.num_parameters() == manifest["parameters"]["after"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert (
        sum(t.nbytes for key, t in stored.items() if not key.endswith(".places"))
        == decoder.num_bytes()
        == manifest["quantization"]["bytes_after"]
    )
    assert "grasp quantize" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("scheme", "made", "before", "flag"),
    [
        ("int4", "pairs", NO_GRASP, ", trust_remote_code=True"),
        *(
            pytest.param(
                scheme, "pairs", NO_GRASP, ", trust_remote_code=True", marks=pytest.mark.slow
            )
            for scheme in ("int3", "int8-dynamic")
        ),
        pytest.param(
            "int8", "pivoted", NO_GRASP, ", trust_remote_code=True", marks=pytest.mark.slow
        ),
    ],
)
def test_plain_transformers_loads_it(low_rank, scheme, made, before, flag, tmp_path):
    """In a new process, with grasp or without it: equal logits; and what it saves again loads
    again.
    """
    done = grasp.quantize(low_rank / made, tmp_path / "out", **SCHEMES[scheme])
    with torch.no_grad():
        torch.save(done.model(input_ids=IDS).logits, tmp_path / "logits.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    code = LOAD.format(before=before, after="", flag=flag)
    for source, target in (
        (tmp_path / "out", tmp_path / "again"),
        (tmp_path / "again", tmp_path / "third"),
    ):
        run = subprocess.run(
            [sys.executable, "-c", code, source, tmp_path, target],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "RESULT True" in run.stdout, run.stderr[-2000:]
    assert (tmp_path / "third" / "packing_grasp.py").is_file()


@pytest.mark.slow
def test_without_grasp_and_without_the_flag_it_refuses(model_directory, tmp_path):
    """int8 numbers have the shape of the matrix; they must not be taken for it."""
    grasp.quantize(model_directory, tmp_path / "out", bits=8)
    code = LOAD.format(before=NO_GRASP, after="", flag="")
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out", tmp_path, tmp_path / "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0 and "RESULT" not in run.stdout and "MISMATCH" in run.stderr


def test_rank_zero_and_moves(tmp_path, calibration):
    """A pair of rank 0 has nothing to round. Casting, copying and moving a quantized model leave
    its whole numbers alone.
    """
    import copy

    small = grasp.compress(
        build("gpt2", dtype=torch.bfloat16),
        layers=(1,),
        retain_ratio=0.0,
        data=calibration,
        method="grasp",
    )
    done = grasp.quantize(small.decoder, tmp_path / "out", bits=4)
    after = logits(done.model)
    assert any(isinstance(module, LowRankLinear) for module in done.model.modules())
    one = done.model(input_ids=IDS[:1, :1]).logits.detach()  # fills the kernels' copies
    twin = copy.deepcopy(done.model)
    assert close(logits(twin), after) and torch.equal(twin(input_ids=IDS[:1, :1]).logits, one)
    assert torch.allclose(logits(twin.float()), after, atol=0.2)
    assert twin.dtype == torch.float32 and close(logits(grasp.load(tmp_path / "out").model), after)


def test_compress_dequantises_and_says_so(low_rank, model_directory, tmp_path, caplog):
    data = grasp.Calibration(IDS, "random")
    quantized = grasp.quantize(model_directory, tmp_path / "q", bits=8)
    dense = logits(quantized.model)
    result = grasp.compress(str(tmp_path / "q"), tmp_path / "small", ratio=0.2, data=data)
    assert "nothing that rounding lost comes back" in caplog.text
    assert torch.allclose(logits(grasp.load(tmp_path / "small").model), logits(result.model))
    assert not any(isinstance(module, QuantizedLinear) for module in result.model.modules())
    plain = grasp.compress(build("gpt2"), method="shortgpt", num_layers=1, data=data).decoder
    grasp.quantize(plain, tmp_path / "g", bits=8)
    kept = logits(grasp.load(tmp_path / "g").model)
    grasp.compress(
        str(tmp_path / "g"), tmp_path / "again", method="shortgpt", num_layers=1, data=data
    )
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config and "auto_map" not in config
    assert (
        kept.shape
        == logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")).shape
        == dense.shape
    )


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: make test-export")
@pytest.mark.filterwarnings("ignore:Failed to load", "ignore:.*Triton.*")
def test_compress_takes_a_model_that_torchao_quantized(model_directory, tmp_path, caplog):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        model_directory,
        dtype=torch.bfloat16,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)),
    )
    theirs.save_pretrained(tmp_path / "ao")
    result = grasp.compress(
        str(tmp_path / "ao"), tmp_path / "small", ratio=0.2, data=grasp.Calibration(IDS, "random")
    )
    assert "already quantized (torchao)" in caplog.text
    assert close(logits(grasp.load(tmp_path / "small").model), logits(result.model))
    with pytest.raises(grasp.GraspError, match="quantized already"):
        grasp.quantize(str(tmp_path / "ao"), tmp_path / "q", bits=8)


def test_a_format_that_cannot_be_read_here_is_one_clear_line(model_directory, tmp_path):
    import shutil

    shutil.copytree(model_directory, tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(grasp.GraspError, match="gptq") as said:
        grasp.compress(
            str(tmp_path / "gptq"),
            tmp_path / "out",
            ratio=0.2,
            data=grasp.Calibration(IDS, "random"),
        )
    assert "\n" not in str(said.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "--bits 7: must be one of 8, 6, 5, 4, 3"),
        ({"bits": 4, "activations": "int8"}, "--activations int8: needs --bits 8, not --bits 4"),
        ({"bits": 8, "activations": "x"}, "--activations x: unknown; allowed: float, int8"),
        ({"bits": 4, "group_size": 48}, "--group-size 48: must be one of 32"),
        ({"bits": 8, "layout": "x"}, "--layout x: unknown; allowed: grasp, compressed-tensors"),
        ({"bits": 6, "layout": CT}, "--layout compressed-tensors --bits 6: it has 8 and 4 bits"),
        ({"bits": 4, "group_size": 256, "layout": CT}, "it has groups of 32, 64, 128"),
        ({"bits": 8, "embeddings": 8, "layout": CT}, "servers keep these in 16 bits; leave"),
        ({"bits": 4, "layout": CT}, "down_proj' has 48 columns, which is no multiple; take --bits"),
    ],
)
def test_bad_input_is_said_before_any_work(options, message, model_directory, tmp_path):
    with pytest.raises(grasp.GraspError, match=message):
        grasp.quantize(model_directory, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_for_servers_four_bits_have_no_minima(tmp_path):
    model = build("llama", dtype=torch.bfloat16, intermediate_size=64)
    before = logits(model)
    done = grasp.quantize(model, tmp_path / "out", bits=4, layout=CT)
    after = logits(done.model)
    assert float((after - before).norm() / before.norm()) < LOSES["int4"]
    assert close(logits(grasp.load(tmp_path / "out").model), after)
    told = done.manifest["quantization"]
    assert told["scheme"] == "int4-symmetric" and "--layout compressed-tensors" in told["command"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not any(key.endswith("_zero") for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("pairs", "is a low-rank pair"),
        ("narrow", "is narrower"),
        ("gpt2", "Conv1D"),
        ("mixtral", "experts"),
    ],
)
def test_for_servers_a_model_must_be_ordinary(made, said, low_rank):
    model = build(made) if made in ("gpt2", "mixtral") else grasp.load(low_rank / "pairs").model
    if made == "narrow":
        model = build("llama")
        Narrow(0, "channels", torch.arange(32)).apply(Decoder(model))
    with pytest.raises(grasp.GraspError, match=f"--layout compressed-tensors: .*{said}.*leave"):
        grasp.quantize(model, bits=8, layout=CT)


def test_a_layer_may_lack_a_matrix():
    model = build("llama")
    model.model.layers[0].self_attn = NoAttention()
    assert grasp.quantize(model, bits=8).manifest["quantization"]["matrices"] == 3 + 3 * 7


def test_what_else_can_be_wrong(model_directory, low_rank, tmp_path):
    grasp.quantize(low_rank / "pairs", tmp_path / "q", bits=8)
    with pytest.raises(grasp.GraspError, match="quantized already"):
        grasp.quantize(tmp_path / "q", tmp_path / "q2", bits=8)
    with pytest.raises(grasp.GraspError, match="not an empty directory"):
        grasp.quantize(model_directory, tmp_path / "q", bits=8)
    with pytest.raises(
        grasp.GraspError,
        match=r"--bits 6: \d+ pairs .* are pivoted.*--bits 8, or `grasp compress --storage pair`",
    ):
        grasp.quantize(low_rank / "pivoted", tmp_path / "q3", bits=6)
    assert not (tmp_path / "q3").exists()
    with pytest.raises(grasp.GraspError, match="recover the checkpoint it was made from"):
        grasp.recover(tmp_path / "q", tmp_path / "r", data="pydoc")


@pytest.mark.parametrize("fault", ["missing", "shape", "not finite"])
def test_a_damaged_checkpoint_never_loads(fault, model_directory, tmp_path):
    grasp.quantize(model_directory, tmp_path / "out", bits=8)
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[f"{name}_qdata"]
    elif fault == "shape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(grasp.GraspError, match="up_proj"):
        grasp.load(tmp_path / "out")


def test_the_command_line(model_directory, tmp_path):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "grasp",
            "quantize",
            model_directory,
            tmp_path / "out",
            "--bits",
            "8",
            "--json",
            "--quiet",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["quantization"]["scheme"] == "int8" and Path(told["manifest"]).is_file()
    assert "WARNING" not in run.stderr


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_numbers_may_begin_anywhere(scheme, tokens):
    """In a file they lie at multiples of 8 bytes. torch's kernel for 8 bits ends the process there
    (AVX-512, from four tokens on).
    """

    def moved(x):
        room = torch.empty(x.numel() + 64, dtype=x.dtype)
        begin = next(n for n in range(1, 64) if room[n:].data_ptr() % 16 == 8)
        return room[begin : begin + x.numel()].view(x.shape).copy_(x)

    torch.manual_seed(0)
    linear = filled(torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16), scheme)
    for value in linear.parameters():
        value.data = moved(value.data)
    x = moved(torch.randn(tokens, 64).bfloat16())
    with torch.no_grad():
        whole = x.float() @ linear.dequantized("weight").float().T
        assert close(linear(x), whole.bfloat16())
