"""The family table: every row finds its matrices; unknown models work by inspection or say why."""

import copy
import logging

import pytest
import torch
import transformers
from closeness import close
from conftest import _GATED, _IDS, FAMILY_ROWS, LAYERS, build
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

import grasp
from grasp.core.decoder import Decoder
from grasp.core.experts import mixture, mixtures
from grasp.core.families import FAMILIES, select

COUNT = {
    "phi3": 4,
    "gpt_neox": 4,
    "gpt2": 4,
    "opt": 6,
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "gpt_oss"), 4),
    "deepseek_v3": 8,
}
"""Matrices of a layer, where they are not seven."""
MLA = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
"""Of multi-head latent attention."""


def test_every_row_is_tested():
    assert {kind for row in FAMILIES for kind in row.model_types} == set(FAMILY_ROWS)


def test_a_row_finds_every_matrix_of_a_layer(family):
    """Nothing of a layer's parameters is left out but norms and biases, experts and what routes."""
    model = Decoder(build(family))
    for layer in model.layers():
        assert len(layer.linears) == COUNT.get(family, 7)
        found = sum(linear.weight.numel() for linear in layer.linears.values())
        routed = mixture(model, layer.index)
        assert (routed is not None) == hasattr(getattr(layer.module, "mlp", None), "experts")
        if routed is not None:
            assert routed.count == FAMILY_ROWS[family].experts and routed.per_token == 2
            found += sum(p.numel() for p in routed.experts.parameters() if p.dim() > 2)
            found += routed.router.weight.numel()
            found += 32 * hasattr(layer.module.mlp, "shared_expert_gate")
        assert found == sum(
            p.numel()
            for name, p in layer.module.named_parameters()
            if p.dim() > 1 and not name.endswith("_bias")
        )


def test_weights_are_seen_as_out_by_in(family):
    """However a class stores its weight: the module computes x W' + b with the W that is seen."""
    model = Decoder(build(family))
    for linear in model.linears(1):
        x = torch.randn(3, linear.shape[1])
        bias = 0 if linear.module.bias is None else linear.module.bias
        assert torch.allclose(linear.module(x), x @ linear.weight.T + bias, atol=1e-5), linear.path


@pytest.mark.parametrize(
    ("family_name", "projections", "names"),
    [
        (
            "llama",
            ("all",),
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("llama", ("mlp",), {"gate_proj", "up_proj", "down_proj"}),
        ("llama", ("q", "down_proj"), {"q_proj", "down_proj"}),
        ("phi3", ("attention",), {"qkv_proj", "o_proj"}),
        ("phi3", ("q", "k", "v"), {"qkv_proj"}),
        ("gpt2", ("mlp",), {"c_fc", "c_proj"}),
        ("qwen2_moe", ("mlp",), {"gate_proj", "up_proj", "down_proj"}),
        ("qwen2_moe", ("up_proj", "k"), {"up_proj", "k_proj"}),
        ("deepseek_v3", ("attention",), MLA),
        ("deepseek_v3", ("kv_b_proj", "mlp"), {"kv_b_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_projections(family_name, projections, names):
    model = Decoder(build(family_name))
    assert {linear.path.rsplit(".", 1)[-1] for linear in model.linears(0, projections)} == names


@pytest.mark.parametrize(
    ("projections", "message"),
    [(("q",), "q.k.v in one matrix"), (("gate_up",), "did you mean"), ((), "no matrix")],
)
def test_projections_that_cannot_be(projections, message):
    with pytest.raises(grasp.GraspError, match=message):
        select(Decoder(build("phi3")).family, projections)


def test_only_the_chosen_projections_are_replaced(calibration):
    result = grasp.compress(
        build("llama"), data=calibration, num_layers=2, projections="mlp", method="grasp"
    )
    assert {edit["path"].split(".")[3] for edit in result.manifest["edits"]} == {"mlp"} and len(
        result.manifest["edits"]
    ) == 6


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ("CohereConfig", {**{k: v for k, v in _GATED.items() if k != "head_dim"}}),
        (
            "GPTJConfig",
            {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
        ),
        ("StableLmConfig", {k: v for k, v in _GATED.items() if k != "head_dim"}),
    ],
)
def test_an_unknown_family_of_plain_linears_works_by_inspection(
    config, arguments, calibration, caplog, tmp_path
):
    """With a notice; and the whole contract holds: size, reload, equal logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**_IDS, **arguments)
    ).eval()
    with caplog.at_level(logging.WARNING):
        result = grasp.compress(
            model,
            tmp_path / "out",
            num_layers=2,
            retain_ratio=0.3,
            data=calibration,
            method="grasp",
        )
    assert "by inspection" in caplog.text
    assert len(result.manifest["edits"]) == 2 * len(Decoder(model).family.matrices) >= 12
    with torch.no_grad():
        again = grasp.load(tmp_path / "out").model(input_ids=calibration.ids).logits
        assert close(again, result.model(input_ids=calibration.ids).logits)


def test_a_model_may_lack_what_stands_beside_experts():
    """Qwen3-MoE has dense MLPs where the config says so, DeepSeek projects queries in one or two
    steps; what all of them have must be there.
    """
    config = transformers.Qwen3MoeConfig(
        **{**_IDS, **FAMILY_ROWS["qwen3_moe"].arguments, "mlp_only_layers": [0, 2]}
    )
    decoder = Decoder(transformers.Qwen3MoeForCausalLM(config))
    assert [len(layer.linears) for layer in decoder.layers()] == [7, 4, 7, 4]
    assert [one.layer for one in mixtures(decoder)] == [1, 3]
    straight = {**FAMILY_ROWS["deepseek_v3"].arguments, "q_lora_rank": None}
    config = transformers.DeepseekV3Config(**_IDS, **straight)
    decoder = Decoder(transformers.DeepseekV3ForCausalLM(config))
    assert "self_attn.q_proj" in decoder.layer(0).linears
    for layer in decoder.stack:
        layer.mlp = nn.Identity()
    del decoder.__dict__["family"]
    with pytest.raises(grasp.GraspError, match=r"no layer .* has 'mlp.experts'"):
        _ = decoder.family


def test_experts_that_stay_are_named(calibration):
    """As a note of the run, with their share: 3 layers of 4 experts, 3 x 8 x 32 numbers each and a
    row of the router.
    """
    model = build("qwen2_moe")
    share = 3 * 4 * (3 * 8 * 32 + 32) / model.num_parameters()
    result = grasp.compress(model, data=calibration, ratio=0.1, method="magnitude-svd")
    [said] = [note for note in result.manifest["notes"] if "experts" in note]
    assert said.startswith(f"the experts and routers of 3 layers ({share:.0%} of all numbers")
    assert "'model.layers.0.mlp.experts') stay as they are" in said
    dense = grasp.compress(build("llama"), data=calibration, ratio=0.1, method="magnitude-svd")
    assert not any("experts" in note for note in dense.manifest["notes"])


def test_a_model_that_is_not_laid_out_as_its_family(calibration):
    """No layer has one of the row's matrices."""
    model = build("llama")
    for layer in model.model.layers:
        del layer.mlp.up_proj
    with pytest.raises(grasp.GraspError, match=r"not laid out as Llama: no layer .*'mlp.up_proj'"):
        grasp.compress(model, num_layers=1, data=calibration, method="grasp")


def test_layers_that_text_alone_does_not_run_are_refused():
    """Mllama's cross-attention layers are skipped where there is no picture: nothing to measure."""
    config = MllamaTextConfig(
        **_IDS,
        **{key: value for key, value in _GATED.items() if key != "head_dim"},
        cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with pytest.raises(grasp.GraspError, match=r"layer 1 has 'cross_attn\.\w+', which text alone"):
        _ = Decoder(MllamaForCausalLM(config)).family


class NoAttention(nn.Module):
    """What may stand where a layer's attention was taken out."""

    def forward(self, hidden_states, **_):
        return torch.zeros_like(hidden_states), None


def test_a_layer_may_lack_a_matrix(calibration, caplog):
    """The others' are found, swept and replaced, and its own, as far as it has them."""
    model = build("llama")
    model.model.layers[0].self_attn = NoAttention()
    decoder = Decoder(model)
    mlp = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert set(decoder.layer(0).linears) == mlp and len(decoder.layer(1).linears) == 7
    assert {linear.name for linear in decoder.linears(0)} == mlp
    assert decoder.linears(0, ("attention",)) == []
    options = {"method": "grasp", "data": calibration, "retain_ratio": 0.3}
    result = grasp.compress(copy.deepcopy(model), layers=[0, 2], **options)
    assert "pairs already" not in caplog.text
    assert len(result.manifest["edits"]) == 3 + 7


def test_a_matrix_is_what_holds_a_weight_of_two_dimensions():
    model = build("llama")
    model.model.layers[0].self_attn.q_proj = nn.Identity()
    assert "self_attn.q_proj" not in Decoder(model).layer(0).linears


def hybrid() -> transformers.PreTrainedModel:
    """Qwen3-Next without experts: three layers of linear attention, one of full attention."""
    config = transformers.Qwen3NextConfig(
        **{**_GATED, **_IDS},
        num_experts=0,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    torch.manual_seed(0)
    return transformers.Qwen3NextForCausalLM(config).eval()


def test_an_unknown_family_of_layers_of_two_kinds_works_by_inspection(calibration, tmp_path):
    """Each layer has the plain linears it has: three of linear attention, four of full."""
    model = hybrid()
    counts = [len(layer.linears) for layer in Decoder(model).layers()]
    assert counts == [6, 6, 6, 7]
    result = grasp.compress(
        model, tmp_path / "out", layers=[2, 3], retain_ratio=0.3, data=calibration, method="grasp"
    )
    assert len(result.manifest["edits"]) == 6 + 7
    with torch.no_grad():
        again = grasp.load(tmp_path / "out").model(input_ids=calibration.ids).logits
        assert close(again, result.model(input_ids=calibration.ids).logits)


def test_what_is_no_plain_linear_of_an_unknown_family_is_left_alone_and_named(caplog):
    """The fourth layer keeps experts in one tensor, in a way that is not known."""
    model = hybrid()
    model.model.layers[3].mlp.experts = nn.ParameterList([torch.randn(4, 48, 32)])
    assert Decoder(model).family.experts is None
    assert "left as it is: ParameterList (16% of the layers' numbers)" in caplog.text


def test_layers_that_scale_by_their_index_are_not_dropped(calibration):
    """GPT-2 variants divide attention by the layer's number: renumbering would change what the
    others compute.
    """
    config = transformers.GPT2Config(
        **_IDS, **FAMILY_ROWS["gpt2"].arguments, scale_attn_by_inverse_layer_idx=True
    )
    with pytest.raises(grasp.GraspError, match="scale_attn_by_inverse_layer_idx"):
        grasp.compress(
            transformers.GPT2LMHeadModel(config), method="shortgpt", num_layers=1, data=calibration
        )
