"""The proof: what is saved is loaded again and must be the model in memory; what could not be saved
is said before the work.
"""

import pytest
import torch
import transformers
from conftest import _GATED, _IDS, FAMILY_ROWS, MANIFEST, build
from safetensors.torch import load_file, save_file

import grasp
from grasp.core.checkpoint import save
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, droppable, ordinary
from grasp.core.runner import Resident


def model_of(config: str, **more: object):
    """A tiny random model of a family that is not in the table."""
    made = getattr(transformers, config)(**{**_GATED, **_IDS, **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_layers_built_from_their_index_are_not_dropped(tmp_path, calibration, monkeypatch):
    """DiffLlama's lambda_init follows from the index, and no config says it: refused before the
    work; the last layer may go.
    """
    monkeypatch.setattr(Resident, "sweep", lambda *_: pytest.fail("the work has begun"))
    for fields in ({"layers": (1,)}, {"layers": (0, 3)}, {"num_layers": 1}):
        with pytest.raises(
            grasp.GraspError, match=r"'diffllama' model cannot be dropped: .*lambda_init' is 0\."
        ):
            grasp.compress(
                model_of("DiffLlamaConfig"),
                tmp_path / "out",
                method="shortgpt",
                data=calibration,
                **fields,
            )
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    result = grasp.compress(
        model_of("DiffLlamaConfig"),
        tmp_path / "out",
        method="shortgpt",
        data=calibration,
        layers=(3,),
    )
    assert len(result.decoder.stack) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_that_loads_as_another_model_is_not_written(
    tmp_path, calibration, monkeypatch, dtype
):
    monkeypatch.setattr(droppable, "check_droppable", lambda *_: None)
    monkeypatch.setattr("grasp.methods.shortgpt.check_droppable", lambda *_: None)
    model = model_of("DiffLlamaConfig").to(dtype)
    with pytest.raises(
        grasp.GraspError,
        match=r"OUT .*: the checkpoint, as it loads again, is not the model: .*lambda_init",
    ):
        grasp.compress(model, tmp_path / "out", method="shortgpt", data=calibration, layers=(1,))
    assert list(tmp_path.iterdir()) == []


DROPPED = {
    "qwen2": FAMILY_ROWS["qwen2"].config,
    "gemma2": FAMILY_ROWS["gemma2"].config,
    "gemma3_text": FAMILY_ROWS["gemma3_text"].config,
    "smollm3": "SmolLM3Config",
    "cohere2": "Cohere2Config",
    "bart": "BartConfig",
}
MORE = {
    "smollm3": {"no_rope_layers": [1, 0, 1, 1], "pad_token_id": 258},
    "cohere2": {"sliding_window": 8, "layer_types": ["full_attention", *["sliding_attention"] * 3]},
    "bart": {
        "decoder_layers": 4,
        "encoder_layers": 4,
        "d_model": 32,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
    },
}


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("layer", [0, 1])
def test_what_runs_along_the_layers_is_cut_with_them(name, layer, tmp_path):
    model = build(name) if name in FAMILY_ROWS else model_of(DROPPED[name], **MORE[name])
    decoder = Decoder(model)
    Drop(layer).apply(decoder)
    save(decoder, tmp_path / "out", MANIFEST, "")
    assert len(grasp.load(tmp_path / "out").model.get_submodule(decoder.family.layers)) == 3


def spoil(part: str, folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[part] = tensors[part].clone()
    tensors[part][-1] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("part", ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_was_written_wrongly_is_found(part, tmp_path, monkeypatch):
    decoder = Decoder(build("qwen3"))
    write = decoder.model.save_pretrained
    monkeypatch.setattr(
        decoder.model,
        "save_pretrained",
        lambda folder, **options: (write(folder, **options), spoil(part, folder)),
    )
    with pytest.raises(
        grasp.GraspError, match=f"is not the model: the weight '{part}' is another one"
    ):
        save(decoder, tmp_path / "out", MANIFEST, "")
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_no_file_holds_is_found(tmp_path):
    """Longer than the tokens that are tried, so the logits cannot show it."""
    decoder = Decoder(build("gemma2"))
    decoder.stack[0].self_attn.sliding_window = 64
    with pytest.raises(grasp.GraspError, match=r"'layers.0.self_attn.sliding_window' is 8, not 64"):
        save(decoder, tmp_path / "out", MANIFEST, "")


class Louder(transformers.LlamaForCausalLM):
    """A class that no checkpoint brings back."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 1.01
        return found


def test_a_class_that_does_not_come_back_is_found_by_its_logits(tmp_path):
    decoder = Decoder(Louder(build("llama").config).eval())
    with pytest.raises(grasp.GraspError, match="is not the model: its logits differ by"):
        save(decoder, tmp_path / "out", MANIFEST, "")
    assert list(tmp_path.iterdir()) == []


def test_the_dense_export_is_proved(tmp_path, model_directory, calibration, monkeypatch):
    from grasp.serving import dense

    place = tmp_path / "small"
    grasp.compress(model_directory, place, method="grasp", layers=(1,), data=calibration)
    assert grasp.export(place, tmp_path / "dense", format="dense").pairs > 0

    def wrong(decoder):
        ordinary.multiply_out(decoder)
        decoder.stack[1].mlp.up_proj.weight *= 0.9

    monkeypatch.setattr(dense, "multiply_out", wrong)
    with pytest.raises(grasp.GraspError, match="is not the model: its logits differ by"):
        grasp.export(place, tmp_path / "wrong", format="dense")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(dtype, tmp_path, calibration):
    """A model cast in memory rounds its buffers too; its attention may run by another kernel than
    that of the model that loads.
    """
    model = build("llama").to(dtype)
    model.set_attn_implementation("eager")
    grasp.compress(model, tmp_path / "out", method="grasp", layers=(1,), data=calibration)
    assert (tmp_path / "out" / "grasp.json").is_file()


def zero_temperature(model, tokenizer):
    model.generation_config.temperature = 0.0


def sampling_without_sampling(model, tokenizer):
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.7


def no_json(model, tokenizer):
    model.config.extra = {1, 2}


def unknown_type(model, tokenizer):
    model.config.__class__ = type("MineConfig", (type(model.config),), {"model_type": "mine"})


def stubborn(model, tokenizer):
    def refuse(*_, **__):
        raise NotImplementedError("no vocabulary to save")

    tokenizer.save_pretrained = refuse


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (
            zero_temperature,
            (
                "the generation config could not be saved: .*temperature.*; change"
                " model.generation_config"
            ),
        ),
        (sampling_without_sampling, "the generation config could not be saved: .*temperature"),
        (no_json, "the config could not be saved: .*set.*; change model.config"),
        (unknown_type, "the config could not be saved: .*mine"),
        (stubborn, "the tokenizer could not be saved: no vocabulary to save; give another one"),
    ],
)
def test_what_cannot_be_saved_is_said_before_the_work(
    spoilt, said, tmp_path, tokenizer, calibration, monkeypatch
):
    import copy

    model, mine = build("llama"), copy.deepcopy(tokenizer)
    spoilt(model, mine)
    monkeypatch.setattr(Resident, "sweep", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(grasp.GraspError, match=said) as error:
        grasp.compress(
            model, tmp_path / "out", tokenizer=mine, method="grasp", layers=(1,), data=calibration
        )
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
