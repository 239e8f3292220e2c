"""Perplexity mode: the choice against a direct computation of whole texts' mean losses, the words
of every set, worked examples in them, and texts that are too long.
"""

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from grasp.core.decoder import Decoder
from grasp.errors import DataError, RecipeError
from grasp.evaluation import task_rows, tasks
from grasp.evaluation.long_prompts import shortened
from grasp.evaluation.task_names import BUNDLES
from grasp.evaluation.tasks import check_tasks, run_tasks, summarize

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="datasets is not installed"
)
LENGTH = 1536


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Decoder:
    """A tiny Llama, one token a byte."""
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(5)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return Decoder(made, tokenizer, "tiny")


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def log_likelihood(model: Decoder, text: str, start: int = 0) -> float:
    """Of the bytes of a text from `start` on, after the beginning-of-sequence token."""
    ids = torch.tensor([[256, *model.tokenizer(text).input_ids]])
    with torch.no_grad():
        logs = model.model(ids[:, :-1]).logits[0].double().log_softmax(-1)
    return float(logs.gather(1, ids[0, 1:, None])[start:].sum())


def by_mean_loss(model: Decoder, texts: list[str]) -> int:
    """The text with the lowest mean loss a token, all of it counted."""
    losses = [-log_likelihood(model, text) / len(text.encode()) for text in texts]
    return losses.index(min(losses))


QA = "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
CQA = "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n"
WSC = (
    "Passage: * Ann * told Eve that # she # won.\nDoes the pronoun # she # refer to * Ann *?\nA."
    " Yes\nB. No\nAnswer: \n"
)
RACE = (
    "Read the article, and answer the question by replying A, B, C or D.\n\nArticle:\nIt"
    " rained.\n\nQ: What fell?\n\nA. rain\nB. snow\nC. hail\nD. ash\nA: "
)
RACE_ROW = {
    "article": "It rained.",
    "question": "What fell?",
    "options": ["rain", "snow", "hail", "ash"],
    "answer": "A",
}
SETS = {  # a row in the hub's columns, the texts that are compared, the right one
    "c3": (
        {"context": ["今天下雨。"], "question": "天气？", "choice": ["晴", "雨"], "answer": "雨"},
        [f"文章：今天下雨。\n问题：天气？\n答案：{one}" for one in ("晴", "雨")],
        1,
    ),
    "cmnli": (
        {"sentence1": "猫在睡觉。", "sentence2": "猫没醒。", "label": 1},
        [
            f"语句一：“猫在睡觉。”\n语句二：“猫没醒。”\n请问这两句话是什么关系？\n{one}"
            for one in ("无关", "蕴含", "矛盾")
        ],
        1,
    ),
    "chid": (
        {"content": "他#idiom#地走了。", "candidates": ["一心一意", "大摇大摆"], "answer": 1},
        [
            f"以下句子是否通顺？\n他{one}地走了。\n这个句子是通顺的。"
            for one in ("一心一意", "大摇大摆")
        ],
        1,
    ),
    "boolq_ppl": (
        {"passage": "Ice is cold.", "question": "is ice cold", "label": 1},
        [f"Ice is cold.\nQuestion: is ice cold?\n{one}" for one in ("No", "Yes")],
        1,
    ),
    "wsc_ppl": (
        {
            "text": "Ann told Eve that she won.",
            "span1_text": "Ann",
            "span1_index": 0,
            "span2_text": "she",
            "span2_index": 4,
            "label": 1,
        },
        [WSC + one for one in "AB"],
        0,
    ),
    "commonsense_qa_ppl": (
        {
            "question": "Where do fish swim?",
            "choices": {"label": ["A", "B"], "text": ["sky", "sea"]},
            "answerKey": "B",
        },
        [f"Question: Where do fish swim?\nAnswer: \n{one}" for one in ("sky", "sea")],
        1,
    ),
    "hellaswag_ppl": (
        {
            "ctx_a": "A man runs.",
            "ctx_b": "he",
            "activity_label": "Running",
            "endings": ["stops [step] now.", "flies."],
            "label": "0",
        },
        [f"A man runs. He\n{one}" for one in ("stops now.", "flies.")],
        0,
    ),
    "piqa_ppl": (
        {"goal": "boil water", "sol1": "heat it", "sol2": "cool it", "label": 0},
        [
            f"The following makes sense: \nQ: boil water\nA: {one}\n"
            for one in ("heat it", "cool it")
        ],
        0,
    ),
    "race_middle_ppl": (RACE_ROW, [RACE + one for one in "ABCD"], 0),
    "race_high_ppl": (RACE_ROW, [RACE + one for one in "ABCD"], 0),
    "mmlu_ppl_abstract_algebra": (
        {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1},
        [f"1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: {one}" for one in "ABCD"],
        1,
    ),
    "cmmlu_ppl_agronomy": (
        {"Question": "稻？", "A": "草", "B": "木", "C": "石", "D": "水", "Answer": "A"},
        [f"题目：稻？\nA. 草\nB. 木\nC. 石\nD. 水\n答案是: {one}" for one in "ABCD"],
        0,
    ),
}
SPLITS = {
    "race_middle_ppl": "test",
    "race_high_ppl": "test",
    "mmlu_ppl_abstract_algebra": "test",
    "cmmlu_ppl_agronomy": "test",
}
EXAMPLES = {  # where worked examples come from, and what stands around them
    "commonsense_qa_ppl": ("train", 8, "", "\n\n\n"),
    "mmlu_ppl_abstract_algebra": ("dev", 5, QA, "\n\n"),
    "cmmlu_ppl_agronomy": ("dev", 5, CQA, "\n\n"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every set with one question, and its worked examples: nine of the question itself."""
    home = tmp_path_factory.mktemp("ppl")
    for name, (row, _, _) in SETS.items():
        write(home / name / f"{SPLITS.get(name, 'validation')}.jsonl", [row])
        if name in EXAMPLES:
            write(home / name / f"{EXAMPLES[name][0]}.jsonl", [row] * 9)
    return home


def made(names: list[str], folder: Path) -> dict:
    with tasks._quiet():
        jobs = tasks._prepare(names, folder, None, None, 0)
    return {job.name: job.loaded["tasks"][job.name] for job in jobs}


@needs_lm_eval
def test_the_words_of_every_set(folder):
    assert {name.removesuffix("_abstract_algebra").removesuffix("_agronomy") for name in SETS} == (
        set(BUNDLES["opencompass-ppl"])
    ), "no set of the paper's table is left out"
    for name, task in made(list(SETS), folder).items():
        _, texts, right = SETS[name]
        [row] = task.eval_docs
        assert task.doc_to_choice(row) == texts, name
        assert task.doc_to_target(row) == right, name
        shots, before, between = EXAMPLES.get(name, ("", 0, "", ""))[1:]
        assert task.config.num_fewshot == shots
        context = task.fewshot_context(row, num_fewshot=shots)
        assert context == before + (texts[right] + between) * shots, name


@needs_lm_eval
def test_labels_in_the_form_of_the_published_files(tmp_path):
    boolq, wsc = SETS["boolq_ppl"][0], dict(SETS["wsc_ppl"][0])
    spans = {name: wsc.pop(name) for name in list(wsc) if name.startswith("span")}
    write(tmp_path / "boolq" / "val.jsonl", [{**boolq, "label": one} for one in (False, True)])
    write(tmp_path / "wsc" / "val.jsonl", [{**wsc, "target": spans, "label": "false"}])
    found = made(["boolq_ppl", "wsc_ppl"], tmp_path)
    [row] = found["wsc_ppl"].eval_docs
    assert [found["boolq_ppl"].doc_to_target(one) for one in found["boolq_ppl"].eval_docs] == [0, 1]
    assert found["wsc_ppl"].doc_to_choice(row) == SETS["wsc_ppl"][1]
    assert found["wsc_ppl"].doc_to_target(row) == 1


@needs_datasets
def test_spans_of_several_words_in_either_order():
    import datasets

    row = {"text": "It hurt the old man .", "span1_text": "the old man", "span1_index": 2}
    row |= {"span2_text": "It", "span2_index": 0}
    [found] = task_rows.with_marked_spans(datasets.Dataset.from_list([row])).to_list()
    assert found["marked"] == "# It # hurt * the old man * ."


@needs_lm_eval
def test_the_text_with_the_lowest_mean_loss_wins(model, tmp_path):
    draw = random.Random(0)
    words = lambda number: " ".join(draw.choice(("red", "stone", "if")) for _ in range(number))  # noqa: E731
    rows = [
        {"goal": words(2), "sol1": words(draw.randint(1, 9)), "sol2": words(3), "label": n % 2}
        for n in range(24)
    ]
    write(tmp_path / "piqa" / "validation.jsonl", rows)
    right, right_of_answers, differ = [], [], 0
    for row in rows:
        start = f"The following makes sense: \nQ: {row['goal']}\nA: "
        texts = [f"{start}{row[name]}\n" for name in ("sol1", "sol2")]
        mean = by_mean_loss(model, texts)
        answers = [
            log_likelihood(model, text, len(start)) / len(text[len(start) :]) for text in texts
        ]
        right.append(mean == row["label"])
        right_of_answers.append((answers[1] > answers[0]) == row["label"])
        differ += mean != (answers[1] > answers[0])
    found = {score.unit: score for score in run_tasks(model, ["piqa_ppl"], task_data=tmp_path)}
    assert found["acc_ppl"].value == sum(right) / 24
    assert found["acc_ppl"].stderr > 0 and found["acc_ppl"].protocol["log_softmax"] == "float32"
    assert differ > 0 and sum(right) != sum(right_of_answers), (
        "whole texts and answers alone choose differently"
    )


@needs_lm_eval
def test_worked_examples_count_like_the_rest_of_the_text(model, folder, tmp_path):
    draw = random.Random(1)
    ask = lambda: {  # noqa: E731
        "question": draw.choice(("why", "how", "who else")) + "?",
        "choices": {"label": list("ABC"), "text": [draw.choice(("a b", "cd", "e")) for _ in "ABC"]},
        "answerKey": draw.choice("ABC"),
    }
    shown, rows = [ask() for _ in range(10)], [ask() for _ in range(12)]
    write(tmp_path / "commonsense_qa_ppl" / "train.jsonl", shown)
    write(tmp_path / "commonsense_qa_ppl" / "validation.jsonl", rows)

    def texts(row: dict) -> list[str]:
        return [f"Question: {row['question']}\nAnswer: \n{one}" for one in row["choices"]["text"]]

    place = lambda row: "ABC".index(row["answerKey"])  # noqa: E731
    before = "".join(texts(row)[place(row)] + "\n\n\n" for row in shown[:8])
    right = [
        by_mean_loss(model, [before + text for text in texts(row)]) == place(row) for row in rows
    ]
    found = {s.unit: s for s in run_tasks(model, ["commonsense_qa_ppl"], task_data=tmp_path)}
    assert found["acc_ppl"].value == sum(right) / 12
    assert found["acc_ppl"].protocol["num_fewshot"] == 8


@needs_lm_eval
def test_examples_go_first_and_then_the_beginning_of_what_is_too_long(model, tmp_path, caplog):
    row = {"question": "q" * 300, "choices": ["a", "b", "c", "d"], "answer": 2}
    home = tmp_path / "mmlu_ppl_abstract_algebra"
    write(home / "dev.jsonl", [row] * 5)
    write(home / "test.jsonl", [row, {**row, "question": "r" * (LENGTH + 100)}])
    one = len("q" * 300 + "\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\n")
    kept = (LENGTH - len(QA) - one + 2) // one
    assert 0 < kept < 5, "the case that is meant"
    found = {s.unit: s for s in run_tasks(model, [home.name], task_data=tmp_path)}
    assert found["acc_ppl"].protocol["fewer_examples"] == 2
    assert found["acc_ppl"].protocol["prompts_cut"] == 4, "four options of the second question"
    assert "asked with fewer worked examples" in caplog.text
    example = "q" * 300 + "\nA. a\nB. b\nC. c\nD. d\nAnswer: "
    right = 0
    for question, before in (("q" * 300, QA + (example + "C\n\n") * kept), ("r" * 2000, "")):
        texts = [
            (before + example.replace("q" * 300, question) + letter)[-LENGTH:] for letter in "ABCD"
        ]
        right += by_mean_loss(model, texts) == 2
    assert found["acc_ppl"].value == right / 2


@needs_lm_eval
def test_a_group_of_subjects_is_their_plain_mean(model, tmp_path, monkeypatch):
    rows = {name: SETS["mmlu_ppl_abstract_algebra"][0] for name in ("anatomy", "virology")}
    # lm-eval's own folders serve too, and two subjects stand for all 57
    index = dict(tasks._index())
    parts = index["mmlu_ppl"].cfg["task"]
    assert len(parts) == 57 and len(index["cmmlu_ppl"].cfg["task"]) == 67
    group = {**index["mmlu_ppl"].cfg, "task": [f"mmlu_ppl_{name}" for name in rows]}
    index["mmlu_ppl"] = type(index["mmlu_ppl"])(
        name="mmlu_ppl", kind=index["mmlu_ppl"].kind, yaml_path=None, cfg=group
    )
    monkeypatch.setattr(tasks, "_index", lambda: index)
    draw = random.Random(3)
    for number, (name, row) in enumerate(rows.items()):
        count = 3 + 4 * number
        asked = [{**row, "question": f"{n}+1?", "answer": draw.randrange(4)} for n in range(count)]
        write(tmp_path / f"mmlu_{name}" / "test.jsonl", asked)
        write(tmp_path / f"mmlu_{name}" / "dev.jsonl", [row] * 5)
    found = run_tasks(model, ["mmlu_ppl"], task_data=tmp_path)
    whole = next(score for score in found if score.name == "mmlu_ppl")
    parts = [score for score in found if score.unit == "acc_ppl" and score.name != "mmlu_ppl"]
    assert [part.protocol["num_examples"] for part in parts] == [3, 7]
    assert whole.value == pytest.approx(sum(part.value for part in parts) / 2)
    assert whole.stderr is not None and all(p.protocol["group"] == "mmlu_ppl" for p in parts)
    assert summarize(found)[-1].value == whole.value


@needs_lm_eval
def test_the_bundle_gives_every_set_and_their_mean(model, folder):
    names = [name for name in SETS if name not in EXAMPLES]
    found = summarize(run_tasks(model, names, task_data=folder, limit=1))
    values = [score.value for score in found if score.unit == "acc_ppl"]
    assert len(values) == len(names)
    assert found[-1].value == pytest.approx(sum(values) / len(values))


@needs_lm_eval
def test_places_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(path: str, name: str | None = None, **_: object) -> None:
        asked.append((path, name))
        raise OSError("no network in this test")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in (*SETS, "longbench_multi_news"):
        with pytest.raises(DataError, match=f"{name}: its data set did not come.*no network"):
            check_tasks([name])
    assert asked == [
        ("clue/clue", "c3"),
        ("clue/clue", "cmnli"),
        ("clue/clue", "chid"),
        ("aps/super_glue", "boolq"),
        ("aps/super_glue", "wsc.fixed"),
        ("tau/commonsense_qa", None),
        ("Rowan/hellaswag", None),
        ("baber/piqa", None),
        ("ehovy/race", "middle"),
        ("ehovy/race", "high"),
        ("cais/mmlu", "abstract_algebra"),
        ("haonan-li/cmmlu", "agronomy"),
        ("Xnhyacinth/LongBench", "multi_news"),
    ]


@needs_lm_eval
def test_what_can_be_wrong_is_said_in_a_line(folder, tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'opencompass-ppl'"):
        check_tasks(["opencompas-ppl"], folder)
    with pytest.raises(DataError, match=r"boolq_ppl needs .*boolq_ppl/validation.jsonl.*passage"):
        check_tasks(["boolq_ppl"], tmp_path)
    bad = {name: value for name, value in RACE_ROW.items() if name != "options"}
    write(tmp_path / "race_high_ppl" / "test.jsonl", [RACE_ROW, bad])
    with pytest.raises(DataError, match="row 2: no column 'options'"):
        check_tasks(["race_high_ppl"], tmp_path)
    write(tmp_path / "boolq" / "val.jsonl", [{**SETS["boolq_ppl"][0], "label": 2}])
    with pytest.raises(
        DataError, match=r"cannot be asked from .*boolq/val.jsonl: .*2 is not in list"
    ):
        check_tasks(["boolq_ppl"], tmp_path)


def test_a_text_is_cut_to_the_length_between_its_ends():
    split, join = str.split, " ".join
    words = [f"w{n}" for n in range(20)]
    text = " ".join(words)
    # join leaves no blank at the seam, so two words become one there and room is not used up
    half = shortened(text, 7, split, join, head=0.5)
    assert half == "w0 w1 w2" + "w16 w17 w18 w19"
    assert shortened(text, 20, split, join, head=0.5) == text
    assert shortened(text, 5, split, join, head=0) == "w15 w16 w17 w18 w19"
    # here the seam makes more tokens than were kept: a word more goes
    longer = shortened(text, 7, lambda made: made.replace("w", " w ").split(), join, head=0.5)
    assert len(longer.replace("w", " w ").split()) <= 7
    assert longer.startswith("w") and longer.endswith("19")
