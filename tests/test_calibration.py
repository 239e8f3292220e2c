"""Text in, blocks of token ids out: N means N blocks, every source gives the same text, and a bad
source is one line.
"""

import csv
import gzip
import importlib
import json
import sys
import types

import pytest
import torch

import grasp
from grasp.core.decoder import Decoder
from grasp.data.calibration import calibrate
from grasp.data.stream import stream_of
from grasp.data.text import NAMED, read_text
from grasp.errors import DataError

DOCUMENTS = [
    "Crème brûlée, “quoted”.",
    'A line\nbreak, a comma and a "quote".',
    "The last one; 3 < 4 & 5.",
]
JOINED = "\n\n".join(DOCUMENTS)
ALPHABET = "".join(map(chr, range(33, 127)))


@pytest.fixture
def model(decoder, tokenizer) -> Decoder:
    """A tiny Llama that can read text."""
    return Decoder(decoder("llama").model, tokenizer)


def write(path, kind: str, rows: list) -> str:
    """A file of `rows` (texts or objects) in one of the file types."""
    file = path / f"corpus{kind}"
    objects = [{"text": row} if isinstance(row, str) else row for row in rows]
    if kind in (".txt", ".raw", ".md"):
        file.write_text("\n\n".join(rows), encoding="utf-8")
    elif kind == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in objects), encoding="utf-8")
    elif kind == ".jsonl.gz":
        with gzip.open(file, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)
    elif kind == ".json":
        file.write_text(json.dumps(objects), encoding="utf-8")
    elif kind == ".csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(objects[0]))
            table.writeheader()
            table.writerows(objects)
    else:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(objects), file)
    return str(file)


def refused(data, *said: str, **options) -> str:
    """The message of the `DataError` that reading `data` ends in: one line with all of `said`."""
    with pytest.raises(DataError) as caught:
        read_text(str(data), split="train", **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message
    return message


# --- blocks


def test_n_means_n_blocks(model, text_file):
    data = calibrate(model, text_file, num_samples=7, seq_len=16)
    assert data.ids.shape == (7, 16) and data.ids.dtype == torch.int64 and data.mask is None
    assert (data.num_blocks, data.seq_len, data.source) == (7, 16, text_file)


def test_blocks_are_pieces_of_the_text_at_seeded_places(model, text_file):
    with open(text_file, encoding="utf-8") as stream:
        text = stream.read()
    data = calibrate(model, text_file, num_samples=12, seq_len=70, seed=3)
    blocks = [model.tokenizer.decode(block) for block in data.ids]
    assert all(block in text for block in blocks)
    assert len({text.index(block) % 70 for block in blocks}) > 1 and any(
        not block.startswith("The") for block in blocks
    )
    assert torch.equal(
        data.ids, calibrate(model, text_file, num_samples=12, seq_len=70, seed=3).ids
    )
    assert not torch.equal(
        data.ids, calibrate(model, text_file, num_samples=12, seq_len=70, seed=4).ids
    )


def test_every_place_can_be_drawn(model, tmp_path):
    path = write(tmp_path, ".txt", [ALPHABET[:20]])
    firsts = calibrate(model, path, num_samples=200, seq_len=16).ids[:, 0].tolist()
    assert set(firsts) == set(stream_of(model, ALPHABET[:5]).ids.tolist())


def test_a_text_of_exactly_one_block_is_enough(model, tmp_path):
    path = write(tmp_path, ".txt", [ALPHABET[:16]])
    assert torch.equal(
        calibrate(model, path, num_samples=2, seq_len=16).ids,
        stream_of(model, ALPHABET[:16]).ids.expand(2, -1),
    )


def test_the_hash_follows_the_ids(model, text_file):
    one, same, other = (
        calibrate(model, text_file, num_samples=3, seq_len=16, seed=seed) for seed in (0, 0, 1)
    )
    assert (
        one.ids_hash == same.ids_hash != other.ids_hash and one.text_hash == other.text_hash != ""
    )
    changed = one.ids.clone()
    changed[2, 15] += 1
    masked = torch.ones_like(changed, dtype=torch.bool)
    hashes = {
        one.ids_hash,
        grasp.Calibration(changed, "x").ids_hash,
        grasp.Calibration(one.ids, "x", mask=masked).ids_hash,
    }
    assert len(hashes) == 3


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("data", ["file", "self"])
def test_every_gemma_block_begins_with_bos(name, data, decoder, tokenizer, text_file):
    model = Decoder(decoder(name).model, tokenizer)
    ids = calibrate(model, text_file if data == "file" else data, num_samples=5, seq_len=12).ids
    assert ids.shape == (5, 12) and bool((ids[:, 0] == tokenizer.bos_token_id).all())
    assert data == "self" or not bool((ids[:, 1:] == tokenizer.bos_token_id).any())


def test_other_families_get_no_bos_put_in(model, text_file):
    assert (
        int(calibrate(model, text_file, num_samples=8, seq_len=12).ids.max())
        < model.tokenizer.bos_token_id
    )


# --- sources


@pytest.mark.parametrize(
    "kind", [".txt", ".raw", ".md", ".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv"]
)
def test_every_file_type_gives_the_same_text(kind, tmp_path):
    assert read_text(write(tmp_path, kind, DOCUMENTS), split="train").whole == JOINED


def test_a_json_list_of_plain_texts_is_text(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(DOCUMENTS))
    assert read_text(str(tmp_path / "list.json"), split="train").whole == JOINED


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ".csv"])
def test_text_field_names_the_column(kind, tmp_path):
    path = write(tmp_path, kind, [{"text": "no", "body": text} for text in DOCUMENTS])
    assert read_text(path, split="train", text_field="body").whole == JOINED


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_messages_go_through_the_chat_template(kind, tmp_path, tokenizer):
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
        for text in DOCUMENTS
    ]
    path = write(tmp_path, kind, [{"messages": chat} for chat in chats])
    assert read_text(path, split="train", tokenizer=tokenizer).whole == "\n\n".join(
        f"<user>{text}\n<assistant>Yes.\n" for text in DOCUMENTS
    )


def test_alpaca_rows_are_instruction_input_and_answer(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
    ]
    assert (
        read_text(write(tmp_path, ".json", rows), split="train").whole
        == "Add.\n\n1, 2\n\n3\n\nGreet.\n\nHello."
    )


def test_a_long_csv_cell_is_read_whole(tmp_path):
    """Python's csv module stops at 128 KiB a cell unless it is told otherwise; documents are
    longer.
    """
    document = "word " * 30_000
    assert read_text(write(tmp_path, ".csv", [document]), split="train").whole == document


def test_pydoc_splits_are_disjoint_and_together_everything():
    """By paragraph: topics quote one another, so two different topics can hold the same text."""
    topics = importlib.import_module("pydoc_data.topics").topics
    everything = {" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")}
    train, test = (
        {" ".join(part.split()) for part in read_text("pydoc", split=split).whole.split("\n\n")}
        for split in ("train", "test")
    )
    assert train | test == everything
    leaked = sum(len(part) for part in train & test if len(part) >= 80)
    assert leaked == 0, (
        f"{leaked:,} of {sum(map(len, test)):,} held-out characters are in the calibration text too"
    )


def test_self_is_whole_blocks_reproducible_and_leaves_the_generator_alone(model):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (
        calibrate(model, "self", num_samples=18, seq_len=6, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert one.ids.shape == (18, 6) and not bool((one.ids == model.config.eos_token_id).any())
    assert (
        bool((one.ids[:, 0] == model.config.bos_token_id).all()) and len(one.ids.unique(dim=0)) > 9
    )
    assert torch.equal(one.ids, same.ids) and not torch.equal(one.ids, other.ids)


def test_self_needs_no_tokenizer(decoder):
    model = decoder("llama")
    assert calibrate(model, "self", num_samples=2, seq_len=6).ids.shape == (2, 6)
    with pytest.raises(DataError, match="tokenizer"):
        calibrate(model, "pydoc", num_samples=2, seq_len=6)


# --- named sets of the hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`: records what it is asked for, and gives `hub.rows`."""
    fake = types.ModuleType("datasets")
    fake.rows, fake.asked = [{"text": text} for text in DOCUMENTS], []

    def load_dataset(*arguments, **options):
        fake.asked.append((arguments, options))
        if isinstance(fake.rows, Exception):
            raise fake.rows
        return fake.rows

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize("split", ["train", "test"])
def test_wikitext2_is_asked_for_and_joined(split, hub):
    assert read_text("wikitext2", split=split).whole == JOINED
    [(arguments, options)] = hub.asked
    assert arguments == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert options["split"] == split and not options["streaming"]


def test_ptb_is_joined_by_spaces_and_its_revision_needs_no_script(hub):
    hub.rows = [{"sentence": "one two"}, {"sentence": "three"}]
    assert read_text("ptb", split="train").whole == "one two three"
    [(arguments, options)] = hub.asked
    assert (
        arguments == ("ptb-text-only/ptb_text_only",)
        and options["revision"] == "refs/convert/parquet"
    )


def test_only_the_head_of_c4_is_read(hub):
    seen = []
    hub.rows = ({"text": str(seen.append(n) or n)} for n in range(10_000))
    assert read_text("c4", split="test").whole.split("\n\n")[-1] == str(NAMED["c4"].most_rows - 1)
    [(arguments, options)] = hub.asked
    assert (
        arguments == ("allenai/c4", "en")
        and options["split"] == "validation"
        and options["streaming"]
    )
    assert len(seen) <= NAMED["c4"].most_rows + 1


def test_alpaca_of_the_hub_gives_instructions_with_answers(hub):
    hub.rows = [{"instruction": "Add.", "input": "1, 2", "output": "3"}]
    assert read_text("alpaca", split="train").whole == "Add.\n\n1, 2\n\n3"
    assert hub.asked[0][0] == ("tatsu-lab/alpaca",)


@pytest.mark.parametrize("name", [name for name, known in NAMED.items() if known.hub])
def test_without_network_a_named_set_says_what_to_do(name, hub):
    hub.rows = ConnectionError("Couldn't reach the Hub\nsecond line")
    refused(name, f"--data {name}", "path/to/", "--data pydoc")


def test_without_network_the_real_package_says_what_to_do():
    """The tests run with the hub switched off."""
    pytest.importorskip("datasets")
    refused("wikitext2", "--data wikitext2", "path/to/wiki.train.raw", "--data pydoc")


def test_without_the_package_datasets_its_name_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("wikitext2", "--data wikitext2", "pip install", "--data pydoc")


# --- mistakes


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
def test_empty_text(content, tmp_path):
    (tmp_path / "empty.txt").write_bytes(content)
    refused(tmp_path / "empty.txt", f"--data {tmp_path / 'empty.txt'}", "no text")


def test_too_short_text(model, tmp_path):
    path = write(tmp_path, ".txt", ["short"])
    with pytest.raises(
        DataError,
        match=(
            r"--data .*corpus\.txt: 5 tokens .* --seq-len 64; give more text or a smaller"
            r" --seq-len$"
        ),
    ):
        calibrate(model, path, seq_len=64)


TOO_FAR = {
    "--num-samples 0": {"num_samples": 0},
    "--seq-len 1: .*2 to 128": {"seq_len": 1},
    "--seq-len 129: .*2 to 128": {"seq_len": 129},
}


@pytest.mark.parametrize("said", TOO_FAR)
def test_lengths_that_cannot_be(said, model, text_file):
    with pytest.raises(DataError, match=said):
        calibrate(model, text_file, **TOO_FAR[said])


def test_unknown_name():
    refused(
        "wikitex2",
        "--data wikitex2",
        "wikitext2, ptb, c4, alpaca",
        "path",
        "did you mean 'wikitext2'?",
    )


def test_unknown_file_type(tmp_path):
    (tmp_path / "text.pdf").write_text("text")
    refused(tmp_path / "text.pdf", "--data", "text.pdf", ".jsonl.gz, .json, .parquet, .csv")


def test_wrong_text_field(tmp_path):
    path = write(tmp_path, ".jsonl", [{"body": "x", "title": "y"}])
    refused(
        path, "--text-field bodi", path, "body, title", "did you mean 'body'?", text_field="bodi"
    )


def test_no_usual_column(tmp_path):
    path = write(tmp_path, ".csv", [{"corps": "x", "titre": "y"}])
    refused(path, f"--data {path}", "corps, titre", "--text-field")


def test_messages_without_a_chat_template(tmp_path):
    path = write(tmp_path, ".jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    refused(path, f"--data {path}", "chat template", "--text-field", tokenizer=None)


def test_rows_that_are_neither_text_nor_objects(tmp_path):
    (tmp_path / "numbers.json").write_text("[1, 2]")
    refused(tmp_path / "numbers.json", "--data", "numbers.json", "int")


UNREADABLE = {
    "binary.txt": b"\xff\xfe\x00\x01\x80",
    "binary.csv": b"\xff\xfe\x00\x01\x80",
    "broken.json": b'{"text": ',
    "broken.jsonl": b'{"text": "fine"}\n{"text": \n',
    "not-a.jsonl.gz": b"plain text",
    "cut.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 99)[:-12],
    # a good head, then no deflate stream
    "damaged.jsonl.gz": gzip.compress(b'{"text": "x"}\n')[:10] + b"\xff" * 50,
    "not-a.parquet": b"plain text",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files(name, tmp_path):
    (tmp_path / name).write_bytes(UNREADABLE[name])
    refused(tmp_path / name, f"--data {tmp_path / name}", "cannot be read")


def test_a_directory_is_no_text(tmp_path):
    refused(tmp_path, f"--data {tmp_path}")


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "text.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    refused(tmp_path / "text.parquet", "--data", "text.parquet", "pip install")


def test_a_local_copy_of_a_named_set_is_read_by_its_rules(tmp_path):
    """WikiText's rows: a blank line is "", any other line keeps its end; the rows are joined by a
    blank line.
    """
    path = tmp_path / "wiki.test.raw"
    path.write_text(" = Title = \n \n One . \n Two . \n")
    found = read_text(f"wikitext2={path}", split="test")
    assert found.whole == " = Title = \n\n\n\n\n One . \n\n\n Two . \n"
    assert found.rule == "4 rows joined by '\\n\\n'"
    (tmp_path / "ptb.txt").write_text(" one two \n three \n")
    assert read_text(f"ptb={tmp_path / 'ptb.txt'}", split="test").whole == "one two three"
    with pytest.raises(DataError, match="neither a file nor a known set"):
        read_text("wikitext2=nowhere.raw", split="test")
