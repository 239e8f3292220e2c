"""What a MODEL directory can be instead of a model, and models that are only run: one line that
says what it is and the way on.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import _GATED, _IDS
from test_cli import SMALL, command

import grasp
from grasp.core import explaining, models
from grasp.errors import ModelError

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid"
    " sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.fixture
def copy(model_directory, tmp_path) -> Path:
    """A copy of the tiny model's directory, to be changed."""
    return Path(shutil.copytree(model_directory, tmp_path / "copy"))


@pytest.fixture
def said(text_file, tmp_path):
    """`said(model)`: the one line of `compress` and of `eval`, and nothing written."""

    def run(model: object) -> list[str]:
        found = [
            command(
                "compress", model, tmp_path / "out", "--ratio", "0.1", "--data", text_file, *SMALL
            ).error,
            command("eval", model, "--ppl", text_file, "--seq-len", "32").error,
        ]
        assert not (tmp_path / "out").exists()
        return found

    return run


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "model.pt",
        "consolidated.00.pth",
        "model.ckpt",
    ],
)
def test_pickles_are_not_opened(name, copy, said, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    (copy / "model.safetensors").rename(copy / name)
    for error in said(copy):
        assert (
            name in error
            and "pickles" in error
            and f"M.from_pretrained('{copy}', weights_only=True).save_pretrained('NEW')" in error
        )


def test_pickles_beside_safetensors_are_passed_by(copy, text_file):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (copy / name).write_bytes(b"not even a pickle")
    assert command("eval", copy, "--ppl", text_file, "--seq-len", "32").status == 0


def test_the_command_that_converts_works(copy, said, tmp_path):
    """As it stands in the error, but in this process."""
    model = transformers.AutoModelForCausalLM.from_pretrained(copy)
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    program = (
        said(copy)[0]
        .split('python -c "')[1]
        .rstrip('"')
        .replace("'NEW'", repr(str(tmp_path / "new")))
    )
    exec(program, {})
    assert grasp.load(tmp_path / "new").model is not None


def test_a_pickle_as_model(copy, said):
    (copy / "model.safetensors").rename(copy / "model.pt")
    for error in said(copy / "model.pt"):
        assert "a pickle" in error and "never opened" in error


@pytest.mark.parametrize(("adapter", "pickled"), [(True, False), (False, True)])
def test_pickles_and_adapters_of_the_hub(adapter, pickled, monkeypatch):
    """A repository of the hub is asked for safetensors only."""
    asked: dict = {}
    config = transformers.LlamaConfig(**_GATED, **_IDS)

    def found(*_, **options):
        asked.update(options)
        raise OSError("somebody/model does not appear to have a file named model.safetensors")

    def configured(*_, **__):
        if adapter:
            raise OSError("no config.json")
        return config

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", configured)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", found)
    monkeypatch.setattr(models, "_beside", lambda *_: ())
    has = {"adapter_config.json"} if adapter else {"pytorch_model.bin"}
    monkeypatch.setattr(
        explaining,
        "try_to_load_from_cache",
        lambda _, file: f"/cache/{file}" if file in has else None,
    )
    with pytest.raises(
        ModelError, match="holds an adapter" if adapter else "its weights are pickles"
    ):
        models.load_model("somebody/model")
    assert adapter or asked["use_safetensors"] is True


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_is_called_one(whole, weights, copy, said):
    """By itself, and in the directory of a model, on which transformers would put it unasked."""
    (copy / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/base"})
    )
    (copy / "model.safetensors").rename(copy / weights)
    if not whole:
        (copy / "config.json").unlink()
    for error in said(copy):
        assert (
            "holds an adapter" in error and "someone/base" in error and "merge_and_unload" in error
        )


def test_merging_as_it_is_said_works(copy, tmp_path, said):
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(copy),
        LoraConfig(r=2, target_modules=["q_proj"]),
    )
    adapter.save_pretrained(tmp_path / "adapter")
    program = (
        said(tmp_path / "adapter")[0]
        .split('python -c "')[1]
        .rstrip('"')
        .replace("'NEW'", repr(str(tmp_path / "new")))
    )
    exec(program, {})
    assert grasp.load(tmp_path / "new").model is not None


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer(name, copy, said):
    (copy / name).write_text(POINTER)
    for error in said(copy):
        assert str(copy / name) in error and f"`git lfs pull` in {copy}" in error


def test_a_git_lfs_pointer_to_a_gguf_file(tmp_path, said):
    (tmp_path / "model.gguf").write_text(POINTER)
    for error in said(tmp_path / "model.gguf"):
        assert "git lfs pull" in error


def test_no_tokenizer_files(copy, said):
    for file in [*copy.glob("tokenizer*"), *copy.glob("chat_template*")]:
        file.unlink()
    for error in said(copy):
        assert str(copy) in error and "copy tokenizer.json" in error and "Calibration" not in error


@pytest.fixture
def experts(tokenizer, tmp_path) -> Path:
    """A family without a row, whose experts are one tensor each, with a tokenizer."""
    config = transformers.GraniteMoeConfig(**_IDS, **_GATED, num_local_experts=4)
    transformers.GraniteMoeForCausalLM(config).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def test_a_model_of_no_family_is_run_and_compressed(experts, text_file, tmp_path):
    """`eval` and `bench` need no matrices; what is left alone by `compress` is said."""
    for words in (
        ("eval", experts, "--ppl", text_file, "--seq-len", "32", "--generate", "--new-tokens", "8"),
        ("bench", experts, "--prompt-len", "8", "--new-tokens", "2", "--rounds", "1"),
    ):
        done = command(*words)
        assert done.status == 0, done.err
    done = command("export", experts, tmp_path / "dense", "--format", "dense")
    assert done.status == 0, done.err
    done = command(
        "compress", experts, tmp_path / "out", "--ratio", "0.1", "--data", text_file, *SMALL
    )
    assert done.status == 0 and "and experts at block_sparse_moe.experts by inspection" in done.err
