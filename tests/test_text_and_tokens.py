"""Any text that a user finds, through any tokenizer: read, refused in a line, or counted; and no
more memory than the blocks need.
"""

import copy
import json
import logging
import re

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

import grasp
from grasp.cli import cli
from grasp.core.bos import EVERY_BLOCK, block_bos
from grasp.core.decoder import Decoder
from grasp.core.models import load_model
from grasp.core.records import Text
from grasp.data import tokens
from grasp.data.blocks import blocks_of, rolling
from grasp.data.calibration import calibrate
from grasp.data.examples import read_examples
from grasp.data.stream import stream_of
from grasp.data.text import read_source, read_text
from grasp.errors import DataError, GraspError
from grasp.evaluation.generation import greedy
from grasp.stages.enough import only_pydoc, too_few, with_few_tokens
from grasp.verbs.compress import predict

BOS = 256


def refused(call, *said: str) -> None:
    """The call ends in one line that says all of `said`."""
    with pytest.raises(GraspError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message, message


# --- BOS by need


def in_need(model):
    """The model made to predict badly wherever the first token is not BOS, as Gemma does."""

    def hook(_module, args, kwargs, output):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if int(ids[0, 0]) != BOS:
            output.logits = output.logits.roll(7, -1) * 40
        return output

    model.register_forward_hook(hook, with_kwargs=True)
    return model


def test_a_model_of_any_family_that_needs_bos_gets_it_before_every_block(
    decoder, tokenizer, text_file
):
    model = Decoder(in_need(decoder("mistral").model), tokenizer)
    ids = calibrate(model, text_file, num_samples=3, seq_len=16).ids
    assert ids[:, 0].tolist() == [BOS] * 3
    [score] = grasp.evaluate(model, ppl=text_file, seq_len=32, num_blocks=2).scores
    assert score.protocol["bos"] == "every block"


def test_no_family_is_taken_to_need_what_it_does_not(family, decoder, tokenizer):
    assert Decoder(decoder(family).model, tokenizer).block_bos == (
        BOS if "gemma" in family else None
    )


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3n_text", "recurrent_gemma"])
def test_every_gemma_needs_it_whatever_its_tokenizer_says(name, decoder, tokenizer):
    model = decoder("llama").model
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    model.config.model_type = name
    assert block_bos(model, tokenizer, model.config) == block_bos(model, bare, model.config) == BOS


def test_a_tokenizer_that_puts_bos_does_not_make_a_need(decoder, tokenizer, text_file):
    """GPTQ's protocol: once, at the very start of the stream."""
    putting = copy.deepcopy(tokenizer)
    putting.add_bos_token = True
    model = Decoder(decoder("llama").model, putting)
    with open(text_file, encoding="utf-8") as stream:
        ids = stream_of(model, stream.read()).ids
    assert model.block_bos is None and int(ids[0]) == BOS and not bool((ids[1:] == BOS).any())


def test_a_checkpoint_is_measured_as_the_dense_model_was(
    decoder, tokenizer, text_file, tmp_path, monkeypatch
):
    # a need by a hook is not saved
    monkeypatch.setattr("grasp.core.checkpoint.prove", lambda *_: None)
    dense = Decoder(in_need(decoder("llama").model), tokenizer)
    done = grasp.compress(
        dense,
        tmp_path / "out",
        method="shortgpt",
        num_layers=1,
        data=text_file,
        num_samples=2,
        seq_len=16,
    )
    assert done.manifest["calibration"]["bos"] == EVERY_BLOCK
    # the saved model itself has no such need
    assert load_model(str(tmp_path / "out")).block_bos == BOS


def test_answers_chats_and_prompts_begin_with_it_too(decoder, tokenizer, tmp_path):
    model = Decoder(decoder("gemma2").model, tokenizer)
    for row in (
        {"instruction": "Add.", "output": "3"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        [example] = read_examples(
            model, read_source(str(path), split="train"), max_length=400
        ).examples
        assert example.ids[0] == BOS and example.ids.count(BOS) == 1 and not example.asked[0]
    seen = []
    model.model.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    greedy(model, "abc", 2)
    assert seen[0][0, 0] == BOS


def test_rolling_windows_of_a_model_in_need_all_begin_with_it():
    document = torch.arange(50)
    blocks = rolling([document], BOS, name="text", seq_len=16, bos=BOS)
    assert all(int(ids[0]) == BOS and len(ids) <= 17 for ids in blocks.ids)
    predicted = [
        token
        for ids, fresh in zip(blocks.ids, blocks.fresh, strict=True)
        for token in ids[-fresh:].tolist()
    ]
    assert predicted == document.tolist()
    assert rolling([document], BOS, name="text", seq_len=16).ids[1][0] != BOS


# --- long texts


def metaspace() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a mark in front of the whole text, no splits before merges, special tokens at
    both ends.
    """
    alphabet = {
        symbol: number
        for number, symbol in enumerate(
            ["<s>", "</s>", "<unk>", "▁", *map(chr, range(33, 127)), "\n"]
        )
    }
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "q"), ("▁", "▁")]
    for left, right in merges:
        alphabet.setdefault(left + right, len(alphabet))
    core = Tokenizer(models.BPE(vocab=alphabet, merges=merges, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


LINES = "".join(f"the {n} quick  brown foxes jump over {n * n} the lazy dogs\n" for n in range(400))


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("text", [LINES, LINES.replace("\n", " "), "the quick 𝄞 é " * 900])
def test_pieces_give_the_ids_of_the_whole(kind, text, tokenizer, monkeypatch):
    made = tokenizer if kind == "bytes" else metaspace()
    whole = made(text).input_ids
    for name, value in {"PIECE": 1500, "LONG": 3000, "OVERLAP": 200}.items():
        monkeypatch.setattr(tokens, name, value)
    assert tokens.tokenise(made, text, special=True, rows=10**6).tolist() == whole
    begin = tokens.tokenise(made, text, special=True, rows=10**6, most=2000).tolist()
    assert 2000 <= len(begin) < 6000 and begin == whole[: len(begin)]


def test_a_slow_tokenizer_gets_whole_lines(monkeypatch):
    class Slow:
        def __call__(self, text, add_special_tokens=True, verbose=True):
            return type(
                "Made",
                (),
                {"input_ids": [0] * add_special_tokens + [ord(letter) for letter in text]},
            )

    for name, value in {"PIECE": 100, "LONG": 200}.items():
        monkeypatch.setattr(tokens, name, value)
    assert tokens.tokenise(Slow(), LINES, special=True, rows=10**6).tolist() == [
        0,
        *map(ord, LINES),
    ]


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters, self.is_fast = tokenizer, 0, True

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.tokenizer(text, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("rolls", [False, True])
def test_no_more_of_a_long_text_is_tokenised_than_the_blocks_need(
    rolls, decoder, tokenizer, monkeypatch
):
    """Two blocks of one line of 20 MB took 5.4 GB."""
    model = Decoder(decoder("llama").model, tokenizer)
    whole = blocks_of(
        model, Text("text", (LINES,), ""), seq_len=64, num_blocks=2, rolling_windows=rolls
    )
    for name, value in {"PIECE": 1500, "LONG": 3000, "OVERLAP": 200}.items():
        monkeypatch.setattr(tokens, name, value)
    monkeypatch.setattr("grasp.data.blocks.LONG", 3000)
    model.tokenizer = counting = Counting(tokenizer)
    found = blocks_of(
        model, Text("text", (LINES,) * 9, "\n"), seq_len=64, num_blocks=2, rolling_windows=rolls
    )
    assert counting.characters < 4 * 1500
    assert [ids.tolist() for ids in found.ids] == [ids.tolist() for ids in whole.ids]
    assert found.tokens_per_word == pytest.approx(whole.tokens_per_word, rel=0.1)


def test_the_hash_of_a_text_is_that_of_the_whole():
    import hashlib

    rows = ("é" * 1_500_000, "", "end \ud800")
    assert (
        Text("x", rows, "\n\n").sha256
        == hashlib.sha256("\n\n".join(rows).encode("utf-8", "replace")).hexdigest()
    )


# --- a tokenizer larger than the model


@pytest.fixture
def larger(tokenizer) -> PreTrainedTokenizerFast:
    """With added tokens, beyond the model's 260 rows."""
    made = copy.deepcopy(tokenizer)
    made.add_tokens([f"<extra{number}>" for number in range(6)])
    return made


def test_an_id_that_the_model_lacks_is_said_before_anything_runs(decoder, larger, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text <extra5> and more " * 30)
    for call in (
        lambda: grasp.compress(
            Decoder(decoder("llama").model, larger),
            method="shortgpt",
            num_layers=1,
            data=str(path),
            num_samples=2,
            seq_len=16,
        ),
        lambda: grasp.evaluate(Decoder(decoder("llama").model, larger), ppl=str(path), seq_len=16),
        lambda: grasp.inspect(
            Decoder(decoder("llama").model, larger), data=str(path), num_samples=2, seq_len=16
        ),
        lambda: read_examples(
            Decoder(decoder("llama").model, larger),
            read_source(str(path), split="train"),
            max_length=16,
        ),
    ):
        refused(call, "gives id 264 ('<extra5>')", "260 embeddings", "resize_token_embeddings")


def test_added_tokens_that_no_text_holds_do_no_harm(decoder, larger, text_file):
    """Gemma 3's smallest model comes so."""
    model = Decoder(decoder("llama").model, larger)
    assert calibrate(model, text_file, num_samples=2, seq_len=16).num_blocks == 2
    assert len(grasp.evaluate(model, generate=True, new_tokens=2).scores) == 2


def test_another_models_vocabulary_is_refused_before_tasks_and_prompts(decoder):
    alphabet = {chr(0x4E00 + number): number for number in range(400)}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=alphabet, merges=[])), eos_token="一"
    )
    refused(
        lambda: grasp.evaluate(Decoder(decoder("llama").model, other), generate=True),
        "gives id 399",
        "260 embeddings",
    )


# --- text as it is found

MARK = b"\xef\xbb\xbf"
FOUND = {
    "excel.csv": MARK + b"text,label\r\nfirst,1\r\nsecond,2\r\n",
    "semicolons.csv": MARK + b"label;text\r\n1;first\r\n2;second\r\n",
    "tabs.csv": b"label\ttext\n1\tfirst\n2\tsecond\n",
    "mark.json": MARK + b'[{"text": "first"}, {"text": "second"}]',
    "mark.jsonl": MARK + b'{"text": "first"}\n\n{"text": "second"}\n',
    "null.jsonl": b'{"text": "first"}\n{"text": null}\nnull\n{"text": "second"}\n{"text": NaN}\n',
    "missing.jsonl": b'{"text": "first"}\n{"content": null, "id": 3}\n{"text": "second"}\n',
    "short.csv": b"label,text\n1,first\n2\n3,second,surplus\n",
    "mark.txt": MARK + b"first\n\nsecond",
}


@pytest.mark.parametrize("name", FOUND)
def test_files_as_they_are_found_are_read(name, tmp_path):
    (tmp_path / name).write_bytes(FOUND[name])
    assert read_text(str(tmp_path / name), split="train").whole == "first\n\nsecond"


def test_numbers_are_text_and_half_a_surrogate_is_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": 5}\n{"text": 2.5}\n{"text": "a \\ud83d b"}\n')
    assert read_text(str(path), split="train").whole == "5\n\n2.5\n\na \ufffd b"


@pytest.mark.parametrize("field", [None, "text"])
def test_empty_rows_are_counted_and_said(field, tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n{"text": null}\n{"text": " "}\n{"text": "better"}\n')
    with caplog.at_level(logging.WARNING):
        read_text(str(path), split="train", text_field=field)
    assert "2 of 4 rows are empty" in caplog.text


def test_empty_rows_do_not_stop_a_training(decoder, tokenizer, tmp_path):
    model, path = Decoder(decoder("llama").model, tokenizer), tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "Add.", "output": 3},
        {"instruction": "Add.", "output": None},
        {"instruction": None, "output": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_examples(model, read_source(str(path), split="train"), max_length=400)
    assert len(found.examples) == 1 and found.without_answer == 2
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in (chat, None, []))
    )
    found = read_examples(model, read_source(str(path), split="train"), max_length=400)
    assert len(found.examples) == 1 and found.without_answer == 2


REFUSED = {
    "utf16.txt": ("text".encode("utf-16"), "UTF-16, not UTF-8", "iconv"),
    "utf16.csv": ("text\nfirst\n".encode("utf-16"), "UTF-16, not UTF-8", "iconv"),
    "bare16.jsonl": ('{"text": "first"}\n'.encode("utf-16-le"), "NUL bytes", "iconv"),
    "latin.txt": (
        ("é" * 9).encode("latin-1")
        and ("caf\xe9 noir".encode("latin-1"), "not UTF-8 (byte 0xe9)", "iconv")
    ),
    "line.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2"),
    "deep.json": (b"[" * 200_000, "cannot be read"),
    "list.jsonl": (b'{"text": ["a"]}\n', "row 1", "list"),
    "true.jsonl": (b'{"text": "a"}\n{"text": true}\n', "row 2", "bool"),
    "nulls.jsonl": (b'{"text": null}\n{"text": ""}\n', "holds no text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_why(name, tmp_path):
    content, *said = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    refused(
        lambda: read_text(str(tmp_path / name), split="train"), f"--data {tmp_path / name}", *said
    )


@pytest.mark.parametrize("data", ["text.txt", "pydoc", "self", "text.txt,pydoc"])
def test_text_field_of_what_has_no_columns(data, model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text " * 90)
    refused(
        lambda: grasp.inspect(
            model_directory, data=data, num_samples=2, seq_len=16, text_field="nope"
        ),
        "--text-field nope",
        "no columns",
    )


def test_text_field_is_for_the_text_that_has_columns(decoder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "some text " * 9, "text": "x"}) + "\n")
    model = Decoder(decoder("llama").model, tokenizer)
    assert (
        calibrate(
            model, "pydoc,rows.jsonl", num_samples=2, seq_len=16, text_field="body"
        ).num_blocks
        == 2
    )


# --- chat templates that raise


def test_a_template_that_refuses_a_row_is_quoted_with_its_number(decoder, tokenizer, tmp_path):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not"
        " supported') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": chat}) + "\n"
            for chat in (good, [{"role": "system", "content": "s"}, *good])
        )
    )
    model = Decoder(decoder("llama").model, strict)
    for call in (
        lambda: calibrate(model, str(path), num_samples=1, seq_len=4),
        lambda: read_examples(model, read_source(str(path), split="train"), max_length=64),
    ):
        refused(call, f"--data {path}: row 2", "System role not supported")


@pytest.mark.parametrize("messages", [["a"], [{"content": "no role"}], [{"role": "user"}]])
def test_messages_that_are_no_chat(messages, decoder, tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError):
        read_examples(
            Decoder(decoder("llama").model, tokenizer),
            read_source(str(path), split="train"),
            max_length=64,
        )


# --- self


@pytest.mark.parametrize(
    "ids", [{"bos_token_id": None, "eos_token_id": [257, 258]}, {"bos_token_id": None}, {}]
)
def test_self_begins_with_a_token_that_the_model_has(ids, decoder):
    model = decoder("llama")
    for name, value in ids.items():
        setattr(model.config, name, value)
        setattr(model.model.generation_config, name, value)
    blocks = calibrate(model, "self", num_samples=2, seq_len=6).ids
    assert blocks.shape == (2, 6) and int(blocks[0, 0]) in (256, 257)


def test_self_without_any_token_to_begin_with(decoder):
    model = decoder("llama")
    model.config.bos_token_id, model.config.eos_token_id = None, []
    refused(
        lambda: calibrate(model, "self", num_samples=2, seq_len=6), "--data self", "pydoc or a file"
    )


# --- false comfort


@pytest.mark.parametrize(
    ("samples", "told"), [(8, "5.6 times"), (16, "2.4 times"), (32, "1.7 times"), (64, "")]
)
def test_too_few_tokens_are_told_as_they_were_measured(samples, told):
    """The measurements of docs/fisher.md, smollm2: 576 columns."""
    note = too_few(samples * 512, 512, 576)
    assert (told in note and "--num-samples 57 at --seq-len 512" in note) if told else note == ""


def test_few_tokens_for_a_size_are_told_by_the_forecast():
    """With N tokens the rises are about T + c / N^3/4 and T - c / N^3/4: the number that is named
    has the gap that is allowed.
    """
    data = grasp.Calibration(torch.zeros(32, 512, dtype=torch.long), "text")
    [few] = with_few_tokens((), data, 0.36, 0.18)
    assert "16,384 calibration tokens" in few and "0.36" in few and "0.18" in few
    blocks = int(re.search(r"--num-samples ([\d,]+)", few)[1].replace(",", ""))
    gap = 0.18 * (32 / blocks) ** 0.75
    assert gap / (0.27 + gap / 2) == pytest.approx(1 / 3, rel=0.05)
    assert with_few_tokens((), data, 0.36, 0.30) == with_few_tokens((), data, 0.012, 0.001) == ()
    assert with_few_tokens((few,), data, 0.9, 0.1) == (few,)


def test_few_tokens_and_the_default_text_are_noted(model_directory, text_file, tmp_path, caplog):
    done = grasp.compress(model_directory, tmp_path / "out", ratio=0.1, num_samples=2, seq_len=64)
    few, pydoc = done.manifest["notes"]
    assert (
        few.startswith("128 calibration tokens are few")
        and "1,600 would do: --num-samples 25" in few
        and pydoc == only_pydoc("pydoc")
    )
    assert few in caplog.text and pydoc in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert few in card and pydoc in card
    assert predict(model_directory, [0.1], ratio=0.1, num_samples=2, seq_len=64).notes == (
        few,
        pydoc,
    )
    assert (
        grasp.compress(
            model_directory, ratio=0.1, data=text_file, num_samples=25, seq_len=64
        ).manifest["notes"]
        == []
    )
    layers = grasp.compress(
        model_directory, method="shortgpt", num_layers=1, data=text_file, num_samples=2, seq_len=64
    )
    assert layers.manifest["notes"] == []  # a mean of cosines fits nothing


def test_models_in_two_formats_are_not_compared_without_a_word(decoder, tokenizer, text_file):
    half, whole, same = (
        Decoder(decoder("llama", dtype=kind).model, tokenizer)
        for kind in (torch.bfloat16, torch.float32, torch.float32)
    )
    [note] = grasp.evaluate(
        half, against=whole, ppl=text_file, seq_len=32, num_blocks=2
    ).result.notes
    assert "bfloat16" in note and "float32" in note and "--dtype float32" in note
    assert (
        grasp.evaluate(same, against=whole, ppl=text_file, seq_len=32, num_blocks=2).result.notes
        == ()
    )


@pytest.mark.parametrize(
    ("name", "file"), [("wikitext2", "wiki.test.raw"), ("ptb", "ptb.test.txt")]
)
def test_offline_the_test_file_is_suggested_for_a_perplexity(name, file):
    pytest.importorskip("datasets")
    refused(lambda: read_text(name, split="test"), f"--ppl {name}={'path/to/' + file}")


def test_a_dry_run_says_what_its_forecast_is_worth(model_directory, tmp_path):
    """The forecast from 2 x 64 tokens was a rise of 0.000, without a word; the real one was 1.57
    nats.
    """
    asked = [
        "compress",
        model_directory,
        str(tmp_path / "out"),
        "--ratio",
        "0.1",
        "--num-samples",
        "2",
        "--seq-len",
        "64",
        "--dry-run",
        "--json",
    ]
    outcome = CliRunner().invoke(cli, asked)
    assert outcome.exit_code == 0, outcome.output
    few, pydoc = json.loads(outcome.stdout.splitlines()[-1])["notes"]
    said = " ".join(outcome.stderr.split())
    assert few in said and pydoc in said and "1,600 would do" in few
