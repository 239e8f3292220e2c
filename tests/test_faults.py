"""What goes wrong ends in one line that helps, leaves no half a checkpoint, and never touches the
input.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import VOCAB, build
from safetensors.torch import load_file, save_file
from test_cli import SMALL, Outcome, command

import grasp
from grasp.core.decoder import Decoder
from grasp.core.layers.modeling_grasp import FORMAT_VERSION
from grasp.errors import CheckpointError, ModelError
from grasp.verbs import compress as pipeline

UP_TO_DATE = "pip install -U grasp-llm"


def contents(directory: Path | str) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in Path(directory).rglob("*")
        if file.is_file()
    }


@pytest.fixture(autouse=True)
def the_input_is_never_touched(model_directory):
    """Whatever fails below, the model directory stays as it was, byte for byte."""
    before = contents(model_directory)
    yield
    assert contents(model_directory) == before


@pytest.fixture
def compress(model_directory, text_file, tmp_path):
    """`compress(*flags, model=..., out=...)`: the command on the tiny model, by the paper's method
    unless flags name one; OUT is tmp_path / "out".
    """

    def run(
        *flags: object, model: object = model_directory, out: object = tmp_path / "out"
    ) -> Outcome:
        method = () if {"--method", "--config"} & set(flags) else ("--method", "grasp")
        return command("compress", model, out, "--data", text_file, *SMALL, *method, *flags)

    return run


@pytest.fixture
def copy(model_directory, tmp_path) -> Path:
    """A copy of the tiny model's directory, to be damaged."""
    return Path(shutil.copytree(model_directory, tmp_path / "copy"))


@pytest.fixture(scope="module")
def checkpoint(model_directory, text_file, tmp_path_factory) -> Path:
    """A checkpoint with low-rank matrices in layer 3."""
    out = tmp_path_factory.mktemp("checkpoint") / "small"
    made = command(
        "compress",
        model_directory,
        out,
        "--method",
        "grasp",
        "--layers",
        "3",
        "--data",
        text_file,
        *SMALL,
    )
    assert made.status == 0, made.err
    return out


def change_weights(directory: Path, change) -> None:
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# --- flags


MISTAKES = {
    "--layers 7": ["0 to 3"],
    "--layers 0,-1": ["--layers -1", "0 to 3"],
    "--layers 1,1": ["twice"],
    "--num-layers 5": ["4 layers"],
    "--num-layers -1": ["a whole number from 0 to"],
    "--ratio 1": ["--ratio 1.0", "below 1"],
    "--ratio 1.5": ["below 1"],
    "--ratio -0.1": ["at least 0"],
    "--ratio nan": ["at least 0 and below 1"],
    "--num-layers 1 --retain-ratio 1.2": ["--retain-ratio 1.2", "below 1"],
    "--num-layers 1 --threshold-ratio 0": ["--threshold-ratio 0", "above 0"],
    "--num-layers 1 --rank-multiple 0": ["--rank-multiple 0", "a whole number from 1 to"],
    "--num-layers 1 --ratio 0.1": ["--num-layers", "--ratio", "one of"],
    "": ["--ratio", "--num-layers", "--layers", "none was given"],
    "--num-layers 1 --score talyor": [
        "--score talyor",
        "taylor-per-sample",
        "did you mean 'taylor'?",
    ],
    "--num-layers 1 --method gasp": ["--method gasp", "shortgpt", "did you mean 'grasp'?"],
    "--num-layers 1 --projections gaet": [
        "--projections",
        "'gaet'",
        "attention",
        "did you mean 'gate'?",
    ],
    "--num-layers 1 --sigma-split lfet": [
        "--sigma-split lfet",
        "both, left, right",
        "did you mean 'left'?",
    ],
    "--num-layers 1 --dtype flaot32": ["--dtype flaot32", "bfloat16", "did you mean 'float32'?"],
    "--num-layers 1 --device cdua": ["--device cdua", "cpu", "did you mean 'cuda'?"],
    "--num-layers 1 --num-samples 0": ["--num-samples 0", "a whole number from 1 to"],
    "--num-layers 1 --seq-len 500": ["--seq-len 500", "2 to 128"],
    "--num-layers 1 --data pydco": ["--data pydco", "wikitext2", "did you mean 'pydoc'?"],
    "--method grasp-fisher": [
        "--method grasp-fisher",
        "--ratio",
        "--retain-ratio",
        "none was given",
    ],
    "--method grasp-fisher --ratio 0.1 --retain-ratio 0.1": [
        "--method grasp-fisher",
        "one of",
        "got --ratio and --retain-ratio",
    ],
    "--method grasp-fisher --ratio nan": ["--ratio nan", "at least 0 and below 1"],
    "--method grasp-fisher --ratio 0.1 --layers 7": ["--layers 7", "0 to 3"],
    "--method grasp-fisher --ratio 0.1 --layers 1,1": ["--layers 1,1", "twice"],
    "--method grasp-fisher --ratio 0.1 --layers bii": ["--layers bii", "all, bi, or indices"],
    "--method grasp-fisher --ratio 0.1 --layers bi": ["--num-layers", "--layers bi", "go together"],
    "--method grasp-fisher --ratio 0.1 --num-layers 2": [
        "--num-layers",
        "--layers bi",
        "go together",
    ],
    "--method grasp-fisher --retain-ratio 0.1 --layers bi --num-layers 5": [
        "--num-layers 5",
        "4 layers",
    ],
    "--method grasp-fisher --ratio 0.1 --basis fischer": [
        "--basis fischer",
        "plain, input, fisher",
        "did you mean 'fisher'?",
    ],
    "--method grasp-fisher --ratio 0.1 --exclude gaet": [
        "--exclude",
        "'gaet'",
        "did you mean 'gate'?",
    ],
    "--method grasp-fisher --ratio 0.1 --rank-multiple 0": [
        "--rank-multiple 0",
        "a whole number from 1 to",
    ],
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistaken_flag_is_one_line_that_helps(flags, compress, tmp_path):
    error = compress(*flags.split()).error
    for part in MISTAKES[flags] + ([] if MISTAKES[flags][0].startswith("--") else [flags]):
        assert part in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(compress):
    error = compress("--num-layers", "1", "--device", "cuda").error
    assert "--device cuda" in error and "try cpu" in error


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--retain-ratio 0.5",
        "--projections mlp",
        "--rank-multiple 8",
        "--angular",
        "--method shortgpt",
        "--method grasp-fisher",
        "--method grasp-fisher --layers 1,2 --exclude k,v --rank-multiple 8",
        "--method grasp-fisher --layers bi --num-layers 2 --storage pair",
    ],
)
def test_the_largest_reachable_ratio_is_named_and_can_be_reached(flags, compress, tmp_path):
    error = compress("--ratio", "0.99", *flags.split()).error
    assert "--ratio 0.99" in error and not (tmp_path / "out").exists()
    [largest] = re.findall(r"the largest reachable is ([\d.]+)", error)
    assert compress("--ratio", float(largest) + 0.001, *flags.split()).status == 2
    sizes = compress("--ratio", largest, *flags.split(), "--json").json["parameters"]
    assert sizes["ratio"] >= float(largest) > 0.05


@pytest.mark.parametrize(("content", "said"), [("", "no text"), ("short", "--seq-len 32")])
def test_a_text_with_too_little_in_it(content, said, compress, tmp_path):
    (tmp_path / "text.txt").write_text(content)
    error = compress("--num-layers", "1", "--data", tmp_path / "text.txt").error
    assert f"--data {tmp_path / 'text.txt'}" in error and said in error


@pytest.mark.parametrize("text", ["pydco", "nowhere.txt"])
def test_eval_names_its_own_flag(text, model_directory):
    assert f"--ppl {text}" in command("eval", model_directory, "--ppl", text).error


@pytest.mark.parametrize("picture", ["nowhere/seen.png", "seen.pgn"])
def test_a_picture_that_cannot_be_written(picture, model_directory, text_file, tmp_path):
    given = ("--data", text_file, *SMALL, "-o", tmp_path / picture)
    assert f"--output {tmp_path / picture}" in command("inspect", model_directory, *given).error


def test_what_was_asked_for_and_skipped_is_said(compress, checkpoint):
    """Layer 3 of the checkpoint holds nothing but low-rank pairs; a full share of the scores leaves
    every matrix dense.
    """
    outcome = compress("--layers", "2,3", model=checkpoint)
    assert "layer 3" in outcome.err or "layers.3" in outcome.err
    outcome = compress("--layers", "2", "--threshold-ratio", "1", out=checkpoint.parent / "dense")
    assert outcome.err.count("stays dense") == 7


# --- models


def test_a_hub_name_without_network(compress):
    error = compress("--num-layers", "1", model="nobody/no-such-model").error
    assert (
        "MODEL nobody/no-such-model" in error
        and "network" in error
        and "local directory" in error
        and "smollm2" in error
    )


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "nowhere.gguf", "a/b/c"])
def test_a_path_that_is_not_there(name, compress):
    error = compress("--num-layers", "1", model=name).error
    assert f"MODEL {name}" in error and "no such" in error


def test_a_file_that_is_no_model(compress, text_file):
    error = compress("--num-layers", "1", model=text_file).error
    assert f"MODEL {text_file}" in error and ".gguf" in error


def test_a_missing_config(compress, copy):
    (copy / "config.json").unlink()
    error = compress("--num-layers", "1", model=copy).error
    assert str(copy) in error and "no config.json" in error


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model_type": "no-such-type"}', '{"model_type": "t5"}']
)
def test_a_config_of_no_language_model(content, compress, copy):
    (copy / "config.json").write_text(content)
    assert str(copy) in compress("--num-layers", "1", model=copy).error


@pytest.mark.parametrize("verb", ["compress", "eval"])
def test_missing_weights(verb, copy, text_file, tmp_path):
    (copy / "model.safetensors").unlink()
    words = (tmp_path / "out", "--ratio", "0.1") if verb == "compress" else ("--ppl", text_file)
    error = command(verb, copy, *words).error
    assert str(copy) in error and "no *.safetensors file" in error


@pytest.mark.parametrize("left", [0, 7, 200, 0.5, -1])
def test_truncated_weights(left, compress, copy):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole)) if 0 < left < 1 else left])
    error = compress("--num-layers", "1", model=copy).error
    assert str(file) in error and "damaged or cut short" in error


def test_a_missing_shard(compress, copy):
    build("llama").save_pretrained(copy, max_shard_size="60KB")
    (copy / "model.safetensors").unlink()
    shards = sorted(copy.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    error = compress("--num-layers", "1", model=copy).error
    assert str(copy) in error and shards[1].name in error


def test_a_missing_tensor_is_never_filled_with_random_numbers(compress, copy):
    change_weights(copy, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    error = compress("--num-layers", "1", model=copy).error
    assert str(copy) in error and "model.layers.2.mlp.up_proj.weight" in error


def test_a_tensor_of_the_wrong_shape(compress, copy):
    change_weights(
        copy,
        lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(3, 32)}),
    )
    error = compress("--num-layers", "1", model=copy).error
    assert str(copy) in error and "model.layers.2.mlp.up_proj.weight" in error


def test_an_architecture_without_plain_linears(compress, tokenizer, tmp_path):
    """The first GPT stores all its matrices (in, out), and has no row."""
    config = transformers.OpenAIGPTConfig(
        vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    error = compress("--num-layers", "1", model=tmp_path / "first").error
    assert "openai-gpt" in error and "Conv1D holds most" in error and "add a row" in error


def test_a_model_without_its_familys_linears():
    model = build("llama")
    for layer in model.model.layers:
        del layer.mlp.gate_proj
    with pytest.raises(ModelError, match=r"not laid out as Llama: .*gate_proj.*; .*add a row"):
        _ = Decoder(model).family


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("verb", ["compress", "inspect"])
def test_a_non_finite_weight_is_named(verb, number, copy, text_file, tmp_path):
    change_weights(
        copy, lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"][3].fill_(number)
    )
    words = (
        (tmp_path / "out", "--ratio", "0.1")
        if verb == "compress"
        else ("-o", tmp_path / "seen.png")
    )
    error = command(verb, copy, *words, "--data", text_file, *SMALL).error
    assert "'model.layers.2.mlp.down_proj.weight' holds 48 non-finite numbers" in error


@pytest.mark.parametrize(
    "flags",
    [
        "--num-layers 1",
        "--layers 1",
        "--layers 1 --score magnitude",
        "--layers 3 --data self",
        "--method shortgpt --num-layers 1",
        "--method grasp-fisher --ratio 0.1",
        "--method grasp-fisher --ratio 0.1 --basis plain",
    ],
)
def test_a_loss_that_is_not_a_number_names_the_layer(flags, compress, copy, tmp_path):
    """Finite weights whose products overflow in layer 2."""
    change_weights(copy, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].fill_(3e38))
    error = compress(*flags.split(), model=copy).error
    assert "layer 2" in error and "float32" in error
    assert not (tmp_path / "out").exists()


# --- checkpoints


def test_a_manifest_of_a_newer_grasp(checkpoint, text_file, tmp_path):
    newer = Path(shutil.copytree(checkpoint, tmp_path / "newer"))
    change_json(newer / "grasp.json", format_version=99)
    with pytest.raises(
        CheckpointError, match=f"format 99 .* up to {FORMAT_VERSION}; .*{UP_TO_DATE}"
    ):
        grasp.load(newer)
    error = command("eval", newer, "--ppl", text_file).error
    assert str(newer) in error and UP_TO_DATE in error


def test_weights_of_a_newer_grasp(checkpoint, text_file, tmp_path):
    newer = Path(shutil.copytree(checkpoint, tmp_path / "newer"))
    table = json.loads((newer / "config.json").read_text())["quantization_config"]
    change_json(newer / "config.json", quantization_config={**table, "version": 99})
    with pytest.raises(ValueError, match=f"format 99.* up to {FORMAT_VERSION}: .*{UP_TO_DATE}"):
        transformers.AutoModelForCausalLM.from_pretrained(newer)
    error = command("eval", newer, "--ppl", text_file).error
    assert str(newer) in error and UP_TO_DATE in error


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_damaged_manifest(content, checkpoint, tmp_path):
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    (damaged / "grasp.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"grasp\.json: .*damaged"):
        grasp.load(damaged)


def test_a_rank_table_that_does_not_fit(checkpoint, text_file, tmp_path):
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    table = json.loads((damaged / "config.json").read_text())["quantization_config"]
    pair = {"kind": "low-rank", "rank": 3}
    for structure in ({**table["structure"], "model.layers.9.mlp.up_proj": pair}, {}):
        change_json(damaged / "config.json", quantization_config={**table, "structure": structure})
        assert str(damaged) in command("eval", damaged, "--ppl", text_file).error


# --- OUT


def test_out_that_is_not_empty_is_left_untouched(compress, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    error = compress("--num-layers", "1").error
    assert (
        f"OUT {tmp_path / 'out'}" in error
        and "not an empty directory" in error
        and "another path" in error
    )
    assert contents(tmp_path) == {"out/mine.txt": b"mine"}


def test_out_that_is_a_file_or_the_model_itself(compress, model_directory, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "not an empty directory" in compress("--num-layers", "1").error
    assert "not an empty directory" in compress("--num-layers", "1", out=model_directory).error


def test_an_empty_out_is_taken(compress, tmp_path):
    (tmp_path / "out").mkdir()
    assert compress("--num-layers", "1").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (
        tmp_path / "out" / "config.json"
    ).is_file()


def free_space(monkeypatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_a_disk_that_is_too_small_is_refused_before_any_work(compress, monkeypatch, tmp_path):
    free_space(monkeypatch, 50_000)
    monkeypatch.setattr(pipeline, "calibrate", lambda *_, **__: pytest.fail("work was begun"))
    error = compress("--ratio", "0.2", out=tmp_path / "new" / "out").error
    assert f"OUT {tmp_path / 'new' / 'out'}" in error and "needs" in error and "free" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["grasp", "grasp-fisher"])
def test_room_for_the_small_model_is_enough(method, compress, monkeypatch):
    free_space(monkeypatch, 130_000)
    assert "free" in compress("--ratio", "0.1", "--method", method).error
    assert compress("--ratio", "0.3", "--method", method).status == 0


def test_a_disk_that_fills_up_meanwhile_is_noticed_before_writing(compress, monkeypatch, tmp_path):
    calibrate = pipeline.calibrate

    def fill(*arguments, **options):
        free_space(monkeypatch, 10)
        return calibrate(*arguments, **options)

    monkeypatch.setattr(pipeline, "calibrate", fill)
    assert "10 bytes free" in compress("--ratio", "0.2").err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (OSError(28, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
    ],
)
def test_a_failure_while_saving_leaves_nothing_behind(
    failure, status, compress, monkeypatch, tmp_path
):
    """The weights are written when it fails. OUT's parent is new: it is part of what would be left
    behind.
    """

    write = transformers.PreTrainedTokenizerBase.save_pretrained

    def fail(tokenizer, folder, *rest, **options):
        if ".partial-" in str(folder):
            raise failure
        return write(tokenizer, folder, *rest, **options)

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fail)
    outcome = compress("--num-layers", "1", out=tmp_path / "new" / "out")
    assert outcome.status == status and outcome.out == "" and "Traceback" not in outcome.err
    assert [line for line in outcome.err.splitlines() if "error" in line] == [
        outcome.err.splitlines()[-1]
    ]
    assert list(tmp_path.rglob("*")) == []


# --- a process that dies while it saves


DYING = """
import json, os, resource, signal, sys
import torch
torch.set_num_threads(1)  # a process with more threads must not fork
import transformers
import grasp.terminal.shows.compress
from grasp.cli import main

# imported once, before the forks
transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def whole():
    pass

def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

def killed_in_the_weights():
    write = transformers.modeling_utils.safe_save_file
    def half(tensors, path, *rest, **options):
        write(tensors, path, *rest, **options)
        os.truncate(path, os.path.getsize(path) // 2)
        die()
    transformers.modeling_utils.safe_save_file = half

def killed_after_the_weights():
    write = transformers.PreTrainedTokenizerBase.save_pretrained
    def late(tokenizer, folder, *rest, **options):
        return die() if ".partial-" in str(folder) else write(tokenizer, folder, *rest, **options)
    transformers.PreTrainedTokenizerBase.save_pretrained = late

def killed_at_the_last_moment():
    os.replace = die

home, model, text = sys.argv[1:]
ends = {}
for prepare in (whole, no_room, killed_in_the_weights, killed_after_the_weights, \
killed_at_the_last_moment):
    place = os.path.join(home, prepare.__name__)
    os.mkdir(place)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(place + ".err", os.O_WRONLY | os.O_CREAT), 2)
        prepare()
        size = ["--method", "grasp", "--num-layers", "1", "--num-samples", "3", "--seq-len", "32"]
        sys.argv = ["grasp", "compress", model, os.path.join(place, "out"), "--data", text, *size]
        try:
            main()
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(0)
    ends[prepare.__name__] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def deaths(model_directory, text_file, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """(directory, exit status by case): each case compressed into `directory/case/out` and said
    `directory/case.err`.
    """
    home = tmp_path_factory.mktemp("deaths")
    words = [sys.executable, "-c", DYING, str(home), model_directory, text_file]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return home, json.loads(done.stdout.splitlines()[-1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@needs_fork
def test_a_write_error_in_the_middle_of_saving_is_one_line_and_leaves_nothing(deaths):
    home, ends = deaths
    # or the cases would prove nothing
    assert ends["whole"] == 0 and grasp.load(home / "whole" / "out").manifest
    assert ends["no_room"] == 2
    errors = [
        line
        for line in (home / "no_room.err").read_text().splitlines()
        if not line.startswith("INFO")
    ]
    assert len(errors) == 1 and errors[0].startswith(
        f"grasp: error: OUT {home / 'no_room' / 'out'}: cannot be written"
    )
    assert list((home / "no_room").iterdir()) == []


@needs_fork
@pytest.mark.parametrize(
    "case", ["killed_in_the_weights", "killed_after_the_weights", "killed_at_the_last_moment"]
)
def test_a_killed_process_leaves_no_out_and_the_next_run_works(case, deaths, compress):
    home, ends = deaths
    assert ends[case] == -signal.SIGKILL
    out = home / case / "out"
    left = list((home / case).iterdir())
    assert left and out not in left and all(path.name.startswith(".out.partial-") for path in left)
    with pytest.raises(ModelError):
        grasp.load(out)
    if case == "killed_in_the_weights":
        with pytest.raises(CheckpointError):
            grasp.load(left[0])
    assert compress("--num-layers", "1", out=out).status == 0
    assert (
        grasp.load(out).manifest["parameters"]
        == grasp.load(home / "whole" / "out").manifest["parameters"]
    )


def test_without_a_network_the_hub_is_not_asked_six_times(monkeypatch):
    """Where the hub's name cannot be looked up, a hub model is sought in the cache only, and a hub
    text is refused at once.
    """
    from grasp.core import hub
    from grasp.data import text

    def no_network(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(text, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "getaddrinfo", no_network)
    seen = {}

    def only_the_cache(_name: str, **options: object) -> None:
        seen.update(options)
        raise OSError("not in the cache")

    monkeypatch.setattr("grasp.core.models.AutoConfig.from_pretrained", only_the_cache)
    with pytest.raises(ModelError, match="not a local directory"):
        grasp.evaluate("somebody/model")
    assert seen["local_files_only"] is True
    with pytest.raises(grasp.GraspError, match="cannot be reached; give a local copy instead"):
        text.read_text("wikitext2", split="train")
