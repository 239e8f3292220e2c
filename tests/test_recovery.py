"""Compensation on tiny models: what is trained, what comes back into the checkpoint, how a run goes
on, and what users get wrong.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import grasp
from grasp.compensation import trainer as trainer_module
from grasp.errors import CheckpointError, DataError, GraspError, NumericsError, RecipeError
from grasp.report.anatomy import recovery as curve_of
from grasp.report.reading import Checkpoint

SLOW = pytest.mark.slow

SMALL = {
    "max_steps": 6,
    "batch_size": 4,
    "micro_batch": 2,
    "held_out": 8,
    "max_length": 256,
    "learning_rate": 1e-2,
    "eval_every": 2,
    "precision": "float32",
    "warmup_steps": 0,
    "lora_rank": 4,
    "lora_dropout": 0.0,
}
"""A run of a second."""


@pytest.fixture(scope="session")
def dense(tmp_path_factory, tokenizer) -> str:
    path = tmp_path_factory.mktemp("dense") / "llama"
    model = build("llama")
    model.config.max_position_embeddings = (
        512  # Alpaca's prompt is 150 bytes, and here a token is a byte
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, dense, text_file) -> dict[str, str]:
    """By method: pairs in two layers, pivoted pairs everywhere, layers removed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    given = {
        "grasp": {"layers": (1, 2), "retain_ratio": 0.5},
        "grasp-fisher": {
            "ratio": 0.2,
            "parts": "ranks",
            "allocation": "uniform",
            "exclude": ("v",),
        },
        "shortgpt": {"layers": (1, 2)},
    }
    for name, fields in given.items():
        grasp.compress(
            dense, folder / name, method=name, data=text_file, num_samples=2, seq_len=32, **fields
        )
    return {name: str(folder / name) for name in given}


@pytest.fixture(scope="session")
def alpaca(tmp_path_factory) -> str:
    rows = [
        {"instruction": f"Add {n} and {n + 1}.", "input": "", "output": f"The sum is {2 * n + 1}."}
        for n in range(60)
    ]
    path = tmp_path_factory.mktemp("alpaca") / "alpaca.json"
    path.write_text(json.dumps(rows))
    return str(path)


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return {
        name: value.detach()
        for name, value in AutoModelForCausalLM.from_pretrained(path).named_parameters()
        if value.numel()  # a pair of rank 0 has none
    }


def changed(before: str | Path, after: str | Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def factors(path: str | Path) -> set[str]:
    inner = {name for name in weights(path) if name.endswith("weight_in")}
    return inner | {name.removesuffix("_in") for name in inner}


# What is trained


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("grasp-fisher", "distill"),
        pytest.param("grasp", "lm", marks=SLOW),
        pytest.param("grasp-fisher", "layer", marks=SLOW),
    ],
)
def test_factors_alone_change_and_the_held_out_loss_falls(
    checkpoints, alpaca, tmp_path, method, objective
):
    # some start close to the teacher
    gentle = {
        **SMALL,
        "learning_rate": 1e-2 if objective == "lm" else 1e-3 if method == "grasp" else 1e-4,
    }
    done = grasp.recover(
        checkpoints[method], tmp_path / "out", data=alpaca, objective=objective, **gentle
    )
    assert changed(checkpoints[method], tmp_path / "out") == factors(checkpoints[method])
    assert done.best["held_out_loss"] < done.curve[0]["held_out_loss"]
    assert not list(tmp_path.glob("*.recovery"))  # the states of the run are gone


def test_layers_trains_all_of_the_layers_that_hold_a_pair(checkpoints, alpaca, tmp_path):
    grasp.recover(checkpoints["grasp"], tmp_path / "out", data=alpaca, train="layers", **SMALL)
    assert changed(checkpoints["grasp"], tmp_path / "out") == {
        name
        for name in weights(checkpoints["grasp"])
        if ".layers.1." in name or ".layers.2." in name
    }


def test_layers_of_a_model_with_removed_layers_are_all_that_are_left(checkpoints, alpaca, tmp_path):
    grasp.recover(
        checkpoints["shortgpt"],
        tmp_path / "out",
        data=alpaca,
        train="layers",
        objective="layer",
        start="keep",
        **SMALL,
    )
    assert changed(checkpoints["shortgpt"], tmp_path / "out") == {
        name for name in weights(checkpoints["shortgpt"]) if ".layers." in name
    }


@pytest.mark.parametrize("method", ["grasp-fisher", pytest.param("shortgpt", marks=SLOW)])
def test_lora_merges_into_a_checkpoint_of_the_same_shape(checkpoints, alpaca, tmp_path, method):
    done = grasp.recover(checkpoints[method], tmp_path / "out", data=alpaca, train="lora", **SMALL)
    matrices = {
        name for name in weights(checkpoints[method]) if ".layers." in name and "norm" not in name
    }
    assert changed(checkpoints[method], tmp_path / "out") == matrices
    assert done.best["held_out_loss"] < done.curve[0]["held_out_loss"]
    assert "exactly" in done.manifest["recovery"]["merged"]


@torch.no_grad()
def loss_on(path: str | Path, text_file: str) -> float:
    """The cross-entropy of a checkpoint, a token, on all of a text in blocks of 64."""
    decoder = grasp.load(path)
    ids = torch.tensor(decoder.tokenizer(Path(text_file).read_text())["input_ids"])
    blocks = ids[: len(ids) // 64 * 64].view(-1, 64)
    logits = decoder.model(blocks).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()))


@SLOW
@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("llama", "pivoted"),
        ("llama", "pair"),
        ("gpt2", "pair"),
        ("opt", "pivoted"),
        ("phi3", "pair"),
    ],
)
def test_factors_are_updated_one_after_the_other(name, storage, tokenizer, text_file, tmp_path):
    """By adapters: first the output factors alone, then the input factors alone. The loss on the
    text trained on falls each time, each change is of the adapters' rank, and the result loads
    again as it was.
    """
    build(name).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    asked = {"data": text_file, "num_samples": 2, "seq_len": 32}
    grasp.compress(
        str(tmp_path / "dense"),
        tmp_path / "none",
        method="svd-llm",
        retain_ratio=0.5,
        storage=storage,
        **asked,
    )
    options = {**SMALL, "max_length": 64, "lora_rank": 2, "data": text_file}
    options |= {"held_out": 4, "eval_every": 6}
    before, losses = "none", [loss_on(tmp_path / "none", text_file)]
    for now, ending in (("output-factors", "weight"), ("input-factors", "weight_in")):
        done = grasp.recover(
            tmp_path / before, tmp_path / now, preset="sequential", lora_on=now, **options
        )
        pairs = factors(tmp_path / "none")
        held = {one for one in pairs if one.endswith("weight_in") == (ending == "weight_in")}
        assert changed(tmp_path / before, tmp_path / now) == held
        old, new = weights(tmp_path / before), weights(tmp_path / now)
        for one in held:
            sizes = torch.linalg.svdvals((new[one] - old[one]).double())
            assert float(sizes[2:].sum()) < 1e-4 * float(sizes[0]), one
        assert done.best["held_out_loss"] < done.curve[0]["held_out_loss"]
        assert done.manifest["recovery"]["merged"].endswith(f"the {now}; all else is as it was")
        assert done.manifest["recovery"]["trained_parameters"] == 2 * sum(
            sum(old[one].shape) for one in held
        )
        losses.append(loss_on(tmp_path / now, text_file))
        before = now
    assert losses[0] > losses[1] > losses[2]
    assert done.manifest["recovery"]["before"]["recipe"]["lora_on"] == "output-factors"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / now, trust_remote_code=True)
    ids = torch.arange(20)[None]
    assert torch.equal(plain(ids).logits, grasp.load(tmp_path / now).model(ids).logits)


@SLOW
def test_adapters_on_factors_in_bfloat16(checkpoints, alpaca, tmp_path):
    """Changes too small for the stored numbers are kept until the end, then rounded once."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints["grasp"], dtype=torch.bfloat16)
    shutil.copytree(checkpoints["grasp"], tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    done = grasp.recover(
        tmp_path / "half",
        tmp_path / "out",
        data=alpaca,
        preset="sequential",
        **{**SMALL, "precision": "bfloat16"},
    )
    assert changed(tmp_path / "half", tmp_path / "out") == {
        name for name in factors(tmp_path / "half") if name.endswith("weight")
    }
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert done.best["held_out_loss"] < done.curve[0]["held_out_loss"]


def test_what_is_saved_has_the_loss_that_was_measured_last(checkpoints, alpaca, tmp_path):
    """Through merging, casting and reloading: a second recovery starts where the first ended."""
    options = {**SMALL, "train": "lora"}
    first = grasp.recover(checkpoints["shortgpt"], tmp_path / "one", data=alpaca, **options)
    second = grasp.recover(tmp_path / "one", tmp_path / "two", data=alpaca, **options)
    assert second.curve[0]["held_out_loss"] == pytest.approx(first.best["held_out_loss"], abs=1e-5)
    assert second.manifest["recovery"]["before"]["best"] == first.best


def test_an_adapter_can_be_kept(checkpoints, alpaca, tmp_path):
    from peft import PeftModel

    done = grasp.recover(
        checkpoints["grasp"],
        tmp_path / "out",
        data=alpaca,
        train="lora",
        keep_adapter=True,
        **SMALL,
    )
    assert changed(checkpoints["grasp"], tmp_path / "out") == set()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tmp_path / "out" / "adapter"
    )
    ids = torch.arange(20)[None]
    assert not torch.allclose(
        model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    )
    assert done.best["held_out_loss"] < done.curve[0]["held_out_loss"]


OTHER = ("gpt2", *(pytest.param(name, marks=SLOW) for name in ("phi3", "gemma2")))


@pytest.mark.parametrize("name", OTHER)
def test_other_families(name, tokenizer, text_file, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    grasp.compress(
        str(tmp_path / "dense"),
        tmp_path / "small",
        method="grasp",
        layers=(1,),
        retain_ratio=0.5,
        data=text_file,
        num_samples=2,
        seq_len=32,
    )
    options = {**SMALL, "max_length": 64}
    for train in ("factors", "lora"):
        done = grasp.recover(
            tmp_path / "small",
            tmp_path / train,
            data=text_file,
            train=train,
            objective="distill",
            **options,
        )
        assert done.best["held_out_loss"] < done.curve[0]["held_out_loss"]


def test_in_bfloat16_everything_else_is_kept_bit_for_bit(checkpoints, alpaca, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["grasp"], dtype=torch.bfloat16)
    shutil.copytree(checkpoints["grasp"], tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    done = grasp.recover(
        tmp_path / "half", tmp_path / "out", data=alpaca, **{**SMALL, "precision": "bfloat16"}
    )
    assert changed(tmp_path / "half", tmp_path / "out") == factors(tmp_path / "half")
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert done.best["held_out_loss"] < done.curve[0]["held_out_loss"]


@pytest.mark.slow
def test_gradient_checkpointing_and_a_teacher_kept_outside_change_nothing(
    checkpoints, alpaca, tmp_path
):
    options = {**SMALL, "objective": "distill"}
    plain = grasp.recover(checkpoints["grasp"], tmp_path / "plain", data=alpaca, **options)
    saving = grasp.recover(
        checkpoints["grasp"],
        tmp_path / "saving",
        data=alpaca,
        gradient_checkpointing=True,
        offload_teacher=True,
        **options,
    )
    assert [look.get("held_out_loss") for look in saving.curve] == pytest.approx(
        [look.get("held_out_loss") for look in plain.curve]
    )


# What is written down


def test_the_manifest_says_how_it_was_done_and_the_report_shows_the_curve(
    checkpoints, alpaca, tmp_path
):
    done = grasp.recover(
        checkpoints["grasp"], tmp_path / "out", data=alpaca, objective="distill", **SMALL
    )
    manifest = json.loads((tmp_path / "out" / "grasp.json").read_text())
    told = manifest["recovery"]
    assert told["recipe"]["objective"] == "distill" and told["recipe"]["learning_rate"] == 1e-2
    assert (
        told["steps"] == 6 and told["data"]["rows"] == 24 and len(told["data"]["rows_sha256"]) == 64
    )
    assert told["teacher"]["num_layers"] == 4 and told["trained_parameters"] == sum(
        weights(tmp_path / "out")[name].numel() for name in factors(tmp_path / "out")
    )
    assert [look["step"] for look in told["curve"] if "held_out_loss" in look] == [0, 2, 4, 6]
    assert told["curve"] == done.curve and told["best"] == min(
        (look for look in done.curve if "held_out_loss" in look),
        key=lambda look: look["held_out_loss"],
    )
    assert (
        manifest["edits"]
        == json.loads((Path(checkpoints["grasp"]) / "grasp.json").read_text())["edits"]
    )
    assert {point["kind"] for point in curve_of(Checkpoint.read(tmp_path / "out"))} == {
        "training",
        "held out",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "grasp compress" in card
        and "grasp recover grasp out" in card
        and "--objective distill" in card
    )


def test_the_best_state_is_saved_not_the_last(checkpoints, alpaca, tmp_path, monkeypatch):
    disturb(monkeypatch, 3, lambda weight: weight.mul_(3))
    done = grasp.recover(checkpoints["grasp"], tmp_path / "out", data=alpaca, **SMALL)
    looks = {look["step"]: look["held_out_loss"] for look in done.curve if "held_out_loss" in look}
    assert done.best["step"] == 2 and looks[2] < looks[4]
    monkeypatch.undo()
    again = grasp.recover(
        tmp_path / "out", tmp_path / "again", data=alpaca, **{**SMALL, "max_steps": 1}
    )
    assert again.curve[0]["held_out_loss"] == pytest.approx(done.best["held_out_loss"], abs=1e-5)


def disturb(patch: pytest.MonkeyPatch, step: int, change) -> None:
    """Before this step, do something to every trained weight."""
    honest = trainer_module.Compensation.compute_loss

    def broken(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.state.global_step == step:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        change(parameter)
        return honest(self, model, inputs, return_outputs, num_items_in_batch)

    patch.setattr(trainer_module.Compensation, "compute_loss", broken)


@pytest.mark.slow
def test_the_quick_preset_settles_its_learning_rate(checkpoints, alpaca, tmp_path):
    options = {key: value for key, value in SMALL.items() if key != "learning_rate"}
    for method, rate in (("grasp", 1e-4), ("shortgpt", 1e-3)):  # factors are half of the tiny model
        train = "factors" if method == "grasp" else "lora"
        done = grasp.recover(
            checkpoints[method],
            tmp_path / method,
            data=alpaca,
            preset="quick",
            train=train,
            **options,
        )
        assert (
            done.manifest["recovery"]["recipe"]["learning_rate"] == rate
            and f"--learning-rate {rate}" in done.manifest["recovery"]["command"]
        )


# Going on


class Killed(BaseException):
    """Not an error that anything catches."""


@pytest.mark.parametrize(
    "more",
    [{"lora_dropout": 0.2}, pytest.param({"lora_on": "output-factors"}, marks=SLOW)],
    ids=lambda more: next(iter(more)),
)
def test_resume_is_bit_identical(checkpoints, alpaca, tmp_path, more):
    options = {**SMALL, "train": "lora", "data": alpaca, "max_steps": 8, **more}

    def die(task: str, done: int, total: int) -> None:
        if task.startswith("training") and done == 5:
            raise Killed

    grasp.recover(checkpoints["grasp"], tmp_path / "whole", **options)
    with pytest.raises(Killed):
        grasp.recover(checkpoints["grasp"], tmp_path / "cut", progress=die, **options)
    assert not (tmp_path / "cut").exists()
    run = tmp_path / "cut.recovery"
    # nothing is pickled
    assert {path.suffix for path in run.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    with pytest.raises(
        CheckpointError, match=r"holds a run, at step 4; go on from it with --resume, or remove it"
    ):
        grasp.recover(checkpoints["grasp"], tmp_path / "cut", **options)
    with pytest.raises(CheckpointError, match=r"begun with lora_rank 4, not 2"):
        grasp.recover(
            checkpoints["grasp"], tmp_path / "cut", resume=True, **{**options, "lora_rank": 2}
        )
    done = grasp.recover(checkpoints["grasp"], tmp_path / "cut", resume=True, **options)
    assert changed(tmp_path / "whole", tmp_path / "cut") == set()
    assert [look["step"] for look in done.curve] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_a_cache_of_the_teacher_is_made_once(checkpoints, alpaca, tmp_path, monkeypatch):
    options = {**SMALL, "objective": "distill", "data": alpaca}
    full = grasp.recover(checkpoints["grasp"], tmp_path / "full", **options)
    cached = {**options, "teacher_cache": str(tmp_path / "cache"), "top_k": 260}
    first = grasp.recover(checkpoints["grasp"], tmp_path / "first", **cached)
    # would fail if it were asked again
    monkeypatch.setattr("grasp.compensation.teacher.Teacher.logits", None)
    second = grasp.recover(checkpoints["grasp"], tmp_path / "second", **cached)
    assert changed(tmp_path / "first", tmp_path / "second") == set()
    # log-probabilities are kept in half precision
    assert first.best["held_out_loss"] == pytest.approx(full.best["held_out_loss"], abs=3e-4)
    assert second.curve == first.curve
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".npy"}


# What users get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": "factor"},
            "--train factor: unknown; allowed: factors, layers, lora; did you mean 'factors'?",
        ),
        ({"preset": "fast"}, "--preset fast: unknown"),
        ({"lr": 1e-3}, "--lr: grasp recover has no such field"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0: must be above 0"),
        ({"batch_size": 0}, "--batch-size 0: must be a whole number from 1 to"),
        ({"max_length": 4096}, "--max-length 4096: must be from 2 to 512"),
        ({"keep_adapter": True}, "--keep-adapter: --train factors makes no adapter"),
        ({"lora_on": "factors"}, "--lora-on factors: unknown; allowed: matrices, output-factors"),
        ({"lora_on": "input-factors"}, "--lora-on input-factors: --train factors makes no adapter"),
        (
            {"train": "lora", "lora_on": "input-factors", "lora_dropout": 0.1},
            "--lora-dropout 0.1: adapters on input-factors change numbers",
        ),
        (
            {"train": "lora", "lora_on": "output-factors", "keep_adapter": True},
            "--keep-adapter: adapters on output-factors are always merged",
        ),
        ({"teacher_cache": "x"}, "--teacher-cache: --objective lm reads no teacher's predictions"),
        ({"held_out": 1000}, "--held-out 1000: .* has 60 examples"),
        ({"batch_size": 64}, "--batch-size 64: the text gives"),
        ({"data": "nothing.json"}, "--data nothing.json: neither a file nor a known set"),
    ],
)
def test_flags_that_cannot_be(checkpoints, alpaca, tmp_path, options, message):
    with pytest.raises(GraspError, match=message):
        grasp.recover(
            checkpoints["grasp"], tmp_path / "out", **{**SMALL, "data": alpaca, **options}
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "Say.", "input": "", "output": ""}] * 9, "9 rows have no answer"),
        (
            [{"instruction": "Say. " * 100, "input": "", "output": "yes"}] * 9,
            "9 lose all of it at --max-length 256: every token would be masked",
        ),
        ([{"instruction": "Say.", "output": "yes"}, {"text": "plain"}], "give one kind a file"),
        ([{"messages": [{"role": "user", "content": "Hi"}]}], "1 rows have no answer"),
        ([{"number": 3}], "no column holds text"),
    ],
)
def test_data_without_anything_to_learn(checkpoints, tmp_path, rows, message):
    (tmp_path / "data.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message):
        grasp.recover(
            checkpoints["grasp"], tmp_path / "out", **{**SMALL, "data": str(tmp_path / "data.json")}
        )
    assert not (tmp_path / "out").exists()


def test_nothing_to_train(dense, checkpoints, alpaca, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no grasp.json in it; give a checkpoint that `grasp compress` wrote"
    ):
        grasp.recover(dense, tmp_path / "out", data=alpaca, **SMALL)
    with pytest.raises(
        RecipeError,
        match=r"--train factors: .* has no low-rank matrix; use --train lora, or layers",
    ):
        grasp.recover(checkpoints["shortgpt"], tmp_path / "out", data=alpaca, **SMALL)
    with pytest.raises(RecipeError, match=r"--lora-on output-factors: .* has no low-rank matrix"):
        grasp.recover(
            checkpoints["shortgpt"], tmp_path / "out", data=alpaca, preset="sequential", **SMALL
        )
    untouched = tmp_path / "untouched"
    shutil.copytree(dense, untouched)
    manifest = json.loads((Path(checkpoints["shortgpt"]) / "grasp.json").read_text())
    (untouched / "grasp.json").write_text(json.dumps({**manifest, "edits": []}))
    with pytest.raises(RecipeError, match="there is nothing to recover"):
        grasp.recover(untouched, tmp_path / "out", data=alpaca, **SMALL)


def test_a_teacher_that_does_not_fit(checkpoints, alpaca, tmp_path, tokenizer):
    build("qwen3").save_pretrained(tmp_path / "other")
    options = {**SMALL, "data": alpaca, "objective": "distill"}
    with pytest.raises(GraspError, match=r"--teacher|MODEL"):
        grasp.recover(checkpoints["grasp"], tmp_path / "out", teacher="nobody/nothing", **options)
    with pytest.raises(RecipeError, match=r"has 2 layers, but .* was made from a model with 4"):
        grasp.recover(
            checkpoints["grasp"], tmp_path / "out", teacher=checkpoints["shortgpt"], **options
        )


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(
    checkpoints, alpaca, tmp_path, monkeypatch
):
    options = {**SMALL, "data": alpaca}
    with monkeypatch.context() as patch:
        disturb(patch, 4, lambda weight: weight.fill_(math.inf))
        with pytest.raises(
            NumericsError,
            match=(
                r"step 5: the loss is nan; the state of step 4 is kept in .*out.recovery: go on"
                r" from it with --resume and a smaller --learning-rate"
            ),
        ):
            grasp.recover(checkpoints["grasp"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    done = grasp.recover(
        checkpoints["grasp"], tmp_path / "out", resume=True, **{**options, "learning_rate": 1e-3}
    )
    assert [look["step"] for look in done.curve if "held_out_loss" in look] == [0, 2, 4, 6]


def test_a_full_disk_while_a_state_is_saved(checkpoints, alpaca, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "save_optimizer", full)
        with pytest.raises(
            CheckpointError,
            match=(
                r"the state of step 2 cannot be written: .*No space left.*nothing was left behind"
            ),
        ):
            grasp.recover(checkpoints["grasp"], tmp_path / "out", data=alpaca, **SMALL)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_at_the_very_end(checkpoints, alpaca, tmp_path, monkeypatch):
    """The training is not lost: with --resume only the saving is done again."""
    whole = grasp.recover(checkpoints["grasp"], tmp_path / "whole", data=alpaca, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(
            "transformers.PreTrainedModel.save_pretrained",
            lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(CheckpointError, match="No space left on device"):
            grasp.recover(checkpoints["grasp"], tmp_path / "out", data=alpaca, **SMALL)
    assert not (tmp_path / "out").exists()
    done = grasp.recover(checkpoints["grasp"], tmp_path / "out", data=alpaca, resume=True, **SMALL)
    assert changed(tmp_path / "whole", tmp_path / "out") == set()
    assert done.best == whole.best


def test_a_tracker_that_is_not_there(checkpoints, alpaca, tmp_path):
    with pytest.raises(
        RecipeError, match="the training cannot be set up: nonsense is not supported"
    ):
        grasp.recover(
            checkpoints["grasp"], tmp_path / "out", data=alpaca, report_to=("nonsense",), **SMALL
        )
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_a_broken_weight(checkpoints, alpaca, tmp_path):
    shutil.copytree(checkpoints["grasp"], tmp_path / "broken")
    [file] = (tmp_path / "broken").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model.norm.weight"):
        grasp.recover(tmp_path / "broken", tmp_path / "out", data=alpaca, **SMALL)


def test_measuring_on_the_training_text_is_called_leakage(checkpoints, alpaca, text_file, tmp_path):
    grasp.recover(checkpoints["grasp"], tmp_path / "out", data=f"{alpaca},pydoc", **SMALL)
    assert (
        "LEAKAGE, the model was trained on this file"
        in grasp.evaluate(tmp_path / "out", ppl=alpaca, seq_len=64).result.notes[0]
    )
    [note] = grasp.evaluate(tmp_path / "out", ppl="pydoc", seq_len=64, num_blocks=1).result.notes
    assert note.startswith("pydoc: same source") and "LEAKAGE" not in note


# Several processes


def command(*words: str, processes: int = 0) -> list[str]:
    start = (
        [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            str(29500 + os.getpid() % 500),
            "-m",
            "grasp",
        ]
        if processes
        else ["-m", "grasp"]
    )
    return [sys.executable, *start, "recover", *words, "--quiet", "--device", "cpu"]


@SLOW
@pytest.mark.parametrize(
    ("way", "train"),
    [
        ("ddp", "lora"),
        ("fsdp", "factors"),
        ("ddp", "input-factors"),
    ],
)
def test_two_processes_train_what_one_does(checkpoints, alpaca, tmp_path, way, train):
    options = {**SMALL, "train": train}
    if train.endswith("-factors"):
        options = {**SMALL, "train": "lora", "lora_on": train}
    flags = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    more = ["--fsdp"] if way == "fsdp" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(
            checkpoints["grasp"],
            str(tmp_path / "two"),
            "--data",
            alpaca,
            *flags,
            *more,
            "--json",
            processes=2,
        ),
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    one = grasp.recover(checkpoints["grasp"], tmp_path / "one", data=alpaca, **options)
    assert told["recovery"]["processes"] == 2
    losses = [
        [look["held_out_loss"] for look in curve if "held_out_loss" in look]
        for curve in (one.curve, told["recovery"]["curve"])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-4
    assert not list(tmp_path.glob("*.recovery"))


@SLOW
def test_a_killed_command_leaves_a_state_that_another_recipe_cannot_take(
    checkpoints, alpaca, tmp_path
):
    flags = [
        "--data",
        alpaca,
        "--max-steps",
        "400",
        "--eval-every",
        "5",
        "--batch-size",
        "4",
        "--held-out",
        "8",
        "--precision",
        "float32",
    ]
    words = [checkpoints["grasp"], str(tmp_path / "out"), *flags]
    child = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if list(tmp_path.glob("out.recovery/checkpoint-*/trainer_state.json")):
            break
        time.sleep(0.1)
    child.kill()
    child.wait()
    assert not (tmp_path / "out").exists()
    state = json.loads(
        next(tmp_path.glob("out.recovery/checkpoint-*/trainer_state.json")).read_text()
    )
    assert 0 < state["global_step"] < 400
    shorter = ["--max-steps", "401"]
    refused = subprocess.run(
        command(*words, *shorter, "--resume"), check=False, capture_output=True, text=True
    )
    assert (
        refused.returncode == 2
        and "was begun with max_steps 400, not 401" in refused.stderr
        and "Traceback" not in refused.stderr
    )


@SLOW
def test_the_command_as_a_user_calls_it(checkpoints, alpaca, tmp_path):
    flags = [
        "--data",
        alpaca,
        "--max-steps",
        "2",
        "--batch-size",
        "4",
        "--held-out",
        "8",
        "--precision",
        "float32",
        "--json",
    ]
    done = subprocess.run(
        command(checkpoints["grasp"], str(tmp_path / "out"), *flags),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert (
        json.loads(line)["recovery"]["steps"] == 2 and (tmp_path / "out" / "grasp.json").is_file()
    )
    assert (
        "held-out loss" in done.stderr
        and "Traceback" not in done.stderr
        and "Warning" not in done.stderr
    )
    again = subprocess.run(
        command(checkpoints["grasp"], str(tmp_path / "out"), *flags),
        check=False,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and again.stderr.strip().splitlines()[-1].startswith(
        "grasp: error: OUT "
    )


def test_adapters_need_a_dense_matrix(tmp_path, dense, text_file):
    """A checkpoint of low-rank pairs throughout: said before any work, with what trains them."""
    out = tmp_path / "pairs"
    grasp.compress(
        dense,
        out,
        method="grasp",
        layers=(0, 1, 2, 3),
        retain_ratio=0.5,
        data=text_file,
        num_samples=2,
        seq_len=32,
    )
    with pytest.raises(
        grasp.GraspError,
        match=r"--train lora: every matrix .* is a low-rank pair already.*--train factors",
    ):
        grasp.recover(
            out, tmp_path / "better", data=text_file, train="lora", max_length=32, max_steps=1
        )
    assert not (tmp_path / "better").exists()
