"""Closeness to the dense model against a plain float64 computation; greedy text and its repetition;
notes on leakage.
"""

import json
from pathlib import Path

import pytest
import torch

import grasp
from grasp.core.decoder import Decoder
from grasp.core.edits import Drop
from grasp.data.blocks import cut
from grasp.data.stream import Stream
from grasp.errors import NumericsError, RecipeError
from grasp.evaluation import fidelity as comparing
from grasp.evaluation.fidelity import fidelity
from grasp.evaluation.generation import agreement, continuations, greedy, repetition


@pytest.fixture
def blocks():
    """Five blocks of 20 random tokens."""
    return cut(
        Stream(torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(3))),
        name="text",
        seq_len=20,
    )


@pytest.fixture
def pair(decoder):
    """A model without its second layer, and the dense one."""
    small = decoder("llama")
    Drop(1).apply(small)
    return small, decoder("llama")


@pytest.mark.parametrize("chunk", [7, 256])
def test_equals_a_plain_computation(chunk, pair, blocks, monkeypatch):
    monkeypatch.setattr(comparing, "CHUNK", chunk)
    found = fidelity(*pair, blocks)
    divergence, agree, losses = 0.0, 0, torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for ids in blocks.ids:
            mine, dense = (
                model.model(ids[None]).logits[0, :-1].double().log_softmax(-1) for model in pair
            )
            divergence += float((dense.exp() * (dense - mine)).sum())
            agree += int((mine.argmax(-1) == dense.argmax(-1)).sum())
            losses -= torch.stack([out.gather(1, ids[1:, None]).sum() for out in (mine, dense)])
    count = 5 * 19
    assert found.divergence.value == pytest.approx(divergence / count, rel=1e-4) and divergence > 0
    assert found.agreement.value == pytest.approx(agree / count)
    assert found.ratio.value == pytest.approx(
        float(torch.exp((losses[0] - losses[1]) / count)), rel=1e-5
    )
    assert (found.model.value, found.dense.value) == pytest.approx(
        tuple((losses / count).exp().tolist()), rel=1e-5
    )


def test_a_model_is_equal_to_itself(decoder, blocks):
    found = fidelity(decoder("gpt2"), decoder("gpt2"), blocks)
    assert found.divergence.value == pytest.approx(0, abs=1e-6)
    assert found.agreement.value == found.ratio.value == 1
    assert found.ratio.interval == (1, 1)


def test_the_interval_holds_the_value_and_shrinks_with_blocks(pair):
    tokens = torch.randint(0, 256, (2000,), generator=torch.Generator().manual_seed(4))
    widths = []
    for count in (5, 80):
        found = fidelity(*pair, cut(Stream(tokens), name="text", seq_len=20, num_blocks=count))
        for score in (found.divergence, found.agreement, found.ratio):
            assert score.interval[0] <= score.value <= score.interval[1]
        widths.append(found.divergence.interval[1] - found.divergence.interval[0])
    assert widths[1] < 0.6 * widths[0]  # about a quarter


def test_one_block_has_no_interval(pair, blocks):
    assert (
        fidelity(
            *pair, cut(Stream(torch.cat(blocks.ids)), name="text", seq_len=100)
        ).divergence.interval
        is None
    )


def test_a_non_finite_dense_model_is_named(decoder, blocks):
    broken = decoder("llama")
    with torch.no_grad():
        broken.model.lm_head.weight[3] = torch.nan
    with pytest.raises(NumericsError, match="block 0"):
        fidelity(decoder("llama"), broken, blocks)


def test_two_tokenizers_are_refused(decoder, tokenizer, model_directory, text_file, tmp_path):
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str())
    )
    other.add_tokens(["<extra>"])
    dense = Decoder(decoder("llama").model, other, source="other")
    with pytest.raises(
        RecipeError, match=r"--against other: its tokenizer .* is not that of .*tiny-llama"
    ) as caught:
        grasp.evaluate(model_directory, against=dense, ppl=text_file, seq_len=32)
    assert "\n" not in str(caught.value)


# --- what evaluate makes of it


def test_evaluate_gives_both_rows(model_directory, text_file, tmp_path):
    grasp.compress(
        model_directory,
        tmp_path / "small",
        method="shortgpt",
        num_layers=1,
        data=text_file,
        num_samples=2,
        seq_len=16,
    )
    found = grasp.evaluate(
        tmp_path / "small",
        against=model_directory,
        ppl=text_file,
        seq_len=32,
        generate=True,
        new_tokens=5,
    )
    assert [score.unit for score in found.scores] == [
        "perplexity",
        "nats/token",
        "top-1 agreement",
        "perplexity ratio",
        "repetition",
        "tokens",
        "same beginning",
    ]
    assert found.result.ratio == pytest.approx(1 - found.result.parameters / found.dense.parameters)
    assert found.result.method == "shortgpt" and found.result.fields["num_layers"] == 1
    assert len(found.result.generations) == len(found.dense.generations) > 4
    alone = grasp.evaluate(tmp_path / "small", ppl=text_file, seq_len=32)
    assert alone.scores[0].value == pytest.approx(found.scores[0].value, rel=1e-6)
    assert [row["label"] for row in json.loads(json.dumps(found.results().to_json()))["rows"]] == [
        "tiny-llama",
        "small",
    ]


def test_measuring_on_the_calibration_text_is_called_leakage(model_directory, text_file, tmp_path):
    small = tmp_path / "small"
    grasp.compress(
        model_directory,
        small,
        num_layers=1,
        method="shortgpt",
        data=text_file,
        num_samples=2,
        seq_len=16,
    )
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely. " * 20)
    [note] = grasp.evaluate(small, ppl=[text_file, str(other)], seq_len=32).result.notes
    assert note.startswith(f"{text_file}: LEAKAGE")
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text_file).read_bytes())
    # the same text under another name
    [note] = grasp.evaluate(small, ppl=str(copy), seq_len=32).result.notes
    assert "LEAKAGE" in note
    assert grasp.evaluate(small, ppl=str(other), seq_len=32).result.notes == ()


def test_the_other_split_of_a_named_set_is_said_but_is_no_leakage(
    model_directory, text_file, tmp_path
):
    small = tmp_path / "small"
    grasp.compress(
        model_directory,
        small,
        num_layers=1,
        method="shortgpt",
        data=f"pydoc,{text_file}",
        num_samples=2,
        seq_len=16,
    )
    [note] = grasp.evaluate(small, ppl="pydoc", seq_len=64, num_blocks=1).result.notes
    assert note.startswith("pydoc: same source") and "LEAKAGE" not in note


# --- greedy text


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([1, 2, 3], 0),
        ([1, 2, 3, 4, 5], 0),
        ([1] * 8, 0.8),
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),
    ],
)
def test_repetition_counts_the_4_grams_said_before(tokens, share):
    assert repetition(tokens) == pytest.approx(share)


def test_greedy_is_the_most_likely_token_each_time(decoder, tokenizer):
    model = Decoder(decoder("llama").model, tokenizer)
    found = greedy(model, "ab", 6)
    ids = tokenizer("ab", return_tensors="pt").input_ids
    for _ in range(found.num_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert found.text == tokenizer.decode(ids[0, 2:], skip_special_tokens=True)
    assert found.ended == (int(ids[0, -1]) == tokenizer.eos_token_id and found.num_tokens < 6)


def test_the_same_model_begins_alike(decoder, tokenizer):
    one, _ = continuations(Decoder(decoder("llama").model, tokenizer), ("a", "b"), 4)
    other, _ = continuations(Decoder(decoder("gpt2").model, tokenizer), ("a", "b"), 4)
    assert agreement(one, one).value == 1
    assert agreement(one, other).value < 1
