"""OpenCompass's perplexity mode, as tasks of lm-eval: every option is filled into the whole prompt,
and the option whose text has the lowest mean loss a token is the model's answer.

1. A task file (`task_yaml`) gives one whole text an option: question, options, and this one as the
   answer. Its question is empty, since nothing is left to condition on.
2. Worked examples (5 of MMLU and CMMLU, 8 of CommonsenseQA) stand before it and count like the
   rest of the text. Where the model does not read that much, the last of them go first.
3. `mean loss = -log p(text) / number of tokens of the text`; the lowest wins (`acc_ppl`).

How it differs from lm-eval's multiple choice: there only the answer is scored, given the question,
in total (`acc`) or a character of the answer (`acc_norm`). Here the question counts too. Where all
options have as many tokens the answers agree. Else a long option gets a lower mean from the same
total, all the more in a short question, so the two can choose differently.

From OpenCompass (opencompass/openicl/icl_inferencer/icl_ppl_inferencer.py, models/huggingface.py)
it differs in two ways. A beginning-of-sequence token is read but is no part of the mean (there the
division counts it), and where the tokenizer puts none, the first token is predicted from lm-eval's
start token (there it is not predicted). A text that is too long loses its beginning; there it loses
its end, and with it the answer.

MMLU and CMMLU are a task a subject, of equal weight in the mean, as there.

lm-eval's objects come as arguments: nothing here imports lm-eval.
"""

from __future__ import annotations

import re
from typing import Any

from grasp.evaluation.long_prompts import shortened
from grasp.evaluation.task_names import leaves


def is_perplexity_mode(task: Any) -> bool:
    """Whether a task compares whole texts; our task files say so."""
    return bool((task.config.metadata or {}).get("perplexity_mode"))


def sums_whole_texts(task: Any) -> bool:
    """Whether the log-likelihoods must be taken in float32 whatever the model's dtype.

    lm-eval takes and adds them up in the model's own. In bfloat16 the sum over a text of hundreds
    of tokens is then a multiple of 4 or 8, more than what tells two options apart. For short
    answers lm-eval's way is kept, so that its numbers come out.
    """
    return is_perplexity_mode(task) or task.OUTPUT_TYPE == "loglikelihood_rolling"


def add_perplexity_mode(task: Any, harness: Any) -> None:
    """Give a task the metric `acc_ppl`, and whole texts, worked examples included, to score.

    Of a task, `num_shortened` counts the questions asked with fewer worked examples, `num_cut` the
    texts that were too long without any and lost their beginning.
    """
    stock_requests, stock_results = task.construct_requests, task.process_results
    scored: dict[tuple[str, ...], list[str]] = {}  # the texts of a question, by its options
    task.num_shortened = task.num_cut = 0

    def tokens(text: str) -> list[int]:
        return list(harness.tok_encode(text, add_special_tokens=False))

    def whole_texts(doc: Any, ctx: str, **more: Any) -> Any:
        options, context = task.doc_to_choice(doc), ctx
        shots = asked = task.config.num_fewshot or 0
        while shots and max(len(tokens(context + text)) for text in options) > harness.max_length:
            shots -= 1
            context = task.fewshot_context(doc, num_fewshot=shots)
        task.num_shortened += shots < asked
        texts = [
            shortened(context + text, harness.max_length, tokens, harness.tok_decode, head=0)
            for text in options
        ]
        task.num_cut += sum(
            text != context + option for text, option in zip(texts, options, strict=True)
        )
        scored[tuple(options)] = texts
        requests = stock_requests(doc, context, **more)
        for request, text in zip(requests, texts, strict=True):
            request.arguments = ("", text)
        return requests

    def with_means(row: Any, answers: list[tuple[float, bool]]) -> dict[str, Any]:
        losses = [
            -likelihood / len(tokens(text))
            for (likelihood, _), text in zip(
                answers, scored[tuple(task.doc_to_choice(row))], strict=True
            )
        ]
        return {
            **stock_results(row, answers),
            "acc_ppl": float(losses.index(min(losses)) == task.doc_to_target(row)),
        }

    task.construct_requests, task.process_results = whole_texts, with_means


def by_subject(index: dict[str, Any]) -> None:
    """Put a group of tasks, one a subject, in the place of a task file that names `subjects_of`: a
    group of lm-eval, of which only the names and places of the subjects are taken.

    `subject` in the file's metadata finds a subject's name in lm-eval's description of it.
    """
    for name, entry in list(index.items()):
        record = entry.cfg or {}
        metadata = record.get("metadata")
        if not isinstance(metadata, dict) or "subjects_of" not in metadata:
            continue
        whole = metadata["subjects_of"]
        parts = []
        for stock in leaves(whole, index):
            theirs = index[stock].cfg
            found = re.search(metadata["subject"], theirs["description"])
            assert found, f"{stock}: {theirs['description']!r} names no subject"
            part = name + stock.removeprefix(whole)
            ours = {
                **record,
                "task": part,
                "dataset_name": theirs["dataset_name"],
                "description": record["description"].format(subject=found[1]),
                "metadata": {**metadata, "data_of": [stock]},
            }
            index[part] = type(entry)(name=part, kind=entry.kind, yaml_path=None, cfg=ours)
            parts.append(part)
        group = {
            "group": name,
            "task": parts,
            "aggregate_metric_list": [{"metric": "acc_ppl", "weight_by_size": False}],
            "metadata": {"version": metadata["version"]},
        }
        index[name] = type(entry)(name=name, kind=index[whole].kind, yaml_path=None, cfg=group)
