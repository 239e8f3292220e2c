"""What a run will need is told before it begins: where the layers will be, what does not fit, and
which flag makes it fit.
"""

import re

import pytest
import torch
import transformers
from closeness import same_weights
from conftest import _GATED, _IDS, build
from test_cli import SMALL, command

import grasp
from grasp.core.decoder import Decoder
from grasp.errors import RecipeError
from grasp.methods import make
from grasp.recipes.memory import MemoryRecipe
from grasp.verbs import preflight
from grasp.verbs.preflight import estimate

METHOD = ("--method", "svd-llm", "--ratio", "0.1")


def dry(model, out, *flags):
    return command("compress", model, out, *METHOD, *SMALL, *flags, "--dry-run", "--json")


@pytest.mark.parametrize(
    ("said", "bytes_"),
    [
        ("8GB", 8e9),
        ("300MB", 3e8),
        ("1.5 gb", 1.5e9),
        ("2GiB", 2**31),
        ("64k", 64e3),
        ("5000", 5000),
    ],
)
def test_sizes(said, bytes_):
    assert MemoryRecipe(max_memory=said).most == bytes_


@pytest.mark.parametrize("said", ["", "much", "GB", "-1GB", "0", "8XB", "1e9", "8GB GB"])
def test_what_is_no_size(said):
    with pytest.raises(RecipeError, match=r"--max-memory .*write it like 8GB or 300MB"):
        MemoryRecipe(max_memory=said)


def test_what_does_not_fit_is_refused_with_what_would(model_directory, text_file, tmp_path):
    """The memory that the refusal names is enough, and gives the checkpoint that memory gives."""
    given = (*METHOD, "--data", text_file, *SMALL)
    out = tmp_path / "out"
    told = command("compress", model_directory, out, *given, "--max-memory", "10kB").error
    assert "--max-memory 10kB: about" in told and "--seq-len below" in told
    assert (
        told
        == command(
            "compress", model_directory, out, *given, "--max-memory", "10kB", "--dry-run"
        ).error
    )
    assert list(tmp_path.iterdir()) == []
    enough = re.search(r"give --max-memory (\S+) or more", told)[1]
    seen = dry(model_directory, out, "--max-memory", enough)
    assert seen.json["offloaded"] and "on the disk, one in memory at a time" in seen.err
    in_memory = dry(model_directory, out)
    assert not in_memory.json["offloaded"] and "--offload FOLDER" in in_memory.err
    assert seen.json["memory_bytes"] < in_memory.json["memory_bytes"]
    command("compress", model_directory, tmp_path / "a", *given, "--max-memory", enough)
    command("compress", model_directory, tmp_path / "b", *given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    one, other = (grasp.load(tmp_path / name).model for name in "ab")
    assert same_weights(one, other)


def test_a_folder_asked_for_is_used_and_left_empty(model_directory, text_file, tmp_path):
    given = (*METHOD, "--data", text_file, *SMALL, "--offload", tmp_path / "new" / "spool")
    assert command(
        "compress", model_directory, tmp_path / "out", *given, "--dry-run", "--json"
    ).json["offloaded"]
    command("compress", model_directory, tmp_path / "out", *given)
    assert (tmp_path / "new" / "spool").is_dir()
    assert not list((tmp_path / "new" / "spool").iterdir())


@pytest.mark.parametrize("share", [0.5, 3.0])
def test_a_model_that_does_not_fit_stays_on_the_disk(
    share, model_directory, calibration, tmp_path, monkeypatch, caplog
):
    """By itself, and it says so; one that fits is loaded as ever."""
    fields = {"method": "svd-llm", "ratio": 0.1}
    needs = dry(model_directory, tmp_path / "out").json["memory_bytes"]
    monkeypatch.setattr(preflight, "free_memory", lambda _: int(share * needs))
    result = grasp.compress(model_directory, data=calibration, **fields)
    assert (result.decoder.offload is not None) == (share < 1)
    assert ("its layers stay on the disk" in caplog.text) == (share < 1)


def test_a_disk_without_room(model_directory, tmp_path, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(RecipeError, match=rf"--offload {tmp_path}: about .* are needed .*1.0 kB"):
        grasp.compress(
            model_directory, tmp_path / "out", method="shortgpt", num_layers=1, offload=tmp_path
        )


def test_a_model_in_memory_cannot_stay_on_the_disk(calibration, tmp_path):
    with pytest.raises(RecipeError, match="--offload: the model is in memory already"):
        grasp.compress(build("llama"), method="wanda", data=calibration, offload=tmp_path)


def test_a_quantized_model_cannot_stay_on_the_disk(model_directory, calibration, tmp_path):
    grasp.quantize(model_directory, tmp_path / "int8", bits=8)
    with pytest.raises(RecipeError, match="--offload and --max-memory are of no use"):
        grasp.compress(str(tmp_path / "int8"), method="wanda", data=calibration, offload=tmp_path)


def test_memory_is_flat_in_depth_with_the_layers_on_the_disk():
    """Of the estimate, as of what is measured (benchmarks/offload.py)."""

    def told(layers, offloaded):
        sizes = {**_GATED, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
        config = transformers.LlamaConfig(**_IDS, **{**sizes, "num_hidden_layers": layers})
        with torch.device("meta"):
            decoder = Decoder(transformers.AutoModelForCausalLM.from_config(config))
        plan = make("grasp-fisher", {"ratio": 0.2}).plan(decoder)
        return estimate(decoder, plan, 8, 128, 4, offloaded)

    assert told(48, False).memory > 4 * told(8, False).memory
    assert told(48, True).memory < 1.3 * told(8, True).memory
    assert told(48, True).disk > 5 * told(8, True).disk
