"""The embedded model: real weights, real tokenizer, the sizes the paper's recipe gives on it. Run
by .ci/run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_checkpoint import PEAK

import grasp
from grasp.core.models import embedded_model, load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """`grasp compress smollm2` as a user calls it, with a small calibration set; or what the demo
    of `.ci/run` made by the same recipe.
    """
    if "GRASP_DEMO" in os.environ:
        return Path(os.environ["GRASP_DEMO"]) / "grasp"
    out = tmp_path_factory.mktemp("smollm2") / "out"
    command = [
        sys.executable,
        "-m",
        "grasp",
        "compress",
        "smollm2",
        str(out),
        "--method",
        "grasp",
        "--num-layers",
        "9",
        "--retain-ratio",
        "0.1",
    ]
    done = subprocess.run(
        [*command, "--num-samples", "4", "--seq-len", "256", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_embedded_model_is_an_ordinary_one(tmp_path):
    """Dequantised from GGUF, it saves, loads and chats like any other."""
    dense = load_model("smollm2")
    assert (dense.num_parameters(), dense.num_layers) == (134_515_008, 30)
    assert dense.model.get_input_embeddings().weight is dense.model.get_output_embeddings().weight
    assert "quantization_config" not in dense.model.config.to_dict()
    dense.model.save_pretrained(tmp_path)
    text = dense.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert "<|im_start|>user\nHi<|im_end|>" in text and text.endswith("<|im_start|>assistant\n")


def test_sizes_on_disk_and_in_memory(compressed):
    """105,776,640 parameters in safetensors and after loading; ranks 28, 14 and 41."""
    manifest = json.loads((compressed / "grasp.json").read_text())
    with safe_open(compressed / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    assert sum(torch.Size(shape).numel() for shape in shapes) == 105_776_640
    model = grasp.load(compressed).model
    assert (
        sum(p.numel() for p in model.parameters()) == 105_776_640 == manifest["parameters"]["after"]
    )
    ranks = {(edit["path"].rsplit(".", 1)[-1], edit["rank"]) for edit in manifest["edits"]}
    assert ranks == {
        ("q_proj", 28),
        ("o_proj", 28),
        ("k_proj", 14),
        ("v_proj", 14),
        ("gate_proj", 41),
        ("up_proj", 41),
        ("down_proj", 41),
    }
    assert len(manifest["edits"]) == 63


def test_loading_peaks_near_the_bytes_of_the_checkpoint(compressed):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(compressed)], capture_output=True, text=True, check=False
    )
    assert "RESULT" in done.stdout, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) <= 1.3


def test_self_calibration_writes_text(tmp_path):
    """`--data self` samples blocks of real text from the model."""
    dense = load_model("smollm2")
    from grasp.data.calibration import calibrate

    found = calibrate(dense, "self", num_samples=2, seq_len=48)
    assert found.ids.shape == (2, 48)
    text = dense.tokenizer.decode(found.ids[0])
    assert sum(character.isalpha() or character.isspace() for character in text) > 0.6 * len(text)


def test_the_demo_shows_its_table(tmp_path):
    """GRASP_DEMO: the folder of a demo that was just made, as by `.ci/run`."""
    made = Path(os.environ.get("GRASP_DEMO", tmp_path / "demo"))
    if "GRASP_DEMO" not in os.environ:
        done = subprocess.run(
            [sys.executable, "-m", "grasp", "demo", "-o", str(made), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = json.loads(done.stdout.splitlines()[-1])
        assert json.loads((made / "results.json").read_text())["rows"] == said["rows"]
    result = json.loads((made / "results.json").read_text())
    dense, removed, small, fisher = result["rows"]
    assert [row["parameters"] for row in result["rows"][:3]] == [
        134_515_008,
        102_654_144,
        105_776_640,
    ]
    assert 105_776_640 - 2112 < fisher["parameters"] <= 105_776_640
    scores = [{score["unit"]: score["value"] for score in row["scores"]} for row in result["rows"]]
    lost = {
        row["label"]: score["perplexity"] for row, score in zip(result["rows"], scores, strict=True)
    }
    others = min(lost["same layers removed"], lost["grasp"])
    assert lost["dense"] < lost["grasp-fisher"] < 0.6 * others and lost["dense"] < others
    assert dense["num_bytes"] > small["num_bytes"] > removed["num_bytes"] == 4 * 102_654_144
    assert all(row["generations"][0]["text"].strip() for row in result["rows"]) and all(
        score["tokens/s"] > 0 for score in scores
    )
    assert all((made / f"{name}.png").stat().st_size > 20_000 for name in ("grasp", "grasp-fisher"))
    assert embedded_model().is_dir()
