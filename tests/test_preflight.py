"""What a run will need is told before it begins: where the layers will be, what does not fit, and
which flag makes it fit.
"""

import re
from typing import get_args

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
from grasp.recipes.calibration import CalibrationRecipe
from grasp.recipes.memory import MemoryRecipe
from grasp.stages.operations import Kind, sums
from grasp.verbs import machine_speed, preflight
from grasp.verbs.machine_speed import Speed
from grasp.verbs.preflight import Preflight, estimate
from grasp.verbs.run_time import STARTING, seconds, work

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
    with pytest.raises(RecipeError, match="--offload, --max-memory and --fsdp are of no use"):
        grasp.compress(str(tmp_path / "int8"), method="wanda", data=calibration, offload=tmp_path)


# --- time


def llama(layers=4, width=32):
    config = transformers.LlamaConfig(
        **_IDS, **{**_GATED, "hidden_size": width, "num_hidden_layers": layers}
    )
    with torch.device("meta"):
        return Decoder(transformers.AutoModelForCausalLM.from_config(config))


def told(decoder, blocks=8, seq_len=16, speed=1.0, offloaded=False, **fields):
    """Seconds at a made-up speed beside those that every run takes."""
    plan = make(fields.pop("method", "grasp-fisher"), {"ratio": 0.2, **fields}).plan(decoder)
    rates = dict.fromkeys(get_args(Kind), 1e6)
    made_up = Speed({**rates, "pass": 1e6 * speed})
    return seconds(decoder, plan, blocks, seq_len, 4, made_up, offloaded) - STARTING


@pytest.mark.parametrize("method", ["svd-llm", "grasp-fisher", "sparsegpt", "llm-pruner"])
def test_time_is_linear_in_blocks(method):
    decoder = llama()
    plan = make(method, {} if method == "sparsegpt" else {"ratio": 0.2}).plan(decoder)
    made_up = Speed(dict.fromkeys(get_args(Kind), 1e6))
    eight, sixteen, more = (seconds(decoder, plan, n, 16, 4, made_up) for n in (8, 16, 24))
    assert sixteen - eight == pytest.approx(more - sixteen) and sixteen > eight


def test_time_is_linear_in_layers():
    four, eight, twelve = (told(llama(n), method="svd-llm") for n in (4, 8, 12))
    assert eight - four == pytest.approx(twelve - eight, rel=1e-3) and eight > 1.5 * four


def test_what_takes_longer_is_told_to():
    decoder = llama()
    ranks = told(decoder, parts=("ranks",))
    assert told(decoder, method="svd-llm") < told(decoder, method="obd-llm") <= ranks * 1.01
    assert ranks < told(decoder, rounds=1, width_multiple=8) < told(decoder, width_multiple=8)
    assert told(decoder, offloaded=True) > told(decoder)


def test_decompositions_on_both_halves_count():
    """Three of every matrix where the halves are decomposed too, one where nothing is forecast."""
    decoder = llama()
    once = {
        basis: make("grasp-fisher", {"ratio": 0.2, "parts": ("ranks",), "basis": basis})
        .plan(decoder)
        .once["eigh"]
        for basis in ("fisher", "input")
    }
    assert once["fisher"] == 3 * once["input"] > 0


def test_a_dtype_without_units_takes_longer():
    """Only the passes: sums and decompositions are in float32 and float64."""
    decoder = llama()
    plan = make("grasp-fisher", {"ratio": 0.2}).plan(decoder)
    passes = work(decoder, plan, 8, 16)["pass"] / 1e6
    assert told(decoder, speed=0.2) - told(decoder) == pytest.approx(4 * passes)


def test_the_speed_is_measured_in_the_dtype_of_the_run(monkeypatch):
    """Of every kind, and the products of passes alone in the model's own dtype."""
    seen = []
    monkeypatch.setattr(machine_speed, "LONG", 0.0)
    monkeypatch.setattr(machine_speed, "linear", lambda given, weight: seen.append(weight.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        speed = Speed.measured(llama(), dtype, torch.device("cpu"), 16)
        assert set(seen) == {dtype}
        assert set(speed.rates) == set(get_args(Kind)) and min(speed.rates.values()) > 0


def test_the_operations_of_sums_are_those_of_the_code():
    """A token's outer products: 2 n^2 a sum, one for matrices that read the same."""
    decoder = llama()
    linears = [one for one in decoder.layer(0).linears.values() if one.name.endswith("gate_proj")]
    width = linears[0].shape[1]
    both = [*linears, decoder.layer(0).linears["mlp.up_proj"]]
    assert sums(decoder, linears) == sums(decoder, both) == {"sum": 2 * width**2}


# --- models that do not fit


def test_memory_is_flat_in_depth_with_the_layers_on_the_disk():
    """Of the estimate, as of what is measured (benchmarks/offload.py)."""

    def told(layers, offloaded):
        sizes = {**_GATED, "hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
        config = transformers.LlamaConfig(**_IDS, **{**sizes, "num_hidden_layers": layers})
        with torch.device("meta"):
            decoder = Decoder(transformers.AutoModelForCausalLM.from_config(config))
        plan = make("grasp-fisher", {"ratio": 0.2}).plan(decoder)
        return estimate(decoder, plan, 8, 128, torch.float32, offloaded, workers=1)

    few, more, most = (told(layers, False).memory for layers in (8, 16, 48))
    assert most - more == pytest.approx(4 * (more - few), rel=0.05)
    assert told(48, True).memory - told(8, True).memory < 0.01 * (most - few)
    assert told(48, True).memory < 1.3 * told(8, True).memory
    assert told(48, True).disk > 5 * told(8, True).disk


def test_as_many_matrices_at_once_as_fit(monkeypatch):
    """The model is where it would be with one at a time; then there are as many as there is room
    for.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    method = make("grasp-fisher", {"ratio": 0.2})
    decoder, text = llama(), CalibrationRecipe(num_samples=8, seq_len=32)
    plan = method.plan(decoder)

    def found(free, device="cpu"):
        place = torch.device(device)
        return Preflight(decoder, plan, text, MemoryRecipe(), torch.float32, free, place)

    each = [
        estimate(decoder, plan, 8, 32, torch.float32, workers=count).memory for count in range(1, 9)
    ]
    assert found(None).workers(False) == found(10**15).workers(False) == 8
    assert [found(free).workers(False) for free in each] == [
        max(n for n in range(1, 9) if each[n - 1] <= free) for free in each
    ]
    assert found(each[0]).workers(False) < 8
    assert found(each[0] - 1).workers(False) == 1 and found(each[0] - 1).offloaded
    assert not found(each[0]).offloaded


def test_statistics_that_a_gpu_has_no_room_for_are_not_counted_there():
    plan = make("grasp-fisher", {"ratio": 0.2}).plan(decoder := llama())
    text, free = CalibrationRecipe(num_samples=8, seq_len=32), plan.statistics_bytes

    def told(device):
        place = torch.device(device)
        found = Preflight(decoder, plan, text, MemoryRecipe(), torch.float32, free, place)
        return found.estimate(False)

    assert told("cpu").memory - told("cuda").memory >= 0.9 * plan.statistics_bytes
    assert told("cpu").disk == told("cuda").disk > plan.statistics_bytes  # in the journal
