"""LongBench (Bai et al. 2023, arXiv 2308.14508): 21 sets of long texts, English, Chinese and code,
the model's greedy answer compared with the right ones.

Prompts, lengths of answers and the groups (`longbench`, and one a kind of task) are lm-eval's tasks
`longbench_<set>`. The rest follows the published code (github.com/THUDM/LongBench, `pred.py`,
`eval.py`, `metrics.py`), where lm-eval leaves it:

1. A prompt longer than the model reads, less the answer, loses its middle; lm-eval takes its
   beginning, where the instruction stands.
2. Six prompts have their published line breaks and blanks again (`REPAIRS`).
3. Where one line answers (TREC, TriviaQA, SAMSum, LSHT), the answer's first line with words counts.
4. The metrics are here, so that the packages jieba, fuzzywuzzy and rouge are not needed.
5. A set may be one local file in LongBench's own form: see `as_asked`.

Of several right answers the best match counts. Scores are from 0 to 1; published tables show 100
times that. A group's score is the plain mean over its sets.

Deviations: Chinese is compared by characters, published by the words that jieba finds, so the
three sets with F1 or ROUGE-L in Chinese (multifieldqa_zh, dureader, vcsum) are not those of
published tables. No chat template is put around the prompt (the published code does that for chat
models, but for examples and code). SAMSum's first token may be a line break (there it may not).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from typing import Any

from grasp.evaluation.long_prompts import shortened

HUB = "Xnhyacinth/LongBench"
"""The data set that lm-eval's tasks read; THUDM/LongBench with its `input` named `question`."""
REPAIRS = {
    "triviaqa": ("{{context}}\n{{", "{{context}}\n\n{{"),
    "samsum": ("{{context}}\n{{", "{{context}}\n\n{{"),
    "passage_count": ("answer is:", "answer is: "),
    "passage_retrieval_en": ("answer is:", "answer is: "),
    "lcc": ("of code:", "of code:\n"),
    "repobench-p": ("of code:", "of code:\n"),
}
ONE_LINE = ("trec", "triviaqa", "samsum", "lsht")
CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝"
    "～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—"
    "‘’‛“”„‟…‧﹏."
)


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's configuration of a set, as read from its file with functions unresolved, with all
    that this file changes.
    """
    own = config["dataset_name"].removesuffix("_e")
    metric = config["process_results"].rpartition(".get_")[2].removesuffix("_with_score")
    text = config["doc_to_text"].replace(*REPAIRS.get(own, ("", "")))
    name = config["dataset_name"]
    return {
        **config,
        "doc_to_text": text,
        "process_docs": as_asked,
        "process_results": partial(scored, metric=metric, one_line=own in ONE_LINE),
        "generation_kwargs": {**config["generation_kwargs"], "until": []},
        "num_fewshot": 0,
        "metadata": {
            **config["metadata"],
            "version": f"{config['metadata']['version']}+published",  # not lm-eval's own numbers
            "cut": "middle",
            "data_of": [f"longbench/{name}", name],
        },
    }


def as_asked(table: Any) -> Any:
    """LongBench's rows: `context`, `input` (the hub's `question`), `answers`, a list of texts, and
    `all_classes`, another (or null). Raises `ValueError` for another shape.
    """
    if "question" not in table.column_names and "input" in table.column_names:
        table = table.rename_column("input", "question")
    for number, row in enumerate(table, 1):
        for column, kind in (("context", str), ("question", str), ("answers", list)):
            if not isinstance(row.get(column), kind):
                raise ValueError(
                    f"question {number}: '{column}' is {type(row.get(column)).__name__}, not"
                    f" {kind.__name__} (LongBench's columns: context, input, answers, all_classes)"
                )
        if not row["answers"] or not all(isinstance(one, str) for one in row["answers"]):
            raise ValueError(f"question {number}: 'answers' must hold one text or more")
    return table


def cut_in_the_middle(task: Any, harness: Any, length: int) -> None:
    """Make a task's prompts of at most `length` tokens; `task.num_cut` counts those that were
    longer. Task and harness are lm-eval's.
    """
    stock = task.construct_requests
    task.num_cut = 0

    def shorter(doc: Any, ctx: str, **more: Any) -> Any:
        made = shortened(ctx, length, harness.tok_encode, harness.tok_decode, head=0.5)
        task.num_cut += made != ctx
        return stock(doc, made, **more)

    task.construct_requests = shorter


def scored(
    row: Mapping[str, Any], answers: Sequence[str], *, metric: str, one_line: bool
) -> dict[str, float]:
    """The best match of the model's answer with a right one: `score`, also under its own name."""
    said = answers[0].lstrip("\n").split("\n")[0] if one_line else answers[0]
    best = max(METRICS[metric](said, right, row.get("all_classes")) for right in row["answers"])
    return {"score": best, f"{metric}_score": best}


# ---- metrics: (the model's answer, a right one, all classes) -> 0 ... 1


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    """F1 of two bags of words."""
    same = sum((Counter(said) & Counter(right)).values())
    return 2 * same / (len(said) + len(right)) if same else 0.0


def qa_f1(said: str, right: str, _: object = None) -> float:
    """F1 over words: lower case, without punctuation and articles."""

    def words(text: str) -> list[str]:
        bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", bare).split()

    return _f1(words(said), words(right))


def characters(text: str) -> list[str]:
    """Each character a word; Latin letters and digits in a row are one."""
    return re.findall(r"[A-Za-z0-9]+|\S", text)


def qa_f1_zh(said: str, right: str, _: object = None) -> float:
    """F1 over characters: lower case, without punctuation."""

    def words(text: str) -> list[str]:
        marks = string.punctuation + CHINESE_MARKS
        return [word for word in characters(text.lower()) if word not in marks]

    return _f1(words(said), words(right))


def rouge(said: str, right: str, _: object = None) -> float:
    """ROUGE-L of summaries as the package `rouge` 1.0.1 has it: F1 of the distinct words that lie
    on a longest common subsequence of a sentence here and a sentence there.

    A sentence ends at ".", also inside a number; one of blanks only holds an empty word.
    """
    mine, theirs = (
        [part.split() or [""] for part in text.split(".") if part] for text in (said, right)
    )
    common: set[str] = set()
    for sentence in theirs:
        for other in mine:
            common |= _common(sentence, other)
    counts = [len({word for sentence in text for word in sentence}) for text in (mine, theirs)]
    return 2 * len(common) / sum(counts) if common else 0.0


def _common(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """The words of a longest common subsequence; of several, the one that `rouge` takes."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, word in enumerate(first):
        for j, other in enumerate(second):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else longer
    i, j, found = len(first), len(second), set()
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.add(first[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge_zh(said: str, right: str, _: object = None) -> float:
    """ROUGE-L over characters."""
    return rouge(" ".join(characters(said)), " ".join(characters(right)))


def classification(said: str, right: str, classes: Sequence[str] | None = None) -> float:
    """1 over the number of classes that the answer names, if the right one is among them. A class
    that is a part of the right one's name does not count.
    """
    named = [one for one in classes or [] if one in said]
    named = [one for one in named if one == right or one not in right]
    return 1 / len(named) if right in named else 0.0


def count(said: str, right: str, _: object = None) -> float:
    """Share of the right number among the numbers of the answer."""
    numbers = re.findall(r"\d+", said)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def retrieval(said: str, right: str, _: object = None) -> float:
    """`count`, of the paragraph's number: "Paragraph 7", "段落7"."""
    found = re.search(r"(?:Paragraph |段落)(\d+)", right)
    return count(said, found[1]) if found else 0.0


def code_sim(said: str, right: str, _: object = None) -> float:
    """How alike the first line of code and the right one are (`difflib`'s ratio, to a percent). A
    line with a backquote, "#" or "//" is no code.
    """
    lines = said.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(sign in one for sign in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, right).ratio()) / 100


METRICS = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval,
    "code_sim": code_sim,
}
