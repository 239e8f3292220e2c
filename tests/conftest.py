"""Tiny random models of every family, a byte-level tokenizer, and a calibration set: nothing is
downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# On tiny tensors threads only wait for each other: here, and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping

# With GRASP_CHECK_SHAPES (`make test-shapes`) the files that name shapes are checked as they run:
# it doubles the time.
SOURCE = Path(__file__).parents[1] / "src"
SHAPED = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in SOURCE.rglob("*.py")
    if "from jaxtyping" in path.read_text(encoding="utf-8")
]
if os.environ.get("GRASP_CHECK_SHAPES"):
    jaxtyping.install_import_hook(SHAPED, "beartype.beartype")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import grasp
from grasp.core.decoder import Decoder
from grasp.terminal import bars as terminal

torch.set_num_threads(1)

VOCAB, LAYERS, WIDTH = 260, 4, 32

_GATED = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_EXPERTS = {
    **_GATED,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": True,
}
"""Small ones: what is no expert must be enough to make the model a third smaller."""
_IDS = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


@dataclass(frozen=True)
class Row:
    """How to build one tiny model: its configuration class and arguments."""

    config: str
    arguments: dict
    tied: bool = False
    biased: bool = False
    experts: int = 0


FAMILY_ROWS: dict[str, Row] = {
    "llama": Row("LlamaConfig", {**_GATED, "tie_word_embeddings": True}, tied=True),
    "mistral": Row("MistralConfig", {**_GATED, "sliding_window": 8}),
    "qwen2": Row(
        "Qwen2Config",
        {
            **{k: v for k, v in _GATED.items() if k != "head_dim"},
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
        },
        biased=True,
    ),
    "qwen3": Row("Qwen3Config", _GATED),
    "gemma": Row("GemmaConfig", {**_GATED}, tied=True),
    "gemma2": Row(
        "Gemma2Config", {**_GATED, "sliding_window": 8, "query_pre_attn_scalar": 8}, tied=True
    ),
    "gemma3_text": Row(
        "Gemma3TextConfig",
        {
            **_GATED,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "sliding_attention",
            ],
        },
        tied=True,
    ),
    "phi3": Row(
        "Phi3Config",
        {
            **{k: v for k, v in _GATED.items() if k != "head_dim"},
            "original_max_position_embeddings": 128,
        },
    ),
    "olmo2": Row("Olmo2Config", _GATED),
    "granite": Row(
        "GraniteConfig",
        {
            **_GATED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "gpt_neox": Row(
        "GPTNeoXConfig",
        {
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
        biased=True,
    ),
    "gpt2": Row(
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 128},
        tied=True,
        biased=True,
    ),
    "opt": Row(
        "OPTConfig",
        {
            "hidden_size": WIDTH,
            "ffn_dim": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": WIDTH,
        },
        tied=True,
        biased=True,
    ),
    "mixtral": Row(
        "MixtralConfig",
        {**_GATED, "intermediate_size": 8, "num_local_experts": 4, "tie_word_embeddings": True},
        tied=True,
        experts=4,
    ),
    "qwen2_moe": Row(
        "Qwen2MoeConfig",
        {
            **{k: v for k, v in _EXPERTS.items() if k != "head_dim"},
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
        tied=True,
        biased=True,
        experts=4,
    ),
    "qwen3_moe": Row("Qwen3MoeConfig", {**_EXPERTS, "norm_topk_prob": True}, tied=True, experts=4),
    "olmoe": Row(
        "OlmoeConfig",
        {
            **{k: v for k, v in _EXPERTS.items() if k not in ("head_dim", "moe_intermediate_size")},
            "intermediate_size": 8,
        },
        tied=True,
        experts=4,
    ),
    "gpt_oss": Row(
        "GptOssConfig",
        {
            **_GATED,
            "intermediate_size": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4,
            },
        },
        tied=True,
        biased=True,
        experts=4,
    ),
    "deepseek_v3": Row(
        "DeepseekV3Config",
        {
            **{k: v for k, v in _GATED.items() if k not in ("head_dim", "num_key_value_heads")},
            "moe_intermediate_size": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "tie_word_embeddings": True,
        },
        tied=True,
        experts=8,
    ),
}
MANIFEST = {
    "model": {"source": "tiny", "family": "Llama", "num_layers": LAYERS, "dtype": "float32"},
    "method": {"name": "grasp", "paper": ""},
    "parameters": {"before": 2, "after": 1, "ratio": 0.5},
    "edits": [],
    "versions": {},
}
"""The least that a manifest holds."""
WITH_EXPERTS = [name for name, row in FAMILY_ROWS.items() if row.experts]
WITHOUT_EXPERTS = [name for name, row in FAMILY_ROWS.items() if not row.experts]
OF_EXPERTS = ("mixtral", "deepseek_v3")
"""Two of them that differ most."""
DIFFERENT = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "mixtral")
"""Families that differ most in matrices, norms, biases and shortcuts: those of `make test`."""
BIASED = [name for name in WITHOUT_EXPERTS if FAMILY_ROWS[name].biased]


def quick(names: Iterable[str]) -> list[Any]:
    """Parameters of a test: these families, of which those much like others are marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in DIFFERENT else slow) for name in names]


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changed: object
) -> PreTrainedModel:
    """A tiny random model of the real Hugging Face class. Biases and norms are random too, or a
    lost one would not show. `changed`: entries of its config.
    """
    row = FAMILY_ROWS[name]
    config = getattr(transformers, row.config)(**_IDS, **{**row.arguments, **changed})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.05)
    return model.eval()


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine: what a command says is compared line by line."""
    monkeypatch.setattr(terminal, "BEAT", 3600.0)


@pytest.fixture(params=quick(FAMILY_ROWS))
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return request.param


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", "<pad>"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    return made


@pytest.fixture
def calibration() -> grasp.Calibration:
    """Six blocks of 20 random tokens."""
    ids = torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(1))
    return grasp.Calibration(ids, "random")


@pytest.fixture(scope="session")
def layer_runs() -> Callable[..., list[int]]:
    """Model -> a list that grows by a layer's index whenever that layer is run."""

    def count(model: PreTrainedModel | Decoder) -> list[int]:
        decoder, seen = model if isinstance(model, Decoder) else Decoder(model), list[int]()
        for layer in decoder.layers():
            norm = layer.module.get_submodule(decoder.family.norms.mlp)
            norm.register_forward_pre_hook(lambda *_, index=layer.index: seen.append(index))
        return seen

    return count


@pytest.fixture(scope="session")
def decoder() -> Callable[..., Decoder]:
    """`decoder(name)`: a fresh `Decoder` of a family."""
    return lambda name, **options: Decoder(build(name, **options), source=name)


@pytest.fixture(scope="session")
def model_directory(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> str:
    """A saved tiny Llama with its tokenizer, as a user would have it."""
    path = tmp_path_factory.mktemp("model") / "tiny-llama"
    build("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plain text of a few thousand bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "".join(f"The {n} quick brown foxes jump over {n * n} lazy dogs.\n" for n in range(80)),
        encoding="utf-8",
    )
    return str(path)
