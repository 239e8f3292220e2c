"""The parts of a compensation against independent versions: examples and their masks, packing,
objectives, the closed-form start.
"""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from conftest import FAMILY_ROWS, build, quick

import grasp
from grasp.compensation.hooks import Outputs
from grasp.compensation.least_squares import least_squares, pairs_of
from grasp.compensation.objectives import (
    LanguageModel,
    MatchLayers,
    divergence,
    divergence_of_most_likely,
)
from grasp.compensation.recipe import PRESETS, Recipe, make_recipe
from grasp.compensation.teacher import Teacher
from grasp.core.decoder import Decoder
from grasp.data.examples import PROMPT, Example, Examples, read_examples
from grasp.data.rows import IGNORED, Collate, Rows, can_pack, prepare, read_by_model
from grasp.data.text import read_source
from grasp.errors import DataError, RecipeError


@pytest.fixture
def model(tokenizer) -> Decoder:
    made = build("llama")
    made.config.max_position_embeddings = 512
    return Decoder(made, tokenizer, "tiny")


def read(model, tmp_path, rows, name="data.jsonl", **options):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return read_examples(
        model, read_source(str(path), split="train"), **{"max_length": 512, **options}
    )


# Examples


def test_alpaca_asks_for_the_answer_and_its_end_only(model, tmp_path):
    [example] = read(
        model, tmp_path, [{"instruction": "Greet.", "input": "", "output": "Hello"}]
    ).examples
    asked = [token for token, flag in zip(example.ids, example.asked, strict=True) if flag]
    assert model.tokenizer.decode(asked) == "Hello</s>"
    assert model.tokenizer.decode(example.ids) == PROMPT.format(instruction="Greet.") + "Hello</s>"
    with_input = read(
        model, tmp_path, [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    ).examples[0]
    assert "### Input:\n1 2\n\n### Response:\n3</s>" in model.tokenizer.decode(with_input.ids)


def test_a_chat_asks_for_what_the_assistant_says(model, tmp_path):
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "Yes"},
    ]
    [example] = read(model, tmp_path, [{"messages": chat}]).examples
    assert (
        model.tokenizer.decode(example.ids)
        == "<user>Hi\n<assistant>Ho\n<user>So?\n<assistant>Yes\n"
    )
    asked = [token for token, flag in zip(example.ids, example.asked, strict=True) if flag]
    # this template opens a turn without a generation prompt
    assert model.tokenizer.decode(asked) == "<assistant>Ho\n<assistant>Yes\n"


def test_plain_text_is_asked_for_whole(model, tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghij" * 5)
    found = read_examples(
        model, read_source(str(tmp_path / "text.txt"), split="train"), max_length=16
    )
    assert [len(example.ids) for example in found.examples] == [16, 16, 16, 2]
    assert all(
        example.asked == [False] + [True] * (len(example.ids) - 1) for example in found.examples
    )
    assert (
        "".join(model.tokenizer.decode(example.ids) for example in found.examples)
        == "abcdefghij" * 5
    )


def test_what_is_left_out_is_counted(model, tmp_path, caplog):
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": " "},
        {"instruction": "a" * 600, "output": "b"},
        {"instruction": "a", "output": "b" * 600},
    ]
    found = read(model, tmp_path, rows)
    assert (len(found.examples), found.without_answer, found.cut_away, found.cut) == (2, 1, 1, 1)
    assert len(caplog.records) == 3


# Rows


def some_examples(count=40, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (count,), generator=draw).tolist()
    return [
        Example(
            [seed * 1000 + n, *torch.randint(0, 256, (length,), generator=draw).tolist()],
            [False] * 2 + [True] * (length - 1),
        )
        for n, length in enumerate(lengths)
    ]


def test_packing_keeps_every_token_once_and_fills_rows():
    examples = some_examples()
    data = prepare(
        [Examples("a", examples)],
        max_length=64,
        held_out=5,
        packed=True,
        batch=1,
        needed=None,
        every=False,
        seed=0,
    )
    assert max(len(row.ids) for row in data.train.rows) <= 64
    starts = [
        token
        for rows in (data.train, data.held_out)
        for row in rows.rows
        for token, place in zip(row.ids, row.positions, strict=True)
        if place == 0
    ]
    assert sorted(starts) == [example.ids[0] for example in examples]
    assert data.train.num_tokens + data.held_out.num_tokens == sum(
        len(example.ids) for example in examples
    )
    assert data.train.num_tokens / (64 * len(data.train)) > 0.85
    assert [item["row"] for item in (*[data.train[0]], data.held_out[0])] == [0, len(data.train)]


def test_sources_share_the_steps_and_rows_come_in_whole_batches():
    sources = [Examples("many", some_examples(90, 1)), Examples("few", some_examples(30, 2))]
    every = prepare(
        sources, max_length=64, held_out=4, packed=False, batch=8, needed=None, every=False, seed=0
    )
    assert len(every.train) == 112 and sum(every.sources.values()) == 112  # of 116
    equal = prepare(
        sources, max_length=64, held_out=4, packed=False, batch=8, needed=40, every=False, seed=0
    )
    assert equal.sources == {"many": 20, "few": 20}
    short = prepare(
        sources, max_length=64, held_out=4, packed=False, batch=8, needed=80, every=False, seed=0
    )
    assert short.sources == {"many": 52, "few": 28}
    assert (
        prepare(
            sources,
            max_length=64,
            held_out=4,
            packed=False,
            batch=8,
            needed=40,
            every=False,
            seed=0,
        ).train.sha256
        == equal.train.sha256
    )
    with pytest.raises(DataError, match="--batch-size 200: the text gives 116 rows"):
        prepare(
            sources,
            max_length=64,
            held_out=4,
            packed=False,
            batch=200,
            needed=None,
            every=False,
            seed=0,
        )


@pytest.mark.parametrize("name", quick(FAMILY_ROWS))
@torch.no_grad()
def test_packed_or_padded_the_loss_is_the_same(name):
    """Against the loss that Hugging Face computes of each example alone."""
    decoder = Decoder(build(name))
    examples = [Example(example.ids[1:], example.asked[1:]) for example in some_examples(7)]
    expected, asked = 0.0, 0
    for example in examples:
        labels = torch.tensor(
            [
                [
                    token if flag else IGNORED
                    for token, flag in zip(example.ids, example.asked, strict=True)
                ]
            ]
        )
        count = int((labels[:, 1:] != IGNORED).sum())
        expected += (
            float(decoder.model(input_ids=torch.tensor([example.ids]), labels=labels).loss) * count
        )
        asked += count
    packs = can_pack(decoder)
    # OPT counts positions by itself, and gpt-oss's mask does not look at them
    assert packs == (name not in ("opt", "gpt_oss"))
    for packed in (True, False)[not packs :]:
        data = prepare(
            [Examples("a", [*examples, examples[0]])],
            max_length=64,
            held_out=1,
            packed=packed,
            batch=1,
            needed=None,
            every=False,
            seed=3,
        )
        rows = Rows([*data.train.rows, *data.held_out.rows])
        batch = Collate(packed)([rows[index] for index in range(len(rows))])
        loss = LanguageModel()(decoder.model, read_by_model(batch), batch["labels"], batch["row"])
        twice = torch.tensor(
            [
                [
                    token if flag else IGNORED
                    for token, flag in zip(examples[0].ids, examples[0].asked, strict=True)
                ]
            ]
        )
        more = float(
            decoder.model(input_ids=torch.tensor([examples[0].ids]), labels=twice).loss
        ) * int((twice[:, 1:] != IGNORED).sum())
        assert float(loss) == pytest.approx(expected + more, rel=1e-4), f"packed {packed}"


# Objectives


def test_divergence_is_the_formula_and_its_gradient_is_q_minus_p():
    draw = torch.Generator().manual_seed(0)
    mine = torch.randn(5, 11, generator=draw, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(5, 11, generator=draw, dtype=torch.float64)
    for temperature in (1.0, 2.0):
        p, q = (theirs / temperature).softmax(-1), (mine / temperature).softmax(-1)
        loss = divergence(mine, theirs, temperature)
        assert float(loss.detach()) == pytest.approx(
            temperature**2 * float((p * (p / q).log()).sum().detach()), rel=1e-4
        )
        [gradient] = torch.autograd.grad(loss, mine)
        torch.testing.assert_close(gradient, temperature * (q - p), rtol=1e-4, atol=1e-5)
    assert float(divergence(theirs, theirs)) == pytest.approx(0, abs=1e-6)


def test_divergence_of_the_most_likely_is_the_whole_where_all_are_known_and_never_more():
    draw = torch.Generator().manual_seed(0)
    mine, theirs = torch.randn(9, 20, generator=draw) * 2, torch.randn(9, 20, generator=draw) * 2
    whole = float(divergence(mine, theirs))
    found = []
    for k in (1, 4, 10, 19):
        best = theirs.log_softmax(-1).topk(k)
        found.append(float(divergence_of_most_likely(mine, best.indices, best.values)))
    # 19 known: the last is known too
    assert found == sorted(found) and found[-1] == pytest.approx(whole, rel=1e-4)
    best = theirs.log_softmax(-1).topk(20)
    assert float(divergence_of_most_likely(mine, best.indices, best.values)) == pytest.approx(
        whole, rel=1e-4
    )


def test_matching_layers_is_the_relative_error_of_hidden_states():
    mine, theirs = Decoder(build("llama")), Decoder(build("llama", seed=1))
    ids = torch.arange(24).reshape(2, 12)
    labels = ids.clone()
    labels[0, :5] = IGNORED
    objective = MatchLayers(Teacher(theirs), [(mine.stack[0], 0), (mine.stack[2], 2)])
    loss = objective(mine.model, {"input_ids": ids}, labels, torch.arange(2))
    one, other = (
        model.model(ids, output_hidden_states=True).hidden_states for model in (mine, theirs)
    )
    asked = labels[:, 1:] != IGNORED
    expected = (
        sum(
            (
                (one[i][:, :-1][asked] - other[i][:, :-1][asked]).square().sum(-1)
                / other[i][:, :-1][asked].square().sum(-1)
            ).sum()
            for i in (1, 3)
        )
        / 2
    )
    torch.testing.assert_close(loss, expected)
    assert (
        float(
            MatchLayers(Teacher(mine), [(mine.stack[1], 1)])(
                mine.model, {"input_ids": ids}, labels, torch.arange(2)
            )
        )
        == 0
    )


# The closed-form start


@pytest.mark.parametrize("pivoted", [False, True])
def test_least_squares_is_least_squares(model, calibration, pivoted):
    """Against numpy on the inputs that hooks catch, for the first matrix; and every later output is
    fitted better than it was.
    """
    fields = (
        {"ratio": 0.3, "parts": "ranks", "allocation": "uniform"}
        if pivoted
        else {"layers": (1, 2), "retain_ratio": 0.3}
    )
    made = grasp.compress(
        build("llama"), method="grasp-fisher" if pivoted else "grasp", data=calibration, **fields
    )
    small = made.decoder
    pairs = pairs_of(small, model, made.log)
    assert {pair.module.pivoted for pair in pairs} == {pivoted}
    rows = prepare(
        [Examples("a", some_examples(12))],
        max_length=48,
        held_out=1,
        packed=True,
        batch=1,
        needed=None,
        every=True,
        seed=0,
    ).train
    first = pairs[0]
    place = small.model.get_submodule(first.path)
    caught = []
    handle = place.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    batches = [Collate(True)([rows[index]]) for index in range(len(rows))]
    with torch.no_grad():
        for batch in batches:
            small.model(**read_by_model(batch))
    handle.remove()
    x = torch.cat([inputs[0] for inputs in caught]).numpy()  # tokens, in
    order = place.places.long().argsort()[place.rank :].numpy() if pivoted else slice(None)
    z, y = x @ place.weight_in.detach().numpy().T, (x @ first.dense.numpy().T)[:, order]
    best = numpy.linalg.lstsq(z, y, rcond=None)[0].T
    left = least_squares(small, pairs, rows, Collate(True), batch=1, progress=lambda *_: None)
    assert left.keys() == {pair.path for pair in pairs} and all(
        share <= 1 + 1e-9 for share in left.values()
    )
    reached = numpy.square(y - z @ place.weight.detach().numpy().T).sum()
    # the ridge costs a little
    assert reached == pytest.approx(numpy.square(y - z @ best.T).sum(), rel=1e-2)


def test_least_squares_finds_the_matrix_where_the_rank_allows_it(model, calibration):
    made = grasp.compress(
        build("llama"), method="grasp", layers=(1,), retain_ratio=0.4, data=calibration
    )
    small = made.decoder
    pairs = pairs_of(small, model, made.log)
    # a dense matrix that the pair can be: another output factor on the same input factor
    for pair in pairs:
        object.__setattr__(
            pair, "dense", (torch.randn_like(pair.module.weight) @ pair.module.weight_in).detach()
        )
    rows = prepare(
        [Examples("a", some_examples(30))],
        max_length=48,
        held_out=1,
        packed=True,
        batch=1,
        needed=None,
        every=True,
        seed=0,
    ).train
    left = least_squares(small, pairs, rows, Collate(True), batch=4, progress=lambda *_: None)
    assert max(left.values()) < 1e-3


# Recipes and hooks


def test_recipes():
    assert Recipe() == make_recipe(None, {}) == make_recipe("paper", {})
    paper = Recipe()
    assert (
        paper.epochs,
        paper.batch_size,
        paper.learning_rate,
        paper.max_length,
        paper.warmup_steps,
    ) == (1, 32, 3e-4, 256, 100)
    assert (paper.lora_rank, paper.lora_alpha, paper.lora_dropout) == (256, 16, 0.05)
    for name, fields in PRESETS.items():
        assert make_recipe(name, {}).flags() == Recipe(**fields).flags()
    assert Recipe(train="lora", keep_adapter=True, max_steps=3).flags() == [
        "--train",
        "lora",
        "--keep-adapter",
        "--max-steps",
        "3",
    ]
    assert Recipe(objective="layer").begins == "least-squares" and Recipe().begins == "keep"
    with pytest.raises(RecipeError, match=r"--lm-weight 0.5: only --objective distill"):
        Recipe(lm_weight=0.5)


def test_outputs_are_noted_within_the_block_only():
    decoder = Decoder(build("llama"))
    ids = torch.arange(6)[None]
    with Outputs([decoder.stack[1]]) as seen:
        hidden = decoder.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen.found[0], hidden[2])
    decoder.model(ids + 1)
    torch.testing.assert_close(seen.found[0], hidden[2])
