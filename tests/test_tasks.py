"""Tasks against lm-eval run directly and against plain loops; data from files; and every mistake in
one line before the model runs.
"""

import builtins
import gzip
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import math
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_several import launched
from transformers import PreTrainedTokenizerFast

import grasp
from grasp.core.decoder import Decoder
from grasp.core.models import load_model
from grasp.core.score import Score
from grasp.errors import DataError, NumericsError, RecipeError
from grasp.evaluation import shared_prefix, task_files, task_rows, tasks
from grasp.evaluation.task_questions import Answers, bootstrap_error
from grasp.evaluation.tasks import check_tasks, run_tasks, summarize

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed")
needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="datasets is not installed"
)

WORDS = ["red", "green", "blue", "stone", "river", "cloud", "seven", "quick", "table", "light"]


def sentence(draw: random.Random, length: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(length))


def write(folder: Path, task: str, split: str, rows: list) -> Path:
    """One split as JSON lines."""
    path = folder / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def four_options(draw: random.Random) -> dict:
    return {"text": [sentence(draw, draw.randint(1, 4)) for _ in range(4)], "label": list("ABCD")}


PASSAGES = [
    [
        ["女：你好吗？", "男：很好。"],
        [{"question": "男的怎么样？", "choice": ["很好", "不好", "累了"], "answer": "很好"}],
        "1-1",
    ],
    [
        ["今天下雨。"],
        [
            {"question": "天气？", "choice": ["晴", "下雨"], "answer": "下雨"},
            {"question": "何时？", "choice": ["今天", "明天", "昨天", "从不"], "answer": "今天"},
        ],
        "1-2",
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data in the hub's columns."""
    home, draw = tmp_path_factory.mktemp("task-data"), random.Random(0)
    write(
        home,
        "arc_easy",
        "test",
        [
            {
                "id": str(n),
                "question": sentence(draw, 6) + "?",
                "choices": four_options(draw),
                "answerKey": draw.choice("ABCD"),
            }
            for n in range(9)
        ],
    )
    write(
        home,
        "openbookqa",
        "test",
        [
            {
                "question_stem": sentence(draw, 5),
                "choices": four_options(draw),
                "answerKey": draw.choice("ABCD"),
            }
            for _ in range(5)
        ],
    )
    write(
        home,
        "piqa",
        "valid",
        [
            {
                "goal": sentence(draw, 5),
                "sol1": sentence(draw, 3),
                "sol2": sentence(draw, 5),
                "label": n % 2,
            }
            for n in range(7)
        ],
    )
    for split, count in (("train", 6), ("test", 3)):
        write(
            home,
            "gsm8k",
            split,
            [
                {"question": sentence(draw, 6), "answer": f"{sentence(draw, 3)}\n#### {n}"}
                for n in range(count)
            ],
        )
    for part, count in (("bio", 3), ("chem", 5), ("cyber", 4)):
        write(
            home,
            f"wmdp_{part}",
            "test",
            [
                {
                    "question": sentence(draw, 4),
                    "choices": four_options(draw)["text"],
                    "answer": draw.randrange(4),
                }
                for _ in range(count)
            ],
        )
    write(
        home,
        "wikitext",
        "test",
        [{"page": f" = {sentence(draw, 2)} = \n {sentence(draw, 30)} . \n"} for _ in range(2)],
    )
    (home / "c3").mkdir()
    (home / "c3" / "c3-m-test.json").write_text(
        json.dumps(PASSAGES, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    return home


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Decoder:
    """A tiny Llama that reads 1024 tokens."""
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
        max_position_embeddings=1024,
    )
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return Decoder(made, tokenizer, "tiny")


def values(scores: tuple[Score, ...]) -> dict[tuple[str, ...], tuple[float, float | None]]:
    return {(s.name, s.unit, s.protocol.get("filter", "none")): (s.value, s.stderr) for s in scores}


def log_likelihood(model: Decoder, context: str, continuation: str) -> float:
    """Of the continuation after the context (or, if that is empty, after the beginning-of-sequence
    token), in float64.
    """
    ids = model.tokenizer(context + continuation, add_special_tokens=False).input_ids
    start = len(model.tokenizer(context, add_special_tokens=False).input_ids)
    ids, start = ([256, *ids], 1) if start == 0 else (ids, start)
    with torch.no_grad():
        logs = model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))


# ---- against lm-eval and against plain loops


@needs_lm_eval
def test_numbers_are_those_of_lm_eval_run_directly(model, folder, monkeypatch):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.setattr(shared_prefix, "CALL", {"cpu": 1})  # also where it does not pay
    ours = run_tasks(
        model, ["arc_easy", "openbookqa", "piqa", "gsm8k"], task_data=folder, batch_size=4
    )
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs pip and git
    for name, files in {
        "arc_easy": {"test": "test"},
        "openbookqa": {"test": "test"},
        "piqa": {"validation": "valid"},
        "gsm8k": {"train": "train", "test": "test"},
    }.items():
        task = dict(load_yaml(tasks._index()[name].yaml_path))
        data = {split: str(folder / name / f"{file}.jsonl") for split, file in files.items()}
        task.update(dataset_path="json", dataset_name=None, dataset_kwargs={"data_files": data})
        for field in ("training_split", "validation_split", "test_split"):
            task[field] = task.get(field) if task.get(field) in data else None
        wrapped = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4)
        direct = lm_eval.simple_evaluate(
            wrapped,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            log_samples=False,
        )
        found = [
            key.split(",") for key in direct["results"][name] if "," in key and "_stderr" not in key
        ]
        assert found
        for metric, filter_name in found:
            theirs = direct["results"][name]
            kept = filter_name if name == "gsm8k" else "none"
            assert values(ours)[name, metric, kept] == (
                theirs[f"{metric},{filter_name}"],
                theirs[f"{metric}_stderr,{filter_name}"],
            )
        mine = next(score for score in ours if score.name == name)
        assert mine.protocol["num_fewshot"] == direct["n-shot"][name]
        assert mine.protocol["num_examples"] == direct["n-samples"][name]["effective"]
        assert mine.protocol["version"] == direct["versions"][name]


@needs_lm_eval
def test_two_processes_share_the_questions(model_directory, folder):
    """torchrun, through lm-eval's own way of sharing: the numbers of one process, told once."""
    asked = (model_directory, "--tasks", "arc_easy,piqa", "--task-data", folder, "--json")
    told = [launched(processes, "eval", *asked, "--dtype", "float32") for processes in (1, 2)]
    one, two = (json.loads(done.stdout.splitlines()[-1])["rows"][-1] for done in told)
    assert told[1].stdout.count("\n") == told[0].stdout.count("\n")
    scores = zip(one["scores"], two["scores"], strict=True)
    assert all(mine["value"] == theirs["value"] for mine, theirs in scores)
    assert len(one["scores"]) > 2


@needs_lm_eval
def test_accuracies_of_a_plain_loop(model, folder):
    rows = [
        json.loads(line) for line in (folder / "arc_easy" / "test.jsonl").read_text().splitlines()
    ]
    right, right_norm = [], []
    for row in rows:
        options, gold = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
        logs = [
            log_likelihood(model, f"Question: {row['question']}\nAnswer:", f" {option}")
            for option in options
        ]
        right.append(max(range(4), key=lambda k: logs[k]) == gold)
        right_norm.append(max(range(4), key=lambda k: logs[k] / len(options[k])) == gold)
    found = values(run_tasks(model, ["arc_easy"], task_data=folder, batch_size=3))
    mean = sum(right) / len(right)
    assert found["arc_easy", "acc", "none"] == (
        mean,
        pytest.approx(math.sqrt(mean * (1 - mean) / (len(right) - 1))),
    )
    assert found["arc_easy", "acc_norm", "none"][0] == sum(right_norm) / len(right_norm)
    first = values(run_tasks(model, ["arc_easy"], task_data=folder, limit=4))[
        "arc_easy", "acc", "none"
    ][0]
    assert first == sum(right[:4]) / 4


@needs_lm_eval
def test_perplexity_mode_takes_the_text_with_the_lowest_loss_a_token(model, folder, tmp_path):
    right = []
    for lines, questions, _ in PASSAGES:
        for question in questions:
            texts = [
                f"文章：{' '.join(lines)}\n问题：{question['question']}\n答案：{option}"
                for option in question["choice"]
            ]
            losses = [
                -log_likelihood(model, "", text) / len(model.tokenizer(text).input_ids)
                for text in texts
            ]
            right.append(losses.index(min(losses)) == question["choice"].index(question["answer"]))
    found = run_tasks(model, ["c3"], task_data=folder)
    assert values(found)["c3", "acc_ppl", "none"][0] == sum(right) / 3
    assert {score.unit for score in found} == {"acc", "acc_norm", "acc_ppl"}
    assert found[0].protocol["num_examples"] == 3 and found[0].protocol["files"] == [
        "c3-m-test.json"
    ]
    write(
        tmp_path,
        "c3",
        "validation",
        [
            {"context": lines, **question}
            for lines, questions, _ in PASSAGES
            for question in questions
        ],
    )
    assert values(run_tasks(model, ["c3"], task_data=tmp_path)) == values(found), (
        "the hub's columns are the same questions"
    )


@needs_lm_eval
def test_losses_of_whole_texts_are_not_rounded_to_the_dtype(model, folder, monkeypatch):
    heard = []
    monkeypatch.setattr(Answers, "_check", lambda self, value: heard.append(value))
    half = Decoder(_copy(model).bfloat16(), model.tokenizer)

    def rounded(name: str) -> bool:
        heard.clear()
        run_tasks(half, [name], task_data=folder)
        return all(float(torch.tensor(value).bfloat16()) == value for value in heard)

    assert [rounded(name) for name in ("arc_easy", "c3", "wikitext")] == [True, False, False]
    assert run_tasks(half, ["c3"], task_data=folder)[0].protocol["log_softmax"] == "float32"


@needs_lm_eval
def test_words_of_our_own_tasks(model, tmp_path):
    """The texts whose loss is compared, in full."""
    write(tmp_path, "chid", "test_public", [])
    (tmp_path / "chid" / "test_public.jsonl").rename(tmp_path / "chid" / "fewclue-test.jsonl")
    write(
        tmp_path,
        "chid",
        "fewclue-test",
        [{"content": "他#idiom#地走了。", "candidates": ["一心一意", "大摇大摆"], "answer": 1}],
    )
    pair = {"sentence1": "猫在睡觉。", "sentence2": "猫没醒。"}
    write(
        tmp_path,
        "cmnli",
        "dev",
        [
            {**pair, "label": "entailment"},
            {**pair, "label": "-"},
            {**pair, "label": "contradiction"},
        ],
    )
    write(tmp_path, "ocnli", "validation", [{**pair, "label": 0}, {**pair, "label": 2}])
    with tasks._quiet():
        made = {
            job.name: job.loaded["tasks"][job.name]
            for job in tasks._prepare(["chid", "cmnli", "ocnli"], tmp_path, None, None, 0)
        }
    asked = {
        name: [(task.doc_to_choice(row), task.doc_to_target(row)) for row in task.eval_docs]
        for name, task in made.items()
    }
    relation = "语句一：“猫在睡觉。”\n语句二：“猫没醒。”\n请问这两句话是什么关系？\n"
    relations = [relation + word for word in ("无关", "蕴含", "矛盾")]
    assert asked["chid"] == [
        (
            [
                f"以下句子是否通顺？\n他{idiom}地走了。\n这个句子是通顺的。"
                for idiom in ("一心一意", "大摇大摆")
            ],
            1,
        )
    ]
    assert asked["cmnli"] == [
        (relations, 1),
        (relations, 2),
    ], "rows without an agreed label are left out"
    assert asked["ocnli"] == [(relations, 0), (relations, 2)]
    assert len(run_tasks(model, ["chid", "ocnli"], task_data=tmp_path)) == 6


@needs_lm_eval
def test_groups_give_their_own_score_and_those_of_their_parts(model, folder):
    found = run_tasks(model, ["wmdp"], task_data=folder)
    assert [score.name for score in found] == ["wmdp", "wmdp_bio", "wmdp_chem", "wmdp_cyber"]
    whole, *parts = found
    assert whole.value == pytest.approx(
        sum(part.value * part.protocol["num_examples"] for part in parts) / 12
    )
    assert whole.protocol["num_examples"] == 12 and "group" not in whole.protocol
    assert all(part.protocol["group"] == "wmdp" for part in parts)
    assert summarize(found)[-1].value == whole.value, "the parts do not count again"


@needs_lm_eval
def test_a_low_rank_model_answers_as_it_does_after_loading(folder, tmp_path, model):
    low = grasp.compress(
        Decoder(_copy(model), model.tokenizer, "tiny"),
        tmp_path / "low",
        method="grasp",
        layers=(1,),
        retain_ratio=0.3,
        data=_ids(),
    ).decoder
    found = run_tasks(low, ["arc_easy", "gsm8k"], task_data=folder, num_fewshot=0)
    assert values(
        run_tasks(
            load_model(str(tmp_path / "low")),
            ["arc_easy", "gsm8k"],
            task_data=folder,
            num_fewshot=0,
        )
    ) == values(found)


def _copy(model: Decoder) -> transformers.PreTrainedModel:
    made = transformers.AutoModelForCausalLM.from_config(model.model.config)
    made.load_state_dict(model.model.state_dict())
    return made


def _ids() -> grasp.Calibration:
    return grasp.Calibration(
        torch.randint(0, 256, (4, 20), generator=torch.Generator().manual_seed(1)), "random"
    )


# ---- how it runs


@needs_lm_eval
def test_it_says_how_far_it_is_and_nothing_else(model, folder, capfd):
    seen = []
    scores = run_tasks(
        model,
        ["arc_easy", "gsm8k", "wikitext"],
        task_data=folder,
        num_fewshot=0,
        progress=lambda *step: seen.append(step),
    )
    assert capfd.readouterr() == ("", "")
    assert [step for step in seen if step[0] == "task arc_easy"][-1] == ("task arc_easy", 36, 36)
    assert [step for step in seen if step[0] == "task gsm8k"][-1] == ("task gsm8k", 3, 3)
    assert [score.unit for score in scores if score.protocol.get("lower_is_better")] == [
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
    ]
    assert "wikitext" not in summarize(scores)[-1].protocol["metrics"]


@needs_lm_eval
def test_it_leaves_no_trace(model, folder):
    import lm_eval.api.task
    import lm_eval.utils

    names = vars(lm_eval.api.task)["tqdm"], lm_eval.utils.apply_template
    bare = PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    broken = _broken(model)
    # Python's own is also beartype's, which draws from it
    states = (np.random.get_state()[1].tolist(), torch.random.get_rng_state())
    with pytest.raises(NumericsError):
        run_tasks(Decoder(broken, bare), ["arc_easy"], task_data=folder)
    run_tasks(Decoder(model.model, bare), ["arc_easy"], task_data=folder, limit=2)
    assert bare.pad_token is None, "lm-eval sets one; the user's tokenizer is not touched"
    assert (vars(lm_eval.api.task)["tqdm"], lm_eval.utils.apply_template) == names
    assert np.random.get_state()[1].tolist() == states[0] and torch.equal(
        torch.random.get_rng_state(), states[1]
    )
    assert logging.getLogger("lm_eval").level != logging.ERROR


def _broken(model: Decoder) -> transformers.PreTrainedModel:
    made = _copy(model)
    with torch.no_grad():
        made.lm_head.weight[5] = float("nan")
    return made


@needs_lm_eval
def test_a_likelihood_that_is_not_finite_stops_it(model, folder):
    with pytest.raises(NumericsError, match=r"arc_easy: a log-likelihood is nan .*--dtype float32"):
        run_tasks(Decoder(_broken(model), model.tokenizer), ["arc_easy"], task_data=folder)


@needs_lm_eval
def test_prompts_that_were_cut_are_counted(model, tmp_path, caplog):
    spare = 1025 - len("Question: \nAnswer: a")  # the last token is predicted, not read
    rows = [
        {"goal": "q" * length, "sol1": "a", "sol2": "bb", "label": 0}
        for length in (3, spare, spare + 1)
    ]
    write(tmp_path, "piqa", "validation", rows)
    found = run_tasks(model, ["piqa"], task_data=tmp_path)
    assert found[0].protocol["prompts_cut"] == 3
    assert "piqa: 3 prompts are longer than the model reads" in caplog.text


@needs_lm_eval
def test_an_answer_longer_than_the_model_reads_is_refused(decoder, tokenizer, folder):
    small = decoder("llama")
    small.tokenizer = tokenizer
    with pytest.raises(
        RecipeError,
        match="--tasks gsm8k: asks for answers of 256 tokens, and the model reads 128 in all",
    ):
        run_tasks(small, ["gsm8k"], task_data=folder)


@needs_lm_eval
def test_worked_examples_by_the_rule_of_lm_eval(model, folder, caplog):
    with tasks._quiet():

        def shots(name: str, number: int | None) -> int:
            return (
                tasks._prepare([name], folder, number, None, 0)[0]
                .loaded["tasks"][name]
                .config.num_fewshot
            )

        assert [shots("gsm8k", number) for number in (None, 0, 2)] == [5, 0, 2]
        assert [shots("c3", number) for number in (None, 3)] == [0, 0]
    assert "--num-fewshot 3: ignored by c3, which fixes 0" in caplog.text


def test_resampling_gives_the_error_of_a_mean():
    items = [random.Random(n).random() for n in range(200)]
    mean = lambda xs: sum(xs) / len(xs)  # noqa: E731
    exact = math.sqrt(sum((x - mean(items)) ** 2 for x in items) / 199 / 200)
    assert bootstrap_error(mean, items, 1000) == pytest.approx(exact, rel=0.1)


# ---- what a user can get wrong


@needs_lm_eval
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["arc_eazy"], "--tasks arc_eazy: unknown to lm-eval 0.4.13.*did you mean 'arc_easy'"),
        (["comonsense"], "did you mean 'commonsense'"),
        ([" "], "--tasks: names no task"),
        (["humaneval"], "--tasks humaneval: runs programs that the model writes"),
        (["squadv2"], "--tasks squadv2: a Python class of lm-eval.* cannot use --task-data"),
    ],
)
def test_wrong_names(asked, message, folder):
    with pytest.raises(RecipeError, match=message) as caught:
        check_tasks(asked, folder)
    assert "\n" not in str(caught.value)


@needs_lm_eval
@pytest.mark.parametrize("options", [{"limit": 0}, {"num_fewshot": -1}, {"batch_size": 0}])
def test_wrong_numbers(options, model, folder):
    [(name, value)] = options.items()
    with pytest.raises(RecipeError, match=f"--{name.replace('_', '-')} {value}: must be"):
        run_tasks(model, ["arc_easy"], task_data=folder, **options)


@needs_lm_eval
def test_missing_data_names_the_file_and_its_columns(folder, tmp_path):
    with pytest.raises(DataError) as caught:
        check_tasks(["hellaswag"], folder)
    for part in (
        f"{folder}/hellaswag/validation.jsonl",
        "columns ctx_a, ctx_b, activity_label, endings, label",
        "Rowan/hellaswag",
        "there is no",
    ):
        assert part in str(caught.value)
    write(tmp_path, "arc-easy", "test", [])
    with pytest.raises(
        DataError,
        match=(
            r"columns question, choices.text, answerKey, choices.label, as in allenai/ai2_arc.*did"
            r" you mean 'arc-easy'"
        ),
    ):
        check_tasks(["arc_easy"], tmp_path)
    write(tmp_path, "arc_easy", "train", [])
    with pytest.raises(DataError, match=r"it holds train\.jsonl"):
        check_tasks(["arc_easy"], tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        check_tasks(["commonsense"], tmp_path / "nowhere")


@needs_lm_eval
def test_missing_worked_examples_say_what_to_do(tmp_path):
    write(tmp_path, "gsm8k", "test", [{"question": "one?", "answer": "#### 1"}])
    with pytest.raises(
        DataError,
        match=(
            r"gsm8k shows 5 worked examples from the split 'train'.*train.jsonl; add that file or"
            r" use --num-fewshot 0"
        ),
    ):
        check_tasks(["gsm8k"], tmp_path)
    check_tasks(["gsm8k"], tmp_path, num_fewshot=0)


@needs_lm_eval
def test_rows_that_cannot_be_asked(tmp_path, caplog):
    row = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    for change, message in {
        "answerKey": (
            r"arc_easy/test.jsonl, row 2: no column 'answerKey', only question, choices, answerkey;"
            r" did you mean 'answerkey'.*reads the columns question"
        ),
        "choices.label": r"row 2: no column 'choices.label', only text; arc_easy reads",
    }.items():
        bad = json.loads(json.dumps(row))
        if change == "answerKey":
            bad["answerkey"] = bad.pop("answerKey")
        else:
            del bad["choices"]["label"]
        write(tmp_path, "arc_easy", "test", [row, bad])
        with pytest.raises(DataError, match=message):
            check_tasks(["arc_easy"], tmp_path)
    write(tmp_path, "arc_easy", "test", [row, {**row, "answerKey": "Z"}])
    with pytest.raises(DataError, match="question 2: arc_easy cannot be asked"):
        check_tasks(["arc_easy"], tmp_path)
    check_tasks(["arc_easy"], tmp_path, limit=1)
    solved = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    write(tmp_path, "piqa", "validation", [solved, {**solved, "label": 2}])
    check_tasks(["piqa"], tmp_path)
    assert "piqa: 1 of 2 answers are not among the options" in caplog.text
    lettered = {
        "question": "q",
        "choices": {"text": ["a", "b", "c", "d", "e"], "label": list("ABCDE")},
        "answerKey": "a",
    }
    write(tmp_path, "commonsense_qa", "validation", [lettered])
    with pytest.raises(DataError, match="no answer is among the options"):
        check_tasks(["commonsense_qa"], tmp_path, num_fewshot=0)
    write(tmp_path, "piqa", "validation", [solved, {**solved, "label": "one"}])
    with pytest.raises(DataError, match="a column holds values of several types"):
        check_tasks(["piqa"], tmp_path)


@needs_lm_eval
def test_another_held_out_split_is_taken_with_a_warning(model, folder, tmp_path, caplog):
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "dev.jsonl").write_text(
        (folder / "arc_easy" / "test.jsonl").read_text()
    )
    found = run_tasks(model, ["arc_easy"], task_data=tmp_path)
    assert values(found) == values(run_tasks(model, ["arc_easy"], task_data=folder))
    assert "arc_easy: the task asks the split 'test'" in caplog.text and found[0].protocol[
        "files"
    ] == ["dev.jsonl"]


@needs_lm_eval
def test_without_network_a_hub_task_ends_in_one_line(monkeypatch):
    # HF_HUB_OFFLINE=1
    with pytest.raises(
        DataError, match="--tasks arc_easy: its data set did not come from the Hugging Face hub"
    ):
        check_tasks(["arc_easy"])
    monkeypatch.setattr(tasks, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tasks, "reachable", lambda: False)
    with pytest.raises(
        DataError,
        match=(
            "--tasks openbookqa: the Hugging Face hub cannot be reached; give the data as"
            " --task-data FOLDER"
        ),
    ):
        check_tasks(["commonsense"])


@needs_lm_eval
def test_the_hub_is_the_default_source(model, folder, monkeypatch):
    import datasets

    rows = [
        json.loads(line) for line in (folder / "arc_easy" / "test.jsonl").read_text().splitlines()
    ]
    asked = []

    def load_dataset(path: str, name: str | None = None, **options: object) -> dict:
        asked.append((path, name))
        return {
            split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")
        }

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = run_tasks(model, ["ai2_arc"])
    assert asked == [
        ("allenai/ai2_arc", "ARC-Challenge"),
        ("allenai/ai2_arc", "ARC-Easy"),
    ], "a tag of lm-eval is taken apart"
    local = run_tasks(model, ["arc_easy"], task_data=folder)
    assert values(tuple(score for score in found if score.name == "arc_easy")) == values(local)
    assert {score.protocol["data"] for score in found} == {"hub"} and {
        score.protocol["data"] for score in local
    } == {"local"}


def test_without_lm_eval_the_way_out_is_named(monkeypatch, model):
    # what other tests have read is kept
    monkeypatch.setattr(tasks, "_index", tasks._index.__wrapped__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(RecipeError, match=r"pip install 'grasp-llm\[tasks\]'"):
            run_tasks(model, ["arc_easy"])
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    sys.modules["lm_eval"].__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.9")
    with pytest.raises(RecipeError, match=r"needs lm-eval 0.4.13, 0.4.9 is installed"):
        check_tasks(["arc_easy"])
    check_tasks([])
    assert run_tasks(model, []) == ()


def test_a_model_without_tokenizer_is_refused(decoder):
    with pytest.raises(DataError, match="need a tokenizer"):
        run_tasks(decoder("llama"), ["arc_easy"])


# ---- files


@needs_datasets
def test_files_of_a_split(tmp_path):
    def files(*names: str, split: str) -> list[str]:
        home = tmp_path / str(len(list(tmp_path.iterdir())))
        home.mkdir()
        for name in names:
            (home / name).touch()
        return [path.name for path in task_files._find(home, split)]

    assert files("test.jsonl", "c3-m-test.json", split="test") == ["test.jsonl"]
    assert files("c3-m-test.json", "c3-d-test.json", "SOURCE.md", "latest.json", split="test") == [
        "c3-d-test.json",
        "c3-m-test.json",
    ]
    assert files("test-00001-of-00002.parquet", "test-00000-of-00002.parquet", split="test") == [
        "test-00000-of-00002.parquet",
        "test-00001-of-00002.parquet",
    ]
    assert files("valid.jsonl.gz", "train.jsonl", split="validation") == ["valid.jsonl.gz"]
    assert files("validation.json", split="dev") == [], (
        "MMLU's worked examples are not its validation set"
    )


def test_every_type_of_file_gives_the_same_rows(tmp_path):
    rows = [{"question": "Où?\u2028", "label": 1}, {"question": "二", "label": 0}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "d.json").write_text("\ufeff" + lines, encoding="utf-8")
    found = [task_files.read_rows(path) for path in sorted(tmp_path.iterdir())]
    arrow = pytest.importorskip("pyarrow")
    importlib.import_module("pyarrow.parquet").write_table(
        arrow.Table.from_pylist(rows), tmp_path / "e.parquet"
    )
    assert [*found, task_files.read_rows(tmp_path / "e.parquet")] == [rows] * 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl: cannot be read: line 2 is not JSON"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read"),
        ("a.parquet", b"no parquet", "a.parquet: cannot be read"),
        ("a.json", b"[]", "a.json: holds no rows"),
        ("a.json", b"[1, 2]", "a.json, row 1: not a JSON object with columns but int"),
        ("a.json", b"[[1, 2]]", "a.json: neither rows with columns nor passages"),
        ("a.jsonl", b"\xff\xfe", "a.jsonl: cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        task_files.read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_columns_that_a_task_reads():
    def options(doc):
        return [doc["left"], doc["right"]]

    def prepare(table):
        def one(row):
            row["query"] = row["context"].strip()
            return {"choices": row["endings"], **row}

        return table.map(one)

    config = {
        "doc_to_text": "{{a.b.strip()}} {{question.strip()}}{% for x in items %}{{x}}{% endfor %}",
        "doc_to_target": "label",
        "doc_to_choice": options,
    }
    assert task_files.columns_read(config) == (
        ["question", "items", "a.b", "label"],
        ["left", "right"],
    )
    config = {
        "process_docs": prepare,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
    }
    assert task_files.columns_read(config) == ([], ["context", "endings", "label"])
    assert task_files.columns_read(
        {"doc_to_text": "", "doc_to_choice": ["no", "yes"], "doc_to_target": builtins.len}
    ) == ([], [])


@needs_datasets
def test_each_blank_of_clue_becomes_a_question():
    import datasets

    rows = [
        {
            "content": ["甲#idiom000001#乙#idiom000002#", "丙#idiom000003#", "丁"],
            "candidates": ["一", "二", "三"],
            "answers": {"text": ["二", "一", "三"], "candidate_id": [1, 0, 2]},
        }
    ]
    made = task_rows.one_blank_a_row(datasets.Dataset.from_list(rows)).to_list()
    assert [(row["content"], row["answer"]) for row in made] == [
        ("甲#idiom#乙一", 1),
        ("甲二乙#idiom#", 0),
        ("丙#idiom#", 2),
    ]
    assert all(row["candidates"] == ["一", "二", "三"] for row in made)


# ---- the mean and the share


def score(name: str, unit: str, value: float, stderr: float | None = 0.03, **more) -> Score:
    return Score(
        name,
        value,
        unit,
        {"harness": "lm-eval 0.4.13", "num_fewshot": 0, "limit": None, "num_examples": 100, **more},
        stderr,
    )


def test_the_mean_by_hand():
    scores = (
        score("arc_easy", "acc", 0.7),
        score("arc_easy", "acc_norm", 0.6),
        score("boolq", "acc", 0.5, 0.04),
        score("c3", "acc", 0.1),
        score("c3", "acc_ppl", 0.4, 0.0),
        score("gsm8k", "exact_match", 0.2, filter="strict-match"),
        score("gsm8k", "exact_match", 0.3, filter="flexible-extract"),
        score("wikitext", "word_perplexity", 20.0, None),
        score("wikitext", "bits_per_byte", 0.9, None, lower_is_better=True),
        score("mmlu_law", "acc", 0.9, group="mmlu"),
        Score("wikitext2", 12.0, "perplexity"),
    )
    *same, mean = summarize(scores)
    assert tuple(same) == scores
    assert (mean.name, mean.unit) == ("mean", "mean of tasks")
    assert mean.value == pytest.approx((0.6 + 0.5 + 0.4 + 0.2) / 4)
    assert mean.stderr == pytest.approx(math.sqrt(0.03**2 + 0.04**2 + 0.0 + 0.03**2) / 4)
    assert mean.protocol["metrics"] == {
        "arc_easy": "acc_norm",
        "boolq": "acc",
        "c3": "acc_ppl",
        "gsm8k": "exact_match",
    }
    assert Score.from_json(mean.to_json()) == mean
    assert summarize(summarize(scores))[-1] == mean, "a mean is not a task"
    assert summarize(scores[-1:]) == scores[-1:]
    assert summarize((score("boolq", "acc", 0.5, None), *scores[:2]))[-1].stderr is None


def test_the_share_by_hand():
    ours = (score("a", "acc", 0.45, 0.03), score("b", "acc", 0.35, 0.04))
    dense = (score("a", "acc", 0.6, 0.05), score("b", "acc", 0.4, 0.0))
    *_, mean, share = summarize(ours, dense)
    assert (mean.unit, share.unit, share.name) == ("mean of tasks", "share of dense", "mean")
    assert share.value == pytest.approx(0.4 / 0.5)
    assert share.stderr == pytest.approx(0.8 * math.sqrt((0.025 / 0.4) ** 2 + (0.025 / 0.5) ** 2))
    assert (
        share.protocol["dense_mean"] == pytest.approx(0.5)
        and "upper bound" in share.protocol["stderr_is"]
    )
    assert summarize(ours, summarize(dense))[-1] == share
    assert [s.unit for s in summarize(ours, (score("a", "acc", 0.0), score("b", "acc", 0.0)))] == [
        "acc",
        "acc",
        "mean of tasks",
    ]
    with pytest.raises(RecipeError, match="the dense model was not asked in b"):
        summarize(ours, dense[:1])
    with pytest.raises(RecipeError, match=r"was asked other questions in b .*--limit"):
        summarize(ours, (dense[0], score("b", "acc", 0.4, num_examples=20)))
