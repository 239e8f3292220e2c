"""Other people's tools on a checkpoint of either kind, as their users call them.

peft (LoRA trained, saved, loaded), the Hugging Face Trainer and torch.compile are in
test_checkpoint.py; onnxruntime, openvino-genai and llama.cpp in test_export.py.

A tool with a command of its own must import grasp: lm-eval and `transformers serve` read the
config's `quantization_config` themselves, before the code that a checkpoint brings is asked, so
`trust_remote_code` does not help them. Without grasp they stop; they never go on wrongly.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_checkpoint import compressed
from torch.export import Dim

import grasp

PROMPT, NEW = "The quick brown", 12


@pytest.fixture(scope="module", params=["grasp", "grasp-fisher"])
def checkpoint(request, tmp_path_factory, model_directory) -> Path:
    """Of the paper's method, which stores plain pairs, and of the default one, which stores pivoted
    pairs.
    """
    fields = {"num_layers": 2, "retain_ratio": 0.3} if request.param == "grasp" else {"ratio": 0.2}
    return compressed(
        tmp_path_factory.mktemp(request.param) / "out",
        model_directory,
        method=request.param,
        **fields,
    )


def continuation(checkpoint: Path, tokenizer) -> str:
    """What `generate()` writes behind the prompt, greedily."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = grasp.load(checkpoint).model.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    return tokenizer.decode(ids[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)


WITH_GRASP = "import grasp; "
LM_EVAL = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
SERVE = "from transformers.cli.transformers import app; app()"


def environment() -> dict[str, str]:
    """For a tool in a process of its own: it imports the same packages, and no hub."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_torch_export_of_any_batch_and_length(checkpoint):
    model = grasp.load(checkpoint).model
    ids = torch.load(checkpoint.parent / "ids.pt")
    free = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": ids[:2, :5].clone(), "use_cache": False}, dynamic_shapes=free
        ).module()
        for batch, length in ((4, 20), (3, 2), (2, 7)):
            found = program(input_ids=ids[:batch, :length].clone(), use_cache=False).logits
            assert torch.allclose(found, model(input_ids=ids[:batch, :length]).logits, atol=1e-5)


def test_pipeline(checkpoint, tokenizer):
    from transformers import pipeline

    [made] = pipeline("text-generation", model=str(checkpoint))(
        PROMPT, max_new_tokens=NEW, do_sample=False, return_full_text=False
    )
    assert made["generated_text"] == continuation(checkpoint, tokenizer)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_command(checkpoint, tmp_path):
    """Its numbers are those of the model in this process: the total log-likelihood picks the
    answer.
    """
    rows = [
        {"question": f"{n} + {n} =", "choices": [str(2 * n), str(n), "no"], "answer": 0}
        for n in range(1, 9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "rows.jsonl"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
""")
    words = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={checkpoint},dtype=float32",
        "--tasks",
        "sums",
        "--include_path",
        str(tmp_path),
    ]
    words += [
        "--device",
        "cpu",
        "--batch_size",
        "1",
        "--output_path",
        str(tmp_path / "found"),
        "--log_samples",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITH_GRASP + LM_EVAL, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [results] = (tmp_path / "found").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["sums"]["acc,none"] <= 1
    [samples] = (tmp_path / "found").rglob("samples_*.jsonl")
    sample = next(
        row for row in map(json.loads, samples.read_text().splitlines()) if row["doc_id"] == 0
    )
    loaded = grasp.load(checkpoint)
    for choice, (found, _) in zip(rows[0]["choices"], sample["filtered_resps"], strict=True):
        context = loaded.tokenizer(rows[0]["question"]).input_ids
        ids = context + loaded.tokenizer(" " + choice, add_special_tokens=False).input_ids
        with torch.no_grad():
            logs = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert (
            abs(
                float(found)
                - sum(float(logs[place - 1, ids[place]]) for place in range(len(context), len(ids)))
            )
            < 1e-3
        )


@pytest.fixture
def server(checkpoint, tmp_path) -> Iterator[str]:
    """`transformers serve` of the checkpoint on this machine; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "serve",
        str(checkpoint),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", WITH_GRASP + SERVE, *words],
            stdout=log,
            stderr=log,
            env=environment(),
        )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
    reason="make test-export installs the server",
)
def test_transformers_serve(checkpoint, server, tokenizer):
    """Greedy text over HTTP."""
    body = {"model": str(checkpoint), "prompt": PROMPT, "max_tokens": NEW, "temperature": 0.0}
    asked = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=120) as answer:
        said = json.loads(answer.read())
    assert said["choices"][0]["text"] == continuation(checkpoint, tokenizer)


@pytest.mark.parametrize(
    ("program", "words", "package"),
    [
        (
            LM_EVAL,
            ["--model", "hf", "--tasks", "arc_easy", "--device", "cpu", "--model_args"],
            "lm_eval",
        ),
        (SERVE, ["serve", "--device", "cpu", "--port", "0", "--trust-remote-code"], "fastapi"),
    ],
    ids=["lm-eval", "serve"],
)
def test_without_grasp_the_tool_stops(program, words, package, checkpoint):
    """An error about the checkpoint's format; never an answer from random numbers."""
    pytest.importorskip(package)
    last = (
        f"pretrained={checkpoint},trust_remote_code=True"
        if package == "lm_eval"
        else str(checkpoint)
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words, last],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=240,
    )
    assert done.returncode != 0
    assert (
        "Unknown quantization type, got grasp" in done.stderr or "mismatch" in done.stderr.lower()
    ), done.stderr[-2000:]
