"""vLLM serves our checkpoints: every family, real servers over HTTP, two devices, and what it says
when something is wrong.

Needs vLLM, so `make test-serving` runs it in an environment of its own; `make test` skips it.
"""

import contextlib
import gc
import json
import os
import pydoc_data.topics
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import FAMILY_ROWS, build
from safetensors.torch import load_file, save_file
from test_compressed_tensors import mixed
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Factorize, Narrow
from grasp.core.edits.cuts import sizes_of
from grasp.core.layer import is_quantized
from grasp.core.linalg import pivoted
from grasp.core.models import embedded_model

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-serving")

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")

PROMPTS = [[10, 20, 30, 40, 50], [7, 99, 100, 3], [200] * 12]
WIDER = {
    "hidden_size": 128,
    "n_embd": 128,
    "intermediate_size": 192,
    "ffn_dim": 256,
    "word_embed_proj_dim": 128,
    "head_dim": 32,
}
"""vLLM's attention on CPU wants heads of 32 numbers or more."""
AS_PUBLISHED: dict[str, dict[str, object]] = {
    "qwen2": {"use_sliding_window": False},  # vLLM has none in some layers only
    "olmoe": {"tie_word_embeddings": False},
    "gpt_oss": {
        "tie_word_embeddings": False,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 32.0},
            **{"original_max_position_embeddings": 4, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    },
    # its attention knows a latent of 512 numbers beside 64 that are turned, and no other
    "deepseek_v3": {
        **{"tie_word_embeddings": False, "topk_method": "noaux_tc"},
        **{"kv_lora_rank": 512, "qk_rope_head_dim": 64},
    },
}
"""Where vLLM goes by what the published models of a family say in their config."""
OF_ITS_OWN = ("deepseek_v3",)
"""vLLM's numbers of the dense model are not those of transformers (0.1 nats): ours are held against
those of the dense model that is equal to it.
"""
METHODS = {"grasp": {"num_layers": 2, "retain_ratio": 0.5}, "grasp-fisher": {"ratio": 0.15}}
BOTH = {
    "grasp": {"layers": (1,), "retain_ratio": 0.5},
    "grasp-fisher": {"layers": ("0", "2"), "ratio": 0.05, "parts": "ranks"},
}
"""Pairs in one layer, pivoted pairs in two, of which one is narrowed; one is narrowed and dense."""
LEFT = {2: (2, 3), 3: (1, 2)}
"""Layer -> which part of its MLP's channels is left, in every tiny model."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """Compressed tiny models by family, and by method, when first asked for: (directory, greedy
    tokens with their log-probabilities by transformers).
    """
    folder = tmp_path_factory.mktemp("tiny")
    blocks = grasp.Calibration(
        torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(1)), "random"
    )
    options = {"data": blocks, "tokenizer": tokenizer}
    found = {}

    def make(family, method="both"):
        out = folder / f"{family}-{method}"
        if out not in found:
            model, whole = build_wide(family), {}
            if FAMILY_ROWS[family].experts:
                whole = {"exclude": ("experts",)}  # vLLM's kernels want them of one shape
            else:
                model = narrowed(model)
            if method == "both":
                model = grasp.compress(model, method="grasp", **options, **BOTH["grasp"]).model
                more = {**options, **BOTH["grasp-fisher"], **whole}
                grasp.compress(model, out, method="grasp-fisher", **more)
            else:
                grasp.compress(model, out, method=method, **options, **METHODS[method])
            found[out] = (out, greedy(grasp.load(out).model, PROMPTS, 12))
        return found[out]

    return make


def narrowed(model):
    """With fewer channels in the MLPs of two layers, each of its own width."""
    decoder = Decoder(model)
    for layer, (part, whole) in LEFT.items():
        count = sizes_of(decoder, layer).channels
        Narrow(layer, "channels", torch.arange(count * part // whole)).apply(decoder)
    return decoder.model


@torch.no_grad()
def greedy(model, prompts, steps):
    """[(tokens, log-probabilities)] of each prompt, by a plain loop without a cache."""
    found = []
    for prompt in prompts:
        ids, logs = torch.tensor([prompt]), []
        for _ in range(steps):
            best = model(ids).logits[0, -1].float().log_softmax(-1).max(-1)
            logs.append(best.values.item())
            ids = torch.cat((ids, best.indices.view(1, 1)), dim=1)
        found.append((ids[0, len(prompt) :].tolist(), logs))
    return found


@contextlib.contextmanager
def engine(path, **options):
    """vLLM in this process, ended with the block."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(
            str(path), max_model_len=64, **{"dtype": "float32", "enforce_eager": True, **options}
        )
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def served(llm, prompts, steps):
    """What `greedy` gives, by vLLM."""
    from vllm import SamplingParams

    how = SamplingParams(
        temperature=0, max_tokens=steps, logprobs=1, ignore_eos=True, detokenize=False
    )
    results = [
        found.outputs[0]
        for found in llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False
        )
    ]
    return [
        (list(o.token_ids), [o.logprobs[i][t].logprob for i, t in enumerate(o.token_ids)])
        for o in results
    ]


def served_alone(path):
    """What `greedy` gives of the prompts, by an engine that is gone afterwards."""
    with engine(path) as llm:
        return served(llm, PROMPTS, 12)


def test_every_family_gives_the_same_tokens(tiny, family, tmp_path):
    """Fused q/k/v and gate/up, biases, tied embeddings, Conv1D, matrices stored as one, pairs and
    pivoted pairs, MLPs of three widths; of models with experts, all but those.
    """
    path, expected = tiny(family)
    if family in OF_ITS_OWN:
        dense = grasp.export(path, tmp_path / "dense", format="dense").path
        expected = served_alone(dense)
    for (tokens, logs), (ours, our_logs) in zip(expected, served_alone(path), strict=True):
        assert ours == tokens
        assert our_logs == pytest.approx(logs, abs=1e-3)


def test_fewer_experts_are_an_ordinary_model(tmp_path, tokenizer):
    blocks = grasp.Calibration(torch.arange(120).view(6, 20), "counted")
    made = grasp.compress(
        build_wide("mixtral"),
        tmp_path / "out",
        method="reap",
        num_experts=3,
        data=blocks,
        tokenizer=tokenizer,
    )
    for (tokens, logs), (ours, our_logs) in zip(
        greedy(made.model, PROMPTS, 12), served_alone(made.path), strict=True
    ):
        assert ours == tokens
        assert our_logs == pytest.approx(logs, abs=1e-3)


def test_kinds_mixed_in_one_fused_linear(tmp_path, tokenizer):
    """q low-rank, k dense, v pivoted; gate of rank 0, up dense: each part of vLLM's fused linears
    is its own kind.
    """
    decoder = Decoder(build_wide(), tokenizer)
    generator = torch.Generator().manual_seed(0)

    def pair(out, rank):
        return (
            torch.randn(rank, 128, generator=generator) / 4,
            torch.randn(out, rank, generator=generator) / 4,
        )

    for layer in (0, 2):
        Factorize(f"model.layers.{layer}.self_attn.q_proj", *pair(128, 24)).apply(decoder)
        Factorize(f"model.layers.{layer}.mlp.gate_proj", *pair(192, 0)).apply(decoder)
        weight_in, weight, places = pivoted(*reversed(pair(64, 20)))
        Factorize(f"model.layers.{layer}.self_attn.v_proj", weight_in, weight, places=places).apply(
            decoder
        )
    decoder.model.save_pretrained(tmp_path / "mixed")
    tokenizer.save_pretrained(tmp_path / "mixed")
    expected = greedy(decoder.model, PROMPTS, 12)
    with engine(tmp_path / "mixed") as llm:
        for (tokens, logs), (ours, our_logs) in zip(
            expected, served(llm, PROMPTS, 12), strict=True
        ):
            assert ours == tokens and our_logs == pytest.approx(logs, abs=1e-3)


@pytest.mark.parametrize(
    ("made", "bits"),
    [
        ("llama-grasp", 8),
        ("llama-grasp", 4),
        ("gpt2-grasp", 8),
        ("gpt2-grasp", 4),
        ("phi3-grasp-fisher", 8),
    ],
)
def test_few_bits_are_served(tiny, tmp_path, made, bits):
    """A checkpoint of `grasp quantize`: dense matrices, narrowed ones, pairs and pivoted pairs."""
    grasp.quantize(tiny(*made.split("-", 1))[0], tmp_path / "few", bits=bits)
    expected = greedy(grasp.load(tmp_path / "few").model, PROMPTS, 12)
    with engine(tmp_path / "few") as llm:
        for (tokens, logs), (ours, our_logs) in zip(
            expected, served(llm, PROMPTS, 12), strict=True
        ):
            assert ours == tokens and our_logs == pytest.approx(logs, abs=1e-3)


AS_STORED = {"additional_config": {"grasp_stored_width": True}}


def as_stored(model):
    """(type, outputs) of every product with numbers in few bits."""
    return [
        (str(one.numbers.dtype), one.rows)
        for one in model.modules()
        if type(one).__name__ == "AtWidth"
    ]


@pytest.mark.parametrize(
    ("made", "bits", "size"),
    [
        ("llama-grasp", 8, 32),
        ("llama-grasp", 4, 64),
        ("llama-grasp", 3, 32),
        ("gpt2-grasp", 4, 32),
        ("phi3-grasp-fisher", 8, 32),
    ],
)
def test_few_bits_are_multiplied_as_stored(tiny, tmp_path, made, bits, size):
    """Dense matrices, narrowed ones, pairs and pivoted pairs, none of them dequantised."""
    path = tiny(*made.split("-", 1))[0]
    grasp.quantize(path, tmp_path / "few", bits=bits, group_size=size)
    expected = greedy(grasp.load(tmp_path / "few").model, PROMPTS, 12)
    with engine(tmp_path / "few", **AS_STORED) as llm:
        [found] = llm.apply_model(as_stored)
        assert found and {kind for kind, _ in found} == {f"torch.{'u' * (bits < 8)}int8"}
        for (tokens, logs), (ours, our_logs) in zip(
            expected, served(llm, PROMPTS, 12), strict=True
        ):
            assert ours == tokens and our_logs == pytest.approx(logs, abs=1e-3)


@pytest.mark.parametrize("options", [{}, AS_STORED], ids=["dequantised", "as stored"])
def test_activations_of_8_bits_are_served_as_they_are(tmp_path, tokenizer, options):
    """A checkpoint of the dial: dense matrices whose inputs vLLM does not round, pairs, narrowed
    matrices, an embedding in 8 bits that rounds none. What vLLM dequantises is in bfloat16 first,
    as the file is.
    """
    blocks = grasp.Calibration(
        torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(1)), "random"
    )
    model = narrowed(build_wide("llama"))
    size = f"{int(1.1 * Decoder(model).num_parameters())}B"
    dial = {"size": size, "bits": (16, 8), "activations": "int8", "rounds": 1}
    grasp.compress(model, tmp_path / "out", data=blocks, tokenizer=tokenizer, **dial)
    model, found = grasp.load(tmp_path / "out").model.float(), []
    for one in filter(is_quantized, model.modules()):
        found.append(one.scheme)
        one.scheme = "int8"
    assert set(found) == {"int8", "int8-dynamic"} and model.get_input_embeddings().scheme == "int8"
    with engine(tmp_path / "out", **options) as llm:
        assert bool(llm.apply_model(as_stored)[0]) == bool(options)
        for (tokens, logs), (ours, our_logs) in zip(
            greedy(model, PROMPTS, 12), served(llm, PROMPTS, 12), strict=True
        ):
            assert ours == tokens and our_logs == pytest.approx(logs, abs=5e-3)


ABLE = getattr(torch.cpu, "get_capabilities", dict)()


@pytest.mark.skipif(
    not (ABLE.get("avx512_f") or ABLE.get("amx_tile")),
    reason="vLLM's 8-bit KV cache on CPU needs a processor with AVX-512 or AMX",
)
@pytest.mark.parametrize("method", METHODS)
def test_the_kv_cache_in_8_bits(tiny, method):
    """vLLM's own flag, on our checkpoints: close to transformers, whose cache is not rounded."""
    path, _ = tiny("llama", method)
    model = grasp.load(path).model
    with engine(path, kv_cache_dtype="fp8") as llm:
        assert llm.llm_engine.vllm_config.cache_config.cache_dtype == "fp8"
        for prompt, (ours, our_logs) in zip(PROMPTS, served(llm, PROMPTS, 6), strict=True):
            with torch.no_grad():
                found = model(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
            logs = found.float().log_softmax(-1).gather(1, torch.tensor(ours)[:, None])[:, 0]
            assert our_logs == pytest.approx(logs.tolist(), abs=0.1)


@pytest.mark.parametrize("eager", [True, False])
def test_few_bits_in_bfloat16(tiny, tmp_path, eager):
    """As stored, also compiled: close to transformers in float32."""
    grasp.quantize(tiny("llama", "grasp")[0], tmp_path / "few", bits=4)
    model = grasp.load(tmp_path / "few").model
    options = {**AS_STORED, "dtype": "bfloat16", "enforce_eager": eager}
    with engine(tmp_path / "few", **options) as llm:
        assert llm.apply_model(as_stored)[0]
        for prompt, (ours, our_logs) in zip(PROMPTS, served(llm, PROMPTS, 6), strict=True):
            with torch.no_grad():
                found = model(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
            logs = found.float().log_softmax(-1).gather(1, torch.tensor(ours)[:, None])[:, 0]
            assert our_logs == pytest.approx(logs.tolist(), abs=0.1)


@pytest.mark.parametrize(
    ("family", "bits", "embeddings"),
    [("llama", 3, 4), ("gemma2", 6, 8), ("gpt2", 5, 6), ("qwen3", 8, 4), ("opt", 4, 8)],
)
def test_embeddings_in_few_bits_are_served(tiny, tmp_path, family, bits, embeddings):
    """Tied to the head and untied, of families that tell vLLM about their embedding or do not."""
    path, _ = tiny(family, "grasp")
    grasp.quantize(path, tmp_path / "few", bits=bits, embeddings=embeddings)
    expected = greedy(grasp.load(tmp_path / "few").model, PROMPTS, 12)
    with engine(tmp_path / "few") as llm:
        for (tokens, logs), (ours, our_logs) in zip(
            expected, served(llm, PROMPTS, 12), strict=True
        ):
            assert ours == tokens and our_logs == pytest.approx(logs, abs=1e-3)


def test_compiled_as_vllm_does_by_default(tiny):
    """Without `--enforce-eager` vLLM compiles the model, our products included."""
    path, expected = tiny("llama", "grasp-fisher")
    with engine(path, enforce_eager=False) as llm:
        for (tokens, logs), (ours, our_logs) in zip(
            expected, served(llm, PROMPTS, 12), strict=True
        ):
            assert ours == tokens and our_logs == pytest.approx(logs, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_bits(tiny, method):
    """bfloat16, whose kernels on CPU take whole blocks only: close to transformers in the same
    dtype.
    """
    path, _ = tiny("llama", method)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with engine(path, dtype="bfloat16") as llm:
        for prompt, (ours, our_logs) in zip(PROMPTS, served(llm, PROMPTS, 6), strict=True):
            with torch.no_grad():
                logs = (
                    model(torch.tensor([prompt + ours]))
                    .logits[0, len(prompt) - 1 : -1]
                    .float()
                    .log_softmax(-1)
                )
            assert our_logs == pytest.approx(
                logs.gather(1, torch.tensor(ours)[:, None])[:, 0].tolist(), abs=0.1
            )


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_two_devices_give_the_same_tokens(tiny, tmp_path, bits):
    """Tensor parallelism for real: two processes, every factor and every narrowed MLP split as
    docs/serving.md says; in few bits too, some of whose groups are cut.
    """
    path, expected = tiny("llama", *([] if bits is None else ["grasp"]))
    if bits is not None:
        grasp.quantize(path, tmp_path / "few", bits=bits)
        path = tmp_path / "few"
        expected = greedy(grasp.load(path).model, PROMPTS, 12)
    code = TWO.format(path=str(path), prompts=PROMPTS, more=AS_STORED)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=TWO_DEVICES,
        cwd=tmp_path,
    )
    found = re.search(r"FOUND (.*)", done.stdout)
    assert found, done.stderr[-3000:]
    assert json.loads(found[1]) == [tokens for tokens, _ in expected]


TWO_DEVICES = {
    **os.environ,
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}
TWO = """
import json
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM("{path}", dtype="float32", enforce_eager=True, max_model_len=64, \
tensor_parallel_size=2, **{more})
    how = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    out = llm.generate([dict(prompt_token_ids=ids) for ids in {prompts}], how, use_tqdm=False)
    print("FOUND", json.dumps([list(one.outputs[0].token_ids) for one in out]), flush=True)
"""


def test_lm_eval_runs_on_vllm(tiny, tmp_path):
    """`lm_eval --model vllm` as a user calls it: log-likelihoods of the answers are those of the
    model.
    """
    path, _ = tiny("llama", "grasp-fisher")
    rows = [
        {"question": f"{n} + {n} =", "choices": [str(2 * n), str(n), "no"], "answer": 0}
        for n in range(1, 5)
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
    model = f"pretrained={path},dtype=float32,enforce_eager=True,max_model_len=64"
    command = [
        str(Path(sys.executable).with_name("lm_eval")),
        "--model",
        "vllm",
        "--model_args",
        model,
        "--tasks",
        "sums",
    ]
    command += [
        "--include_path",
        str(tmp_path),
        "--batch_size",
        "auto",
        "--output_path",
        str(tmp_path / "found"),
        "--log_samples",
    ]
    surroundings = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    surroundings.pop("TQDM_DISABLE", None)  # vLLM divides by the time that its progress bar took
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=surroundings, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [samples] = (tmp_path / "found").rglob("samples_*.jsonl")
    loaded = grasp.load(path)
    for sample in map(json.loads, samples.read_text().splitlines()):
        for choice, (found, _) in zip(
            sample["doc"]["choices"], sample["filtered_resps"], strict=True
        ):
            context = loaded.tokenizer(sample["doc"]["question"]).input_ids
            ids = context + loaded.tokenizer(" " + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logs = loaded.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert (
                abs(
                    float(found)
                    - sum(float(logs[at - 1, ids[at]]) for at in range(len(context), len(ids)))
                )
                < 1e-3
            )


# --- compressed-tensors: vLLM reads these without grasp


def by_hand(monkeypatch):
    """vLLM's kernels on CPU for whole numbers need AVX-512, or have none for 8 bits alone. Here
    plain products take their place; what is read, and what is fused, is vLLM's all the same.
    """
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

    def of_words(self, layer, x, bias=None):
        words, scale, _ = self._get_weight_params(layer)
        bits = self.config.weight_type.size_bits
        pieces = [words >> place & 2**bits - 1 for place in range(0, 32, bits)]
        numbers = torch.stack(pieces, -1).flatten(1) - 2 ** (bits - 1)
        matrix = (numbers.unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1)
        return linear(x, matrix.to(x.dtype), bias)

    def of_bytes(self, layer, x, bias=None):
        numbers, scale = self._get_layer_params(layer)[:2]
        peak = x.abs().amax(-1, keepdim=True) / 127
        return linear((x / peak).round() * peak, numbers * scale, bias)

    takes_all = staticmethod(lambda config: (True, None))
    monkeypatch.setattr(CPUWNA16LinearKernel, "can_implement", takes_all)
    for kernel, product in (
        (CPUWNA16LinearKernel, of_words),
        (CPUInt8ScaledMMLinearKernel, of_bytes),
    ):
        monkeypatch.setattr(kernel, "process_weights_after_loading", lambda self, layer: None)
        monkeypatch.setattr(kernel, "apply_weights", product)


def test_a_compressed_tensors_export_is_read_as_it_is_meant(tmp_path, tokenizer, monkeypatch):
    """Every kind of number in one model with biases, and a dense layer: the text is that of the
    checkpoint in transformers.
    """
    tokenizer.save_pretrained(tmp_path / "ours")
    decoder, kinds = mixed(build_wide("qwen2"), tmp_path / "ours", embedding=False)
    assert len(kinds) == 4
    expected = greedy(decoder.model, PROMPTS, 12)
    path = grasp.export(tmp_path / "ours", tmp_path / "theirs", format="compressed-tensors").path
    monkeypatch.setenv("VLLM_PLUGINS", "")
    by_hand(monkeypatch)
    for (tokens, logs), (ours, our_logs) in zip(expected, served_alone(path), strict=True):
        assert ours == tokens and our_logs == pytest.approx(logs, abs=1e-3)


def without_a_kernel(scheme):
    """Why vLLM cannot multiply so on this processor; "" where it can."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    able = torch.cpu.get_capabilities()
    if scheme == "int4-symmetric" and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return "vLLM's cpu_gemm_wna16 needs AVX-512"
    if scheme == "int8-dynamic" and not (able.get("avx512_vnni") or able.get("avx_vnni")):
        return "without VNNI, oneDNN's products of 8 bits overflow their 16-bit sums"
    return ""


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int4-symmetric", {"bits": 4}), ("int8-dynamic", {"bits": 8, "activations": "int8"})],
)
def test_vllm_serves_a_compressed_tensors_export_with_its_own_kernel(
    scheme, options, tmp_path, tokenizer
):
    if reason := without_a_kernel(scheme):
        pytest.skip(reason)
    decoder = Decoder(build_wide("qwen2").bfloat16(), tokenizer)
    grasp.quantize(decoder, tmp_path / "ours", layout="compressed-tensors", **options)
    path = grasp.export(tmp_path / "ours", tmp_path / "theirs", format="compressed-tensors").path
    [(tokens, logs)] = greedy(AutoModelForCausalLM.from_pretrained(path), PROMPTS[:1], 4)
    with engine(path, dtype="bfloat16") as llm:
        [(ours, our_logs)] = served(llm, PROMPTS[:1], 4)
    assert ours[0] == tokens[0] and our_logs[0] == pytest.approx(logs[0], abs=0.1)


# --- real servers

REAL = {
    "grasp": {"method": "grasp", "num_layers": 9, "retain_ratio": 0.1, "num_samples": 4},
    "grasp-fisher": {"method": "grasp-fisher", "ratio": 0.2135, "num_samples": 8},
    "removed": {"method": "shortgpt", "num_layers": 9, "num_samples": 4},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """smollm2 compressed, by name in `REAL`, when first asked for."""
    folder = tmp_path_factory.mktemp("real")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            grasp.compress(
                "smollm2", folder / name, data="pydoc", seq_len=256, dtype="float32", **REAL[name]
            )
        return folder / name

    return make


@pytest.fixture(scope="module")
def prompts():
    """16 prompts of 24 tokens: pieces of an English text inside every Python."""
    text = (Path(pydoc_data.topics.__file__)).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(embedded_model())(text[20_000:60_000]).input_ids
    return [ids[500 * i : 500 * i + 24] for i in range(16)]


@contextlib.contextmanager
def server(path, *flags, **environment):
    """`vllm serve path` on a free port of loopback: its URL. Ended by its own process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(path),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += [
        "--served-model-name",
        "m",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        *flags,
    ]
    surroundings = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        **environment,
    }
    log = Path(path).with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=surroundings,
            start_new_session=True,
        )
        try:
            for _ in range(300):
                if process.poll() is not None:
                    pytest.fail(f"the server ended: {log.read_text()[-3000:]}")
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
                ):
                    break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def ask(url, ids, tokens):
    """One OpenAI-style completion request: (text, log-probabilities)."""
    body = {
        "model": "m",
        "prompt": ids,
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 1,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["tokens"]


@torch.no_grad()
def greedy_together(model, prompts, steps):
    """Tokens (prompt, step) and log-probabilities of all prompts, of one length, at once."""
    ids = torch.tensor(prompts)
    done = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=[],
    )
    tokens = done.sequences[:, ids.shape[1] :]
    logs = torch.stack(done.logits, dim=1).float().log_softmax(-1)  # prompt, step, vocabulary
    return tokens, logs.gather(-1, tokens[..., None])[..., 0]


@pytest.mark.parametrize("name", REAL)
def test_a_real_server_answers_as_transformers_does(name, made, prompts):
    """16 requests over HTTP at once, 64 tokens each, float32: the greedy text of transformers, and
    its log-probabilities.
    """
    out = made(name)
    loaded = grasp.load(out)
    tokens, logs = greedy_together(loaded.model, prompts, 64)
    texts = loaded.tokenizer.batch_decode(tokens)
    with server(out) as url, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda ids: ask(url, ids, 64), prompts))
    same = [answer[0] == text for answer, text in zip(answers, texts, strict=True)]
    assert sum(same) >= 15, [
        (a[0], t) for a, t, s in zip(answers, texts, same, strict=True) if not s
    ]
    for (_, served_logs, pieces), row, expected in zip(answers, tokens, logs, strict=True):
        agreed = 0
        while agreed < 64 and pieces[agreed] == loaded.tokenizer.decode(row[agreed]):
            agreed += 1
        assert (
            served_logs[:agreed] == pytest.approx(expected[:agreed].tolist(), abs=1e-3) and agreed
        )


@pytest.mark.parametrize("name", REAL)
def test_the_weights_in_memory_are_those_of_the_files(name, made, monkeypatch):
    """Bytes of all weights that vLLM holds, before its CPU kernels take copies in an order of their
    own: those of the files, within 5 %.
    """
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(
        utils,
        "dispatch_cpu_unquantized_gemm",
        lambda layer, remove_weight: setattr(layer, "cpu_linear", linear),
    )
    with engine(made(name)) as llm:
        [held] = llm.apply_model(all_bytes)
        assert held == pytest.approx(checkpoint_bytes(made(name)), rel=0.05)
        if name == "grasp-fisher":
            assert [o[0] for o in served(llm, PROMPTS, 4)]


def all_bytes(model) -> int:
    return sum({p.data_ptr(): p.nbytes for p in model.parameters() if p.numel()}.values())


def checkpoint_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


# --- what goes wrong


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of a tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny("llama", "grasp-fisher")[0], tmp_path / "copy"))


def rewrite(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def without(path, kind):
    """Rewrite the weights without the first tensor of that kind; a file that has none is an error,
    for else the damage would be none.
    """
    tensors = load_file(path / "model.safetensors")
    lost = next(name for name in sorted(tensors) if name.endswith(f".{kind}"))
    del tensors[lost]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def more_rank(config):
    structure = config["quantization_config"]["structure"]
    next(record for record in structure.values() if "rank" in record)["rank"] += 1


def fewer_heads(config):
    record = {"kind": "narrow", "rows": 8, "columns": 128, "scattered": True}
    config["quantization_config"]["structure"]["model.layers.0.self_attn.v_proj"] = record


def dense_again(path):
    """The tensors of a dense model under a config that names ranks."""
    tensors = {
        name: tensor.contiguous()
        for name, tensor in build_wide().state_dict().items()
        if not name.startswith("lm_head")
    }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def build_wide(family="llama"):
    row = FAMILY_ROWS[family]
    arguments = {key: WIDER.get(key, value) for key, value in row.arguments.items()}
    arguments |= AS_PUBLISHED.get(family, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILY_ROWS, family, replace(row, arguments=arguments))
        return build(family)


FAULTS = {
    "without factors": (
        lambda p: without(p, "weight_in"),
        r"_proj: the checkpoint lacks weight_in",
    ),
    "without places": (
        lambda p: without(p, "places"),
        r"_proj: the checkpoint lacks places and weight",
    ),
    "tampered rank": (lambda p: rewrite(p, more_rank), r"has the shape \(.*config\.json asks for"),
    "dense where the config says low rank": (
        dense_again,
        r"weight has the shape \(.*config\.json asks for",
    ),
    "fewer heads": (
        lambda p: rewrite(p, fewer_heads),
        r"v_proj' lost KV groups or value dimensions.*use transformers",
    ),
    "truncated file": (cut, "(?i)incomplete|invalid|header|covered"),
    "newer format": (
        lambda p: rewrite(p, lambda c: c["quantization_config"].update(version=99)),
        r"grasp format 99.*pip install -U grasp-llm",
    ),
    "unknown family": (
        lambda p: rewrite(
            p, lambda c: c.update(architectures=["NoSuchForCausalLM"], model_type="no_such")
        ),
        "(?i)no_such",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_have_one_clear_line(fault, copy):
    damage, says = FAULTS[fault]
    damage(copy)
    # vLLM wraps them in errors of several kinds
    with pytest.raises(Exception, match=says), engine(copy):
        pytest.fail("the engine started")


def test_a_number_of_devices_that_does_not_divide(tiny):
    with (
        pytest.raises(Exception, match=r"(?i)divisible by tensor parallel size"),
        engine(tiny("llama", "grasp")[0], tensor_parallel_size=3),
    ):
        pytest.fail("the engine started")


def test_without_the_plug_in_the_error_names_the_package(tiny, tmp_path):
    """VLLM_PLUGINS="" is vLLM as it is where grasp-llm is not installed."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(tiny("llama", "grasp")[0])]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_PLUGINS": ""},
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "Unknown quantization method: grasp-llm" in done.stdout + done.stderr


def test_an_older_vllm_says_what_it_lacks(monkeypatch):
    """Where a name that the plug-in needs is missing, our checkpoints stop with a line that says
    so, and other models still serve.
    """
    from vllm.model_executor.layers import quantization

    from grasp.serving import vllm_plugin

    # what an import that fails looks like
    monkeypatch.setitem(sys.modules, "grasp.serving.vllm_linear", None)
    monkeypatch.setattr(
        quantization, "QUANTIZATION_METHODS", list(quantization.QUANTIZATION_METHODS[:3])
    )
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    vllm_plugin.register()
    with pytest.raises(
        ValueError, match=r"cannot serve with this vLLM .*; it was tested with vLLM 0\.32"
    ):
        quantization.get_quantization_config("grasp-llm").from_config({"ranks": {}})
