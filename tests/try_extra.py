"""One extra in an environment that holds it and nothing else: `python tests/try_extra.py EXTRA`, as
a user calls it.

`none` tries what grasp does without any, and that every verb that needs an extra says in one line
which. Run by `make test-extras`, each in an environment of its own with an empty HOME. It needs
nothing but grasp itself.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
TEXT = "\n".join(f"The {n} quick brown foxes jump over {n * n} lazy dogs." for n in range(200))
SMALL = ["--num-samples", "4", "--seq-len", "32", "--ratio", "0.3"]


def grasp(*words: object) -> str:
    """A command that must succeed. Returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "grasp", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"grasp {' '.join(map(str, words))}: status {done.returncode}\n{done.stderr}"
        )
    return done.stdout


def refused(extra: str, *words: object) -> None:
    """A command that must end in one line that names the extra it needs."""
    done = subprocess.run(
        [sys.executable, "-m", "grasp", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("grasp: error:")]
    if (
        done.returncode != 2
        or len(errors) != 1
        or f"grasp-llm[{extra}]" not in errors[0]
        or "Traceback" in done.stderr
    ):
        raise SystemExit(
            f"grasp {' '.join(map(str, words))}: does not name the extra '{extra}' in one"
            f" line\n{done.stderr}"
        )


def tiny(folder: Path) -> Path:
    """A random Llama with a byte tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(
        models.BPE(
            vocab={s: n for n, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def none(model: Path, text: Path, here: Path) -> None:
    grasp("compress", model, here / "out", "--data", text, *SMALL)
    grasp(
        "eval",
        here / "out",
        "--ppl",
        text,
        "--seq-len",
        32,
        "--num-blocks",
        2,
        "--generate",
        "--new-tokens",
        4,
        "-o",
        here / "r.json",
    )
    grasp("export", here / "out", here / "dense", "--format", "dense")
    grasp(
        "inspect",
        model,
        "--data",
        text,
        "--num-samples",
        2,
        "--seq-len",
        32,
        "-o",
        here / "look.png",
    )
    parquet, gguf = here / "rows.parquet", here / "model.gguf"
    parquet.write_bytes(b"PAR1")
    gguf.write_bytes(b"GGUF" + bytes(60))
    refused("data", "compress", model, here / "no", "--data", parquet, *SMALL)
    refused("offload", "compress", model, here / "no", "--data", text, *SMALL, "--offload", here)
    refused("gguf", "compress", gguf, here / "no", "--data", text, *SMALL)
    refused("gguf", "compress", "smollm2", here / "no", "--data", text, *SMALL)
    refused("report", "report", here / "r.json", "-o", here / "r.html")
    refused(
        "recover",
        "recover",
        here / "out",
        here / "no",
        "--data",
        text,
        "--max-length",
        32,
        "--max-steps",
        1,
    )
    for bits in (8, 4):
        grasp("quantize", model, here / str(bits), "--bits", bits)
    refused("tasks", "eval", model, "--tasks", "arc_easy")
    for runtime in ("onnx", "openvino"):
        refused(runtime, "export", model, here / "no", "--format", runtime)
    assert not (here / "no").exists()


def data(model: Path, text: Path, here: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = here / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXT.splitlines()}), rows)
    grasp("compress", model, here / "out", "--data", rows, *SMALL)


def report(model: Path, text: Path, here: Path) -> None:
    grasp("compress", model, here / "out", "--data", text, *SMALL)
    grasp(
        "eval",
        here / "out",
        "--ppl",
        text,
        "--seq-len",
        32,
        "--num-blocks",
        2,
        "-o",
        here / "r.json",
    )
    grasp("report", here / "out", here / "r.json", "-o", here / "r.html")
    assert "<svg" in (here / "r.html").read_text(encoding="utf-8")


def recover(model: Path, text: Path, here: Path) -> None:
    # LoRA needs dense matrices beside the pairs
    some = ("--method", "grasp", "--num-layers", 1, "--retain-ratio", 0.2)
    grasp("compress", model, here / "out", "--data", text, *SMALL[:4], *some)
    for number, what in enumerate((["--train", "lora"], ["--objective", "distill"])):
        grasp(
            "recover",
            here / "out",
            here / f"better{number}",
            "--data",
            text,
            "--max-length",
            32,
            "--batch-size",
            2,
            "--micro-batch",
            2,
            "--max-steps",
            2,
            *what,
        )
        grasp("eval", here / f"better{number}", "--ppl", text, "--seq-len", 32, "--num-blocks", 2)


def tasks(model: Path, text: Path, here: Path) -> None:
    folder = here / "tasks" / "arc_easy"
    folder.mkdir(parents=True)
    row = {
        "id": "1",
        "question": "Two and two?",
        "choices": {"text": ["4", "5"], "label": ["A", "B"]},
        "answerKey": "A",
    }
    (folder / "test.jsonl").write_text("\n".join([json.dumps(row)] * 3), encoding="utf-8")
    found = json.loads(
        grasp("eval", model, "--tasks", "arc_easy", "--task-data", here / "tasks", "--json")
    )
    assert any(score["name"] == "arc_easy" for score in found["rows"][0]["scores"]), found


def offload(model: Path, text: Path, here: Path) -> None:
    grasp("compress", model, here / "out", "--data", text, *SMALL, "--offload", here / "files")


def exported(runtime: str) -> Callable[[Path, Path, Path], None]:
    def run(model: Path, text: Path, here: Path) -> None:
        grasp("compress", model, here / "out", "--data", text, *SMALL)
        grasp("export", here / "out", here / runtime, "--format", runtime)

    return run


EXTRAS: dict[str, Callable[[Path, Path, Path], None]] = {
    "none": none,
    "data": data,
    "report": report,
    "offload": offload,
    "recover": recover,
    "tasks": tasks,
    "onnx": exported("onnx"),
    "openvino": exported("openvino"),
}
"""By name. `gguf` and `demo` are tried by `make demo`, in the environment that it makes."""


def main(extra: str) -> None:
    here = Path(tempfile.mkdtemp())
    try:
        text = here / "text.txt"
        text.write_text(TEXT, encoding="utf-8")
        EXTRAS[extra](tiny(here / "model"), text, here)
    finally:
        shutil.rmtree(here)
    sys.stdout.write(f"extra {extra}: works alone\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
