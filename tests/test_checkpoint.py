"""The checkpoint contract: loads with and without grasp, never wrongly, small in memory, and works
with what users put on top.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import close
from conftest import build
from transformers import AutoModelForCausalLM, AutoTokenizer

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize
from grasp.core.layers import modeling_grasp
from grasp.core.layers.low_rank_grasp import LowRankLinear
from grasp.core.manifest import FORMAT_VERSION


def compressed(out: Path, model: str, **fields: object) -> Path:
    """A compressed tiny Llama in `out`, with the logits it gave before it was saved beside it."""
    ids = torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(2))
    result = grasp.compress(model, out, data=grasp.Calibration(ids, "random"), **fields)
    with torch.no_grad():
        torch.save(result.model(input_ids=ids).logits, out.parent / "logits.pt")
    torch.save(ids, out.parent / "ids.pt")
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model_directory):
    """A checkpoint of the paper's method: pairs."""
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    return compressed(out, model_directory, method="grasp", num_layers=2, retain_ratio=0.3)


@pytest.fixture(scope="module")
def pivoted(tmp_path_factory, model_directory):
    """A checkpoint of the default method: narrower MLPs and pivoted pairs."""
    out = tmp_path_factory.mktemp("pivoted") / "out"
    return compressed(out, model_directory, ratio=0.2)


@pytest.fixture(params=["checkpoint", "pivoted"])
def either(request):
    """Both in turn."""
    return request.getfixturevalue(request.param)


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


LOAD = """
import sys, torch
{before}
from transformers import AutoModelForCausalLM
{after}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]{flag})
folder = sys.argv[2]
with torch.no_grad():
    equal = torch.allclose(model(input_ids=torch.load(folder + "/ids.pt")).logits, \
torch.load(folder + "/logits.pt"), atol=1e-5)
kinds = {{type(module).__name__ for module in model.modules()}}
model.save_pretrained(sys.argv[3])
print("RESULT", equal, "LowRankLinear" in kinds, \
sum(p.numel() for p in model.parameters()), "grasp" in sys.modules)
"""
NO_GRASP = (
    "import importlib.abc\n"
    "class No(importlib.abc.MetaPathFinder):\n"
    "    def find_spec(self, name, path, target=None):\n"
    "        if name.split('.')[0] == 'grasp': raise ModuleNotFoundError(name)\n"
    "sys.meta_path.insert(0, No())"
)


@pytest.mark.parametrize(
    ("made", "before", "after", "flag"),
    [
        pytest.param("pivoted", "import grasp", "", "", marks=pytest.mark.slow),
        pytest.param("checkpoint", "", "import grasp", "", marks=pytest.mark.slow),
        pytest.param(
            "checkpoint",
            "",
            "AutoModelForCausalLM.from_pretrained; import transformers.quantizers.auto; import"
            " grasp",
            "",
            marks=pytest.mark.slow,
        ),
        pytest.param("pivoted", NO_GRASP, "", ", trust_remote_code=True", marks=pytest.mark.slow),
    ],
    ids=[
        "grasp first",
        "grasp second",
        "grasp after quantizers",
        "no grasp, pivoted",
    ],
)
def test_plain_transformers_loads_it(made, request, tmp_path, before, after, flag):
    """In a new process: equal logits, low-rank modules, the small size; and what it saves again
    loads again the same way.
    """
    checkpoint = request.getfixturevalue(made)
    code = LOAD.format(before=before, after=after, flag=flag)
    done = run(code, checkpoint, checkpoint.parent, tmp_path / "again")
    size = json.loads((checkpoint / "grasp.json").read_text())["parameters"]["after"]
    assert f"RESULT True True {size} {'False' if before == NO_GRASP else 'True'}" in done.stdout, (
        done.stderr[-2000:]
    )
    if before != "" or after == "":
        again = run(code, tmp_path / "again", checkpoint.parent, tmp_path / "third")
        assert "RESULT True True" in again.stdout, again.stderr[-2000:]


@pytest.mark.slow
def test_without_grasp_and_without_the_flag_it_refuses(checkpoint, tmp_path):
    """transformers alone must stop, and never fill the factorised matrices with random numbers."""
    done = run(
        LOAD.format(before=NO_GRASP, after="", flag=""),
        checkpoint,
        checkpoint.parent,
        tmp_path / "again",
    )
    assert done.returncode != 0 and "RESULT" not in done.stdout
    assert "MISMATCH" in done.stderr and "grasp" in done.stderr


def test_dropped_layers_need_no_grasp(tmp_path, calibration):
    """A model that only lost layers is an ordinary checkpoint."""
    grasp.compress(
        build("llama"), tmp_path / "out", method="shortgpt", num_layers=2, data=calibration
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        "quantization_config" not in config
        and "auto_map" not in config
        and config["num_hidden_layers"] == 2
    )
    assert not (tmp_path / "out" / "modeling_grasp.py").exists()


def test_the_directory_holds_what_was_promised(checkpoint):
    names = {file.name for file in checkpoint.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "grasp.json",
        "README.md",
        "modeling_grasp.py",
    } <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".pth")) for name in names)
    manifest = json.loads((checkpoint / "grasp.json").read_text())
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["redundancy"]["bi"].keys() == {"0", "1", "2", "3"}
    edit = manifest["edits"][0]
    note = edit["note"]
    assert (
        len(note["kept"]) == edit["rank"]
        and len(note["scores"]) == len(note["singular_values"]) == 32
    )
    assert manifest["edits"][-1]["parameters"] == manifest["parameters"]["after"]
    assert {"torch", "transformers", "grasp-llm", "python"} <= manifest["versions"].keys()
    card = (checkpoint / "README.md").read_text()
    assert (
        f"{manifest['parameters']['after']:,}" in card
        and "--num-layers 2 --retain-ratio 0.3" in card
    )
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template


def test_the_factors_are_the_kept_groups(checkpoint, model_directory):
    """weight @ weight_in is the sum of the kept singular groups of the original matrix, whichever
    split stored it.
    """
    dense, small = (
        AutoModelForCausalLM.from_pretrained(path) for path in (model_directory, checkpoint)
    )
    for edit in json.loads((checkpoint / "grasp.json").read_text())["edits"]:
        u, s, vh = torch.linalg.svd(dense.get_submodule(edit["path"]).weight, full_matrices=False)
        kept = edit["note"]["kept"]
        pair = small.get_submodule(edit["path"])
        assert torch.allclose(
            pair.weight @ pair.weight_in, u[:, kept] @ torch.diag(s[kept]) @ vh[kept], atol=1e-5
        ), edit["path"]


@pytest.mark.parametrize("split", ["both", "left", "right"])
def test_sigma_split_changes_the_factors_not_the_product(split, model_directory, calibration):
    made = {
        name: grasp.compress(
            model_directory, data=calibration, layers=(1,), sigma_split=name, method="grasp"
        )
        for name in ("both", split)
    }
    pairs = [found.model.model.layers[1].mlp.up_proj for found in made.values()]
    assert torch.allclose(
        pairs[0].weight @ pairs[0].weight_in, pairs[-1].weight @ pairs[-1].weight_in, atol=1e-5
    )
    unit = [
        abs(float(t.norm(dim=d).mean()) - 1) < 1e-4
        for t, d in ((pairs[-1].weight, 0), (pairs[-1].weight_in, 1))
    ]
    assert unit == {"both": [False, False], "left": [False, True], "right": [True, False]}[split]


def test_rank_zero_keeps_the_bias(tmp_path, calibration):
    """r = 0 removes the matrices, not their biases; the checkpoint with empty factors loads."""
    result = grasp.compress(
        build("gpt2"),
        tmp_path / "out",
        layers=(1,),
        retain_ratio=0.0,
        data=calibration,
        method="grasp",
    )
    again = grasp.load(tmp_path / "out").model
    block = again.transformer.h[1]
    assert isinstance(block.mlp.c_fc, LowRankLinear) and block.mlp.c_fc.rank == 0
    x = torch.randn(2, 32)
    assert torch.equal(block.mlp.c_fc(x), block.mlp.c_fc.bias.expand(2, -1))
    with torch.no_grad():
        assert close(
            again(input_ids=calibration.ids).logits, result.model(input_ids=calibration.ids).logits
        )


def test_peft_lora_on_top(either, tmp_path):
    """LoRA on low-rank and dense linears alike: trains, saves, loads."""
    from peft import LoraConfig, PeftModel, get_peft_model

    base = grasp.load(either).model
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    ids = torch.load(either.parent / "ids.pt")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(grasp.load(either).model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(
            again.eval()(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits, atol=1e-5
        )


def test_trainer_trains_it(either, tmp_path):
    """transformers refuses to train quantised models; a low-rank one is not quantised: it trains,
    saves and casts freely.
    """
    from transformers import Trainer, TrainingArguments

    model = grasp.load(either).model
    model.requires_grad_(True)
    ids = torch.load(either.parent / "ids.pt")
    rows = [{"input_ids": row, "labels": row} for row in ids]
    options = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "run"), dataloader_pin_memory=False, **options),
        train_dataset=rows,
    )
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    again = grasp.load(tmp_path / "trained").model
    assert any(isinstance(m, LowRankLinear) and m.rank for m in again.modules())
    with torch.no_grad():
        assert close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, before)
    assert model.half().dtype == torch.float16 and model.float().dtype == torch.float32


@pytest.mark.slow
def test_torch_compile(either):
    model = grasp.load(either).model
    ids = torch.load(either.parent / "ids.pt")
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(
            input_ids=ids, use_cache=False
        ).logits
        assert torch.allclose(compiled, model(input_ids=ids).logits, atol=1e-5)


def test_applying_an_edit_twice_is_refused():
    model = Decoder(build("llama"))
    path = "model.layers.1.mlp.up_proj"
    edit = Factorize(path, torch.zeros(2, 32), torch.zeros(48, 2))
    edit.apply(model)
    with pytest.raises(grasp.GraspError, match="low-rank pair already"):
        edit.apply(model)
    with pytest.raises(grasp.GraspError, match="do not fit"):
        Factorize("model.layers.2.mlp.up_proj", torch.zeros(2, 31), torch.zeros(48, 2)).apply(model)
    with pytest.raises(grasp.GraspError, match="names no matrix"):
        Factorize("model.layer.2.mlp.up_proj", torch.zeros(2, 32), torch.zeros(48, 2)).apply(model)


PEAK = """
import sys, resource
import torch, transformers, safetensors.torch, grasp
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaConfig
import grasp.core.models
def now():
    return int(next(line for line in open("/proc/self/status") \
if line.startswith("VmRSS")).split()[1]) * 1024
LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, \
num_attention_heads=1, vocab_size=16))
before = now()
open("/proc/self/clear_refs", "w").write("5")
model = grasp.load(sys.argv[1]).model
peak = int(next(line for line in open("/proc/self/status") \
if line.startswith("VmHWM")).split()[1]) * 1024
size = sum(p.numel() * p.element_size() for p in model.parameters())
print("RESULT", (peak - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux /proc to read peak memory"
)
def test_loading_peaks_near_the_size_of_the_file(tmp_path):
    """At most 1.3 x the checkpoint's bytes: dense matrices are never built (they would be 3 x)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=512,
    )
    model = Decoder(LlamaForCausalLM(config))
    for layer in range(5):
        for linear in model.linears(layer):
            out_features, in_features = linear.shape
            Factorize(
                linear.path, torch.zeros(64, in_features), torch.zeros(out_features, 64)
            ).apply(model)
    model.model.save_pretrained(tmp_path)
    done = run(PEAK, tmp_path)
    assert "RESULT" in done.stdout, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) <= 1.3


def test_the_manifest_can_be_read_by_anyone(either):
    """Plain JSON, no NaN, and the weights file holds only tensors of the small model (and where a
    pivoted pair's rows go).
    """
    from safetensors import safe_open

    text = (either / "grasp.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in grasp.json"))
    with safe_open(either / "model.safetensors", framework="pt") as file:
        names = [name for name in list(file.keys()) if not name.endswith(".places")]
        total = sum(file.get_tensor(name).numel() for name in names)
    assert total == json.loads(text)["parameters"]["after"]


def test_both_files_that_know_the_format_say_the_same_version():
    assert FORMAT_VERSION == modeling_grasp.FORMAT_VERSION
