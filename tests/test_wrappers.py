"""Multimodal models: the text decoder inside is compressed, the rest kept, and the checkpoint loads
as what it was.
"""

import shutil

import pytest
import torch
import transformers as T
from conftest import _GATED, _IDS
from safetensors.torch import load_file
from test_cli import SMALL, command

import grasp
from grasp.core.decoder import Decoder
from grasp.errors import ModelError

TEXT = {**_GATED, **_IDS}
NO_HEAD_DIM = {key: value for key, value in TEXT.items() if key != "head_dim"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
AUDIO = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_mel_bins": 8,
    "max_source_positions": 16,
}
ROPE = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
}
QWEN = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "fullatt_block_indexes": [1],
}
IDS = {
    "image_token_id": 255,
    "video_token_id": 254,
    "vision_start_token_id": 253,
    "vision_end_token_id": 252,
}

WRAPPERS = {
    "gemma3": (
        "model.language_model.layers",
        lambda: T.Gemma3Config(
            text_config={**TEXT, "query_pre_attn_scalar": 8},
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_id=255,
        ),
    ),
    "llava": (
        "model.language_model.layers",
        lambda: T.LlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "model_type": "clip_vision_model"},
            image_token_index=255,
        ),
    ),
    "mistral3": (
        "model.language_model.layers",
        lambda: T.Mistral3Config(
            text_config={**TEXT, "model_type": "mistral"},
            vision_config={**VISION, "model_type": "pixtral", "head_dim": 8},
            image_token_index=255,
        ),
    ),
    "paligemma": (
        "model.language_model.layers",
        lambda: T.PaliGemmaConfig(
            text_config={**TEXT, "model_type": "gemma"},
            vision_config={**VISION, "model_type": "siglip_vision_model"},
            image_token_index=255,
            projection_dim=32,
        ),
    ),
    "idefics3": (
        "model.text_model.layers",
        lambda: T.Idefics3Config(
            text_config={**TEXT, "model_type": "llama"}, vision_config=VISION, image_token_id=255
        ),
    ),
    "qwen2.5-vl": (
        "model.language_model.layers",
        lambda: T.Qwen2_5_VLConfig(text_config={**NO_HEAD_DIM, **ROPE}, vision_config=QWEN, **IDS),
    ),
    "llama4": (
        "language_model.model.layers",
        lambda: T.Llama4Config(
            text_config={
                **TEXT,
                "intermediate_size_mlp": 48,
                "num_local_experts": 2,
                "moe_layers": [],
            },
            vision_config={
                **VISION,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            },
            image_token_index=255,
        ),
    ),
    "voxtral": (
        "model.language_model.layers",
        lambda: T.VoxtralConfig(
            text_config={**TEXT, "model_type": "llama"}, audio_config=AUDIO, audio_token_id=255
        ),
    ),
}


def auto_of(name: str):
    return T.AutoModelForMultimodalLM if name == "voxtral" else T.AutoModelForImageTextToText


def saved(name: str, path) -> torch.nn.Module:
    """A tiny random wrapper, in memory and at `path`."""
    torch.manual_seed(0)
    model = auto_of(name).from_config(WRAPPERS[name][1]()).eval()
    model.save_pretrained(path)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if n % 3 == 0 else pytest.mark.slow)
        for n, name in enumerate(WRAPPERS)
    ],
)
def test_the_text_decoder_inside_is_compressed(name, tmp_path, calibration):
    """Equal logits by the wrapper's own auto class, again after it is saved again; text is written;
    all else is as it was.
    """
    before = saved(name, tmp_path / "model").state_dict()
    made = grasp.compress(tmp_path / "model", tmp_path / "out", ratio=0.1, data=calibration)
    assert made.decoder.family.layers == WRAPPERS[name][0]
    (note,) = (one for one in made.manifest["notes"] if "only the text decoder" in one)
    inside = note.partition("decoder, ")[2].partition(",")[0]
    assert WRAPPERS[name][0].startswith(f"{inside}.")
    assert "% of all numbers)" in note and "lm_head" not in note
    want = logits(made.model, calibration.ids)
    loaded = auto_of(name).from_pretrained(tmp_path / "out")
    assert type(loaded).__name__.endswith("ForConditionalGeneration") and torch.equal(
        logits(loaded, calibration.ids), want
    )
    loaded.save_pretrained(tmp_path / "again")
    again = grasp.load(tmp_path / "again").model
    assert type(again).__name__ == type(loaded).__name__ and torch.equal(
        logits(again, calibration.ids), want
    )
    assert (
        again.generate(input_ids=calibration.ids[:, :5], max_new_tokens=3, do_sample=False).shape[1]
        > 5
    )
    after, inside = again.state_dict(), WRAPPERS[name][0]
    kept = [key for key in before if not key.startswith(inside)]
    assert len(kept) > 20 and all(torch.equal(after[key], before[key]) for key in kept)
    assert any(key.endswith("weight_in") for key in after) and all(
        key.startswith(inside) for key in after if key.endswith("weight_in")
    )


def test_layers_of_a_text_decoder_inside_are_dropped(tmp_path, calibration):
    saved("gemma3", tmp_path / "model")
    made = grasp.compress(
        tmp_path / "model", tmp_path / "out", method="shortgpt", num_layers=1, data=calibration
    )
    loaded = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert (
        loaded.config.text_config.num_hidden_layers == 3
        and loaded.config.vision_config.num_hidden_layers == 2
    )
    assert torch.equal(logits(loaded, calibration.ids), logits(made.model, calibration.ids))


def test_on_the_command_line_with_what_reads_pictures_taken_along(tmp_path, tokenizer, text_file):
    saved("gemma3", tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "Gemma3ImageProcessor"}'
    )
    made = command(
        "compress",
        tmp_path / "model",
        tmp_path / "out",
        "--ratio",
        "0.1",
        "--data",
        text_file,
        *SMALL,
    )
    assert made.status == 0, made.err
    assert (
        tmp_path / "out" / "preprocessor_config.json"
    ).read_text() == '{"image_processor_type": "Gemma3ImageProcessor"}'
    for words in (
        ("eval", tmp_path / "out", "--ppl", text_file, "--seq-len", "32"),
        ("inspect", tmp_path / "model", "--data", text_file, "-o", tmp_path / "look.png", *SMALL),
    ):
        done = command(*words)
        assert done.status == 0, done.err
    dry = command(
        "compress",
        tmp_path / "model",
        tmp_path / "other",
        "--ratio",
        "0.1",
        "--data",
        text_file,
        *SMALL,
        "--dry-run",
    )
    assert dry.status == 0, dry.err


def test_weights_under_the_names_of_earlier_releases(tmp_path, calibration):
    """Gemma 3 as it lies on the hub: `language_model.model.layers`, which transformers renames as
    it loads, and back as it saves.
    """
    model = saved("gemma3", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    names = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }

    def old(key: str) -> str:
        return next(
            (value + key.removeprefix(new) for new, value in names.items() if key.startswith(new)),
            key,
        )

    from safetensors.torch import save_file

    save_file(
        {old(key): value for key, value in weights.items()},
        tmp_path / "model" / "model.safetensors",
        {"format": "pt"},
    )
    assert torch.equal(
        logits(grasp.load(tmp_path / "model").model, calibration.ids),
        logits(model, calibration.ids),
    )
    made = grasp.compress(tmp_path / "model", tmp_path / "out", ratio=0.1, data=calibration)
    for options in ({}, {"trust_remote_code": True}):
        loaded = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", **options)
        assert torch.equal(logits(loaded, calibration.ids), logits(made.model, calibration.ids))
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(
            logits(grasp.load(tmp_path / "again").model, calibration.ids),
            logits(made.model, calibration.ids),
        )
        shutil.rmtree(tmp_path / "again")


def test_a_wrapper_that_cannot_do_without_a_picture_says_what_to_load(tmp_path, calibration):
    text = {
        "model_type": "opt",
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        **_IDS,
    }
    former = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "encoder_hidden_size": 16,
    }
    model = T.Blip2ForConditionalGeneration(
        T.Blip2Config(text_config=text, vision_config=VISION, qformer_config=former)
    )
    with pytest.raises(
        ModelError, match=r"does not read text alone \(it needs pixel_values\).*OPTForCausalLM"
    ):
        grasp.compress(model, ratio=0.1, data=calibration)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("LlamaModel", "no language-model head"),
        ("LlamaForSequenceClassification", "AutoModelForCausalLM"),
    ],
)
def test_a_model_without_a_language_model_head(name, said):
    with pytest.raises(ModelError, match=said):
        Decoder(getattr(T, name)(T.LlamaConfig(**TEXT)))
