"""LongBench: every metric against values by hand, prompts as published and cut in the middle, and
files in LongBench's own form.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from grasp.core.decoder import Decoder
from grasp.errors import DataError, RecipeError
from grasp.evaluation import longbench, tasks
from grasp.evaluation.longbench import METRICS, scored
from grasp.evaluation.tasks import check_tasks, run_tasks, summarize

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="datasets is not installed"
)
LENGTH = 256
SETS = [
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "multifieldqa_zh",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "dureader",
    "gov_report",
    "qmsum",
    "multi_news",
    "vcsum",
    "trec",
    "triviaqa",
    "samsum",
    "lsht",
    "passage_count",
    "passage_retrieval_en",
    "passage_retrieval_zh",
    "lcc",
    "repobench-p",
]
ROW = {
    "input": "IN",
    "context": "CON",
    "answers": ["yes", "no"],
    "length": 2,
    "dataset": "any",
    "language": "en",
    "all_classes": None,
    "_id": "0",
}


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Decoder:
    """A tiny Llama, one token a byte."""
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    return Decoder(transformers.AutoModelForCausalLM.from_config(config), tokenizer, "tiny")


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- metrics


@pytest.mark.parametrize(
    ("metric", "said", "right", "value"),
    [
        # 2 of 3 words said, 2 of 2 right
        ("qa_f1", "The Cat, sat down!", "a cat sat", 2 * (2 / 3) / (2 / 3 + 1)),
        ("qa_f1", "cat cat", "cat", 2 * 0.5 / 1.5),
        ("qa_f1", "dog", "cat", 0.0),
        ("qa_f1", "", "cat", 0.0),
        # 北京 of 在北京: 2 of 3 characters, marks do not count
        ("qa_f1_zh", "在北京。", "“北京”", 2 * (2 / 3) / (2 / 3 + 1)),
        ("qa_f1_zh", "共 GPT4 个", "gpt4", 2 * (1 / 3) / (1 / 3 + 1)),
        # a b d in this order: 3 of 4 words said, 3 of 3 right
        ("rouge", "a b c d", "a b d", 2 * 0.75 / 1.75),
        ("rouge", "b a", "a b", 0.5),  # one of two
        # sentences: a b | c d against c d | a b: nothing is out of order between sentences
        ("rouge", "a b. c d", "c d. a b", 1.0),
        # a word counts once: {a, b} of {a, b} and of {a, b, c}
        ("rouge", "a a a b", "a a b c", 2 * (2 / 2) * (2 / 3) / (1 + 2 / 3)),
        ("rouge", "", "a", 0.0),
        ("rouge", "...", "a", 0.0),
        ("rouge", "A b", "a b", 0.5),  # case counts
        # 会议结束 of 会议已结束: 4 of 5 said, 4 of 4 right
        ("rouge_zh", "会议已结束", "会议结束", 2 * 0.8 / 1.8),
        ("count", "There are 7, no, 8.", "7", 0.5),
        ("count", "seven", "7", 0.0),
        ("count", "17", "7", 0.0),
        ("retrieval", "Paragraph 12", "Paragraph 12", 1.0),
        ("retrieval", "1 or 12 or 3", "Paragraph 12", 1 / 3),
        ("retrieval_zh", "段落3", "段落3", 1.0),
        ("retrieval_zh", "段落30", "段落3", 0.0),
        # abcd: 4 signs in common of 4 + 6 -> 0.8; the comment is not the code
        ("code_sim", "\n# note\n```\nabcd\nrest", "abcdef", 0.8),
        ("code_sim", "x = 1", "x = 1", 1.0),
        ("code_sim", "abc", "abd", 0.67),  # 2 * 2 / 6, to a percent
        ("code_sim", "# only a note", "x", 0.0),
    ],
)
def test_metrics_by_hand(metric, said, right, value):
    assert METRICS[metric](said, right, None) == pytest.approx(value)


def test_classes_by_hand():
    classes = ["Other location", "location", "Animal", "Color"]
    of = lambda said, right: METRICS["classification"](said, right, classes)  # noqa: E731
    assert of("An Animal", "Animal") == 1
    assert of("Animal or Color", "Animal") == 0.5
    assert of("Other location", "Other location") == 1, "its part `location` does not count"
    assert of("Other location", "location") == 0.5
    assert of("a plant", "Animal") == 0


def test_the_best_of_several_right_answers_counts():
    row = {"answers": ["blue", "dark red"], "all_classes": None}
    two = scored(row, ["red"], metric="qa_f1", one_line=False)
    assert two == {"score": pytest.approx(2 / 3), "qa_f1_score": pytest.approx(2 / 3)}
    said = ["\n\nblue\nType: red"]
    assert scored(row, said, metric="qa_f1", one_line=True)["score"] == 1
    assert scored(row, said, metric="qa_f1", one_line=False)["score"] == pytest.approx(0.5)


# ---- prompts


@needs_lm_eval
def test_every_set_asks_as_published(tmp_path):
    for name in SETS:
        write(tmp_path / "longbench" / f"{name}.jsonl", [ROW])
    with tasks._quiet():
        [job] = tasks._prepare(["longbench"], tmp_path, 3, None, 0)
    made = {name.removeprefix("longbench_"): one for name, one in job.loaded["tasks"].items()}
    assert sorted(made) == sorted(SETS)
    texts = {}
    for name, task in made.items():
        [row] = task.eval_docs
        texts[name] = task.fewshot_context(row, num_fewshot=task.config.num_fewshot)
        assert task.config.num_fewshot == 0
        settings = task.config.generation_kwargs
        assert (settings["do_sample"], settings["until"]) == (False, [])
        assert "CON" in texts[name]
        no_question = ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
        assert ("IN" in texts[name]) == (name not in no_question), name
    assert {name: task.config.generation_kwargs["max_gen_toks"] for name, task in made.items()} == {
        **dict.fromkeys(SETS, 32),
        **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht"), 64),
        **dict.fromkeys(("lcc", "repobench-p"), 64),
        **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
        **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
    }
    assert texts["trec"].endswith("examples of questions.\n\nCON\nIN")
    assert texts["triviaqa"].endswith("some examples.\n\nCON\n\nIN")
    assert texts["samsum"].endswith("some examples.\n\nCON\n\nIN")
    assert texts["passage_count"].endswith("The final answer is: ")
    assert texts["passage_retrieval_en"].endswith("The answer is: ")
    assert texts["passage_retrieval_zh"].endswith("答案是：")
    assert texts["lcc"] == "Please complete the code given below. \nCONNext line of code:\n"
    assert texts["repobench-p"].endswith("\nCONINNext line of code:\n")
    metrics = {name: task.config.process_results.keywords for name, task in made.items()}
    assert {name for name, one in metrics.items() if one["one_line"]} == set(longbench.ONE_LINE)
    assert {one["metric"] for one in metrics.values()} == set(METRICS)


@needs_lm_eval
def test_a_long_prompt_loses_its_middle(model, tmp_path, caplog, monkeypatch):
    asked = []
    stock = model.model.generate
    monkeypatch.setattr(
        model.model, "generate", lambda **o: (asked.append(o["input_ids"]), stock(**o))[1]
    )
    long = {**ROW, "context": "b" * 500 + "e" * 500}
    write(tmp_path / "longbench_trec" / "test.jsonl", [ROW | {"all_classes": ["yes"]}, long])
    found = run_tasks(model, ["longbench_trec"], task_data=tmp_path, batch_size=1)
    room = LENGTH - 64
    prompt = "Please determine the type of the question below. Here are some examples of"
    prompt += f" questions.\n\n{long['context']}\nIN"
    texts = [model.tokenizer.decode(ids[0]) for ids in asked]
    half = room // 2
    assert texts[0] == prompt[:half] + prompt[len(prompt) - half :] and len(texts[0]) == room
    assert texts[0].startswith("Please determine") and texts[0].endswith("\nIN")
    assert texts[1].endswith("CON\nIN"), "one that fits is not touched"
    assert found[0].protocol["prompts_cut"] == 1 and found[0].protocol["cut"] == "middle"
    assert "longbench_trec: 1 prompts are longer than the model reads and lost their middle" in (
        caplog.text
    )


# ---- data and scores


@needs_lm_eval
def test_scores_of_the_model_s_own_answers(model, tmp_path):
    rows = [{**ROW, "input": f"{n}", "answers": [f"{n}", "b"]} for n in range(3)]
    write(tmp_path / "hotpotqa.jsonl", rows)
    first = run_tasks(model, ["longbench_hotpotqa"], task_data=tmp_path)
    assert [score.unit for score in first] == ["score", "qa_f1_score"]
    assert first[0].protocol["files"] == ["hotpotqa.jsonl"]
    assert first[0].protocol["version"] == "5.0+published"
    # asked for what the model says greedily, it is right
    text = "Answer the question based on the given passages. Only give me the answer and do not"
    text += " output any other words."
    said = []
    for row in rows:
        prompt = f"{text}\n\nThe following are given passages.\nCON\n\n{text}\n\nQuestion: "
        ids = model.tokenizer(f"{prompt}{row['input']}\nAnswer:").input_ids
        room = LENGTH - 32
        ids = ids[: room // 2] + ids[len(ids) - room // 2 :] if len(ids) > room else ids
        made = model.model.generate(
            torch.tensor([ids]), max_new_tokens=32, do_sample=False, pad_token_id=258
        )
        said.append(model.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
    answers = [{**row, "answers": [one]} for row, one in zip(rows, said, strict=True)]
    write(tmp_path / "hotpotqa.jsonl", answers)
    again = run_tasks(model, ["longbench_hotpotqa"], task_data=tmp_path, limit=2)
    right = [METRICS["qa_f1"](one, one) for one in said[:2]]
    assert again[0].value == sum(right) / 2 and max(right) == 1
    assert again[0].protocol["num_examples"] == 2 and again[0].protocol["limit"] == 2


@needs_lm_eval
def test_a_group_is_the_mean_of_its_sets(model, tmp_path):
    for name, answer in (("lcc", "x = 1"), ("repobench-p", "return")):
        write(tmp_path / "longbench" / f"{name}.jsonl", [{**ROW, "answers": [answer]}])
    found = run_tasks(model, ["longbench_code"], task_data=tmp_path)
    whole, *parts = [score for score in found if score.unit == "score"]
    assert [part.name for part in parts] == ["longbench_lcc", "longbench_repobench-p"]
    assert whole.name == "longbench_code"
    assert whole.value == pytest.approx(sum(part.value for part in parts) / 2)
    assert all(part.protocol["group"] == "longbench_code" for part in parts)
    assert summarize(found)[-1].value == whole.value


@needs_datasets
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": "yes"}, "question 1: 'answers' is str, not list"),
        ({"answers": []}, "question 1: 'answers' must hold one text or more"),
        ({"context": None}, "question 1: 'context' is NoneType, not str"),
    ],
)
def test_rows_of_another_shape(change, message):
    import datasets

    with pytest.raises(ValueError, match=message):
        longbench.as_asked(datasets.Dataset.from_list([{**ROW, **change}]))
    kept = longbench.as_asked(datasets.Dataset.from_list([ROW])).to_list()
    assert (
        kept[0]["question"] == "IN"
        and longbench.as_asked(datasets.Dataset.from_list(kept)).to_list() == kept
    ), "the hub's rows stay as they are"


@needs_lm_eval
def test_what_can_be_wrong_is_said_in_a_line(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'longbench_multi_news'"):
        check_tasks(["longbench_multinews"], tmp_path)
    with pytest.raises(
        DataError, match=r"longbench_qasper needs .*longbench_qasper/test.jsonl.*there is no"
    ):
        check_tasks(["longbench_qasper"], tmp_path)
    write(tmp_path / "longbench" / "qasper.jsonl", [{**ROW, "answers": "yes"}])
    with pytest.raises(DataError, match=r"longbench/qasper.jsonl: .*'answers' is str, not list"):
        check_tasks(["longbench_qasper"], tmp_path)
