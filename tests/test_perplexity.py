"""Perplexity against a plain loop, every token once, and never a block left out."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import grasp
from grasp.core.decoder import Decoder
from grasp.core.records import Text
from grasp.core.score import Score
from grasp.data.blocks import blocks_of, cut, rolling
from grasp.data.stream import Stream
from grasp.errors import DataError, GraspError, NumericsError, RecipeError
from grasp.evaluation import perplexity as measuring


def perplexity(
    model: Decoder, tokens: torch.Tensor, *, name: str, bos: int | None = None, **options
) -> Score:
    """Cut and measured, without a text to count words of."""
    return measuring.perplexity(model, cut(Stream(tokens, bos), name=name, **options))


@pytest.fixture
def tokens() -> torch.Tensor:
    """A text of 110 random tokens."""
    return torch.randint(0, 256, (110,), generator=torch.Generator().manual_seed(2))


def plain_loop(
    model: Decoder, tokens: torch.Tensor, seq_len: int, stride: int, bos: int | None = None
) -> tuple[float, int]:
    """(perplexity, tokens counted): the log-probability of every token in the first block that
    predicts it, in float64.
    """
    found: dict[int, float] = {}
    body = seq_len if bos is None else seq_len - 1
    for start in range(0, len(tokens) - body + 1, stride):
        block = tokens[start : start + body].tolist()
        with torch.no_grad():
            logits = (
                model.model(
                    torch.tensor([block if bos is None else [bos, *block]]), use_cache=False
                )
                .logits[0]
                .double()
            )
        offset = 1 if bos is None else 0
        for place in range(offset, body):
            found.setdefault(
                start + place, float(torch.log_softmax(logits[place - offset], 0)[block[place]])
            )
    return math.exp(-sum(found.values()) / len(found)), len(found)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("stride", [None, 32, 31, 8, 5, 1])
def test_equals_a_plain_loop_that_counts_every_token_once(name, stride, decoder, tokens):
    model = decoder(name)
    found = perplexity(model, tokens, name="text", seq_len=32, stride=stride)
    expected, count = plain_loop(model, tokens, 32, stride or 32)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.protocol["num_tokens"] == count


@pytest.mark.parametrize("stride", [None, 31, 10])
def test_gemma_sees_bos_before_every_block_and_is_not_asked_for_it(stride, decoder, tokens):
    model = decoder("gemma2")
    found = perplexity(model, tokens, name="text", seq_len=32, stride=stride, bos=256)
    expected, count = plain_loop(model, tokens, 32, stride or 31, bos=256)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert found.protocol["num_tokens"] == count
    assert found.protocol["bos"] == "every block"


def test_evaluate_gives_gemma_its_bos_and_llama_none(decoder, tokenizer, text_file):
    with open(text_file, encoding="utf-8") as stream:
        ids = torch.tensor(tokenizer(stream.read()).input_ids)
    for name, bos in (("gemma2", 256), ("llama", None)):
        model = Decoder(decoder(name).model, tokenizer)
        [score] = grasp.evaluate(model, ppl=text_file, seq_len=64, num_blocks=3).scores
        assert score.value == pytest.approx(
            perplexity(model, ids, name="x", seq_len=64, num_blocks=3, bos=bos).value, rel=1e-6
        ), name


def test_num_blocks_takes_the_first(decoder, tokens):
    model = decoder("llama")
    found = perplexity(model, tokens, name="text", seq_len=32, num_blocks=2)
    assert found.protocol["num_blocks"] == 2
    assert found.value == pytest.approx(plain_loop(model, tokens[:64], 32, 32)[0], rel=1e-5)


def test_more_blocks_than_there_are_is_all_of_them(decoder, tokens):
    model = decoder("llama")
    assert perplexity(model, tokens, name="text", seq_len=32, num_blocks=99) == perplexity(
        model, tokens, name="text", seq_len=32
    )


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_no_blocks_is_an_error(num_blocks, decoder, tokens):
    with pytest.raises(GraspError, match=f"--num-blocks {num_blocks}: "):
        perplexity(decoder("llama"), tokens, name="text", seq_len=32, num_blocks=num_blocks)


def test_the_score_states_its_protocol(decoder, tokens):
    found = perplexity(decoder("llama"), tokens, name="text", seq_len=32, stride=8)
    stated = {key: value for key, value in found.to_json().items() if key not in ("value", "loss")}
    assert stated == {
        "name": "text",
        "unit": "perplexity",
        "seq_len": 32,
        "stride": 8,
        "bos": "as tokenised",
        "num_blocks": 10,
        "num_tokens": 31 + 9 * 8,
        "dtype": "float32",
    }
    assert found.value == math.exp(found.protocol["loss"])


@pytest.fixture
def broken(decoder) -> Decoder:
    """A model whose loss is NaN where token 7 is read, and nowhere else."""
    model = decoder("mistral")
    with torch.no_grad():
        model.model.get_input_embeddings().weight[7] = torch.nan
    return model


def test_a_non_finite_block_is_an_error_and_never_skipped(broken, tokens):
    tokens[tokens == 7] = 8
    clean = perplexity(broken, tokens, name="text", seq_len=32)
    assert math.isfinite(clean.value) and clean.protocol["num_blocks"] == 3
    tokens[70] = 7  # in the third block
    with pytest.raises(NumericsError, match=r"text: the loss of block 2 is nan .*--dtype float32$"):
        perplexity(broken, tokens, name="text", seq_len=32)
    assert (
        perplexity(broken, tokens, name="text", seq_len=32, num_blocks=2).protocol["num_blocks"]
        == 2
    )


def test_a_non_finite_weight_stops_evaluate(decoder, tokenizer, text_file):
    model = Decoder(decoder("llama").model, tokenizer)
    with torch.no_grad():
        model.layer(2).linears["mlp.down_proj"].parameter[0, 0] = torch.inf
    with pytest.raises(NumericsError):
        grasp.evaluate(model, ppl=text_file, seq_len=32)


def test_a_text_shorter_than_a_block(decoder, tokens):
    assert (
        perplexity(decoder("llama"), tokens[:32], name="text", seq_len=32).protocol["num_blocks"]
        == 1
    )
    with pytest.raises(
        DataError, match=r"text: 31 tokens .* --seq-len 32; give more text or a smaller --seq-len$"
    ):
        perplexity(decoder("llama"), tokens[:31], name="text", seq_len=32)


@pytest.mark.parametrize("stride", [0, -3, 33])
def test_a_stride_that_leaves_tokens_out_is_an_error(stride, decoder, tokens):
    with pytest.raises(RecipeError, match=f"--stride {stride}: must be from 1 to .*32"):
        perplexity(decoder("llama"), tokens, name="text", seq_len=32, stride=stride)


def test_evaluate_measures_several_texts_at_once(model_directory, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Another text, with other words in it. " * 9)
    both = grasp.evaluate(model_directory, ppl=[text_file, str(other)], seq_len=64)
    assert [score.name for score in both.scores] == [text_file, str(other)]
    assert both.scores[0].value != both.scores[1].value
    # as the command line writes it
    assert grasp.evaluate(model_directory, ppl=f"{text_file},{other}", seq_len=64) == both
    for score in both.scores:
        assert grasp.evaluate(model_directory, ppl=score.name, seq_len=64).scores == (score,)
    assert (
        json.loads(json.dumps(both.results().to_json()))["rows"][0]["scores"][1]["num_tokens"]
        == 5 * 63
    )


def test_blanks_between_the_texts_do_no_harm(model_directory, text_file):
    assert (
        len(
            grasp.evaluate(
                model_directory, ppl=f"{text_file}, {text_file}", seq_len=64, num_blocks=1
            ).scores
        )
        == 2
    )


def test_evaluate_reads_the_held_out_part_and_whole_blocks_by_default(model_directory):
    [score] = grasp.evaluate(model_directory, ppl="pydoc", num_blocks=2).scores
    # the longest the model reads
    assert (score.protocol["seq_len"], score.protocol["stride"]) == (128, 128)
    assert score.protocol["num_tokens"] == 2 * 127


def test_evaluate_cannot_read_from_the_model_itself(model_directory):
    """`self` is calibration text; the message must not offer what it refuses."""
    with pytest.raises(DataError) as caught:
        grasp.evaluate(model_directory, ppl="self", seq_len=64)
    assert "self, " not in str(caught.value) and "did you mean 'self'" not in str(caught.value)


def test_bfloat16_logits_are_promoted_before_the_loss(decoder, tokens):
    model = decoder("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model.model(tokens[None, :64]).logits[0, :-1]
    assert logits.dtype == torch.bfloat16
    promoted = float(cross_entropy(logits.double(), tokens[1:64]).exp())
    narrow = float(cross_entropy(logits, tokens[1:64]).exp())
    assert narrow != pytest.approx(promoted, rel=1e-4)  # or this test could not fail
    found = perplexity(model, tokens[:64], name="text", seq_len=64)
    assert found.value == pytest.approx(promoted, rel=1e-5)
    assert found.protocol["dtype"] == "bfloat16"


# --- the protocol of lm-eval's wikitext: every token of every document


def windows_of_lm_eval(
    tokens: list[int], prefix: int, length: int
) -> list[tuple[list[int], list[int]]]:
    """(context, predicted) as lm-eval describes its rolling windows: the first after the prefix,
    later ones with one token of context or more.
    """
    found = [([prefix], tokens[:length])]
    done = min(length, len(tokens))
    while done < len(tokens):
        more = min(len(tokens) - done, length)
        end = done + more
        start = max(end - length - 1, 0)
        found.append((tokens[start:done], tokens[done:end]))
        done = end
    return found


@pytest.mark.parametrize("size", [1, 15, 16, 17, 33, 50])
def test_rolling_windows_predict_every_token_once(size, decoder):
    model = decoder("llama")
    tokens = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size))
    blocks = rolling([tokens], 257, name="text", seq_len=16)
    total = 0.0
    for context, predicted in windows_of_lm_eval(tokens.tolist(), 257, 16):
        assert len(context) + len(predicted) - 1 <= 16  # what the model reads
        with torch.no_grad():
            logits = (
                model.model(torch.tensor([(context + predicted)[:-1]]))
                .logits[0]
                .double()
                .log_softmax(-1)
            )
        total -= sum(
            float(logits[len(context) - 1 + place, token]) for place, token in enumerate(predicted)
        )
    found = measuring.perplexity(model, blocks)
    assert found.protocol["num_tokens"] == size
    assert found.value == pytest.approx(math.exp(total / size), rel=1e-5)


def test_rolling_starts_every_document_anew(decoder):
    one, two = torch.arange(5), torch.arange(9)
    blocks = rolling([one, two], 257, name="text", seq_len=16)
    assert [ids.tolist() for ids in blocks.ids] == [
        [257, *range(5)],
        [257, *range(9)],
    ] and blocks.fresh == (5, 9)


# --- a word and a byte


@pytest.mark.parametrize("rolls", [False, True])
def test_loss_a_word_and_a_byte(rolls, decoder, tokenizer):
    """The byte-level tokenizer writes one token a byte, so bits per byte are bits per token, and a
    word of three letters is four tokens.
    """
    model = Decoder(decoder("llama").model, tokenizer)
    text = Text("text", ("abc " * 64,), "")
    [score] = [
        measuring.perplexity(model, blocks_of(model, text, seq_len=32, rolling_windows=rolls))
    ]
    assert score.protocol["bits_per_byte"] == pytest.approx(score.protocol["loss"] / math.log(2))
    assert score.protocol["word_perplexity"] == pytest.approx(
        math.exp(4 * score.protocol["loss"]), rel=1e-6
    )


def test_words_are_counted_in_the_part_that_is_read_only(decoder, tokenizer):
    model = Decoder(decoder("llama").model, tokenizer)
    text = Text("text", ("abc " * 16 + "abcdefg " * 64,), "")
    first = measuring.perplexity(model, blocks_of(model, text, seq_len=32, num_blocks=2))
    assert first.protocol["word_perplexity"] == pytest.approx(
        math.exp(4 * first.protocol["loss"]), rel=1e-6
    )
    assert first.protocol["join"] == "read whole"


def test_rolling_and_stride_exclude_each_other(model_directory, text_file):
    with pytest.raises(RecipeError, match="--rolling"):
        grasp.evaluate(model_directory, ppl=text_file, seq_len=64, stride=32, rolling=True)


@pytest.mark.parametrize("length", [40, 300])
def test_rolling_is_what_lm_eval_measures(length, model_directory, tokenizer, tmp_path):
    """lm-eval's own route to `word_perplexity` (its `wikitext` task): rolling log-likelihoods of
    whole documents, divided by their words.
    """
    harness = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    documents = ["The quick brown fox jumps over the lazy dog. " * 9, "Short one.", "x" * 200]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    model = grasp.load(model_directory).model
    theirs = harness.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=min(length, 128)
    )
    requests = [
        Instance("loglikelihood_rolling", {}, (document,), index)
        for index, document in enumerate(documents)
    ]
    total = -sum(theirs.loglikelihood_rolling(requests, disable_tqdm=True))
    [ours] = grasp.evaluate(
        model_directory, ppl=str(file), seq_len=min(length, 128), rolling=True
    ).scores
    words = sum(len(document.split()) for document in documents)
    assert ours.protocol["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert ours.protocol["bits_per_byte"] == pytest.approx(
        total / sum(map(len, documents)) / math.log(2), rel=1e-4
    )


def test_a_file_with_a_comma_in_its_name_is_one_text(decoder, tokenizer, tmp_path):
    """As for --data."""
    path = tmp_path / "this,that.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 4, encoding="utf-8")
    model = Decoder(decoder("llama").model, tokenizer)
    found = grasp.evaluate(model, ppl=str(path), seq_len=16, num_blocks=2)
    assert {score.name for score in found.scores if score.unit == "perplexity"} == {str(path)}
