"""Models of no known family, whose layers differ in kind: attention beside linear attention, state
spaces or convolutions, experts beside MLPs. What is understood becomes smaller, and the rest is
left alone and named.
"""

import logging

import pytest
import torch
import transformers as T
from conftest import _GATED, _IDS
from torch import nn

import grasp
from grasp.core.decoder import Decoder
from grasp.core.unlisted import read_off

COMMON = {**_IDS, **_GATED}
NO_HEAD_DIM = {key: value for key, value in COMMON.items() if key != "head_dim"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
IN_TURN = ["conv", "full_attention", "conv", "full_attention"]

HYBRIDS = {
    "qwen3_next": lambda: T.Qwen3NextConfig(
        **COMMON, **EXPERTS, **DELTA, shared_expert_intermediate_size=16
    ),
    "qwen3_5": lambda: T.Qwen3_5TextConfig(**COMMON, **DELTA),
    "qwen3_5_moe": lambda: T.Qwen3_5MoeTextConfig(
        **COMMON, **EXPERTS, **DELTA, shared_expert_intermediate_size=16
    ),
    "granite-4": lambda: T.GraniteMoeHybridConfig(
        **NO_HEAD_DIM,
        **MAMBA2,
        layer_types=["mamba", "attention", "mamba", "attention"],
        shared_intermediate_size=48,
        num_local_experts=0,
        mamba_expand=2,
    ),
    "granite-4-moe": lambda: T.GraniteMoeHybridConfig(
        **NO_HEAD_DIM,
        **MAMBA2,
        layer_types=["mamba", "attention", "mamba", "attention"],
        shared_intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        mamba_expand=2,
    ),
    "lfm2": lambda: T.Lfm2Config(
        **NO_HEAD_DIM, layer_types=IN_TURN, block_auto_adjust_ff_dim=False
    ),
    "lfm2_moe": lambda: T.Lfm2MoeConfig(
        **NO_HEAD_DIM, **EXPERTS, layer_types=IN_TURN, num_dense_layers=1
    ),
    "jamba": lambda: T.JambaConfig(
        **NO_HEAD_DIM,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "nemotron_h": lambda: T.NemotronHConfig(**COMMON),
    "falcon_h1": lambda: T.FalconH1Config(**COMMON, **MAMBA2, mamba_d_ssm=64),
    "recurrent_gemma": lambda: T.RecurrentGemmaConfig(
        **COMMON, lru_width=32, block_types=["recurrent", "attention"]
    ),
    "olmo_hybrid": lambda: T.OlmoHybridConfig(**NO_HEAD_DIM),
    "glm4_moe": lambda: T.Glm4MoeConfig(
        **{**COMMON, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
        first_k_dense_replace=1,
    ),
}
LEFT = {
    "jamba": ("mamba.dt_proj", "JambaMambaMixer"),
    "granite-4": ("mamba.out_proj",),
    "nemotron_h": ("NemotronHExperts", "mixer.out_proj"),
    "recurrent_gemma": ("RecurrentGemmaRglru",),
}
"""What is named as left alone: experts without a gate, what fused kernels read, recurrences."""
METHODS = {
    "grasp-fisher": {"ratio": 0.1},
    "grasp": {"layers": (1,), "retain_ratio": 0.3},
    "wanda": {"sparsity": "0.5"},
}
VARIED = ("qwen3_next", "granite-4", "lfm2")
"""Linear attention with experts, state spaces, convolutions: every method is tried on these."""
FIRST = ("qwen3_next", "grasp-fisher")
"""What `make test` takes."""


def made(name):
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(HYBRIDS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def text(blocks=48):
    ids = torch.randint(0, 256, (blocks, 24), generator=torch.Generator().manual_seed(1))
    return grasp.Calibration(ids, "random")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) == FIRST else pytest.mark.slow)
        for name in HYBRIDS
        for method in (METHODS if name in VARIED else ["grasp-fisher"])
    ],
)
def test_what_is_understood_becomes_smaller(name, method, tmp_path, tokenizer, caplog):
    """Loads again as the same model, and generates the same with a cache and without."""
    model = made(name)
    with caplog.at_level(logging.WARNING):
        result = grasp.compress(
            model,
            tmp_path / "out",
            method=method,
            data=text(),
            tokenizer=tokenizer,
            **METHODS[method],
        )
    for word in LEFT.get(name, ()):
        assert f"{word} (" in caplog.text.partition("left as it is: ")[2].splitlines()[0]
    assert result.manifest["edits"]
    loaded, ids = grasp.load(tmp_path / "out").model, text().ids[:2, :8]
    assert torch.allclose(loaded(ids).logits, result.model(ids).logits, atol=1e-4)
    kept, anew = (
        loaded.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(kept, anew)


@pytest.mark.parametrize("name", ["qwen3_next", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def test_experts_are_understood(name):
    decoder = Decoder(made(name))
    assert decoder.family.experts is not None
    assert decoder.family.experts.path == "mlp.experts"
    assert decoder.family.experts.router == "mlp.gate"


class Mixer(nn.Module):
    """Reads the weight of one linear for itself, as fused kernels do."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.called(x) @ self.read.weight


class Bare(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def test_a_linear_whose_weight_is_read_is_left_alone():
    family = read_off(Bare(Mixer(), Mixer()), "new")
    assert [path for _, path in family.matrices] == ["called"]


def test_layers_that_call_no_linear_are_not_understood():
    with pytest.raises(grasp.GraspError, match="its layers call no plain linear: Conv1d holds"):
        read_off(Bare(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)), "new")
