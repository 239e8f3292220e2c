"""Rows of data sets in the form that the task files of `task_yaml` read. lm-eval calls these
functions, by their names in those files; a table is a `datasets.Dataset`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def one_blank_a_row(table: Any) -> Any:
    """CHID in the form of FewCLUE: `content` with one "#idiom#", `candidates`, `answer`. Rows in
    that form stay as they are.

    CLUE's own rows hold several passages and blanks ("#idiom000123#") that share their candidates.
    Each blank becomes a row of its passage, with the right idioms in the passage's other blanks.
    (`chid.yaml`)
    """
    if "answers" not in table.column_names:
        return table

    def split(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"content": [], "candidates": [], "answer": []}
        for passages, candidates, answers in zip(
            rows["content"], rows["candidates"], rows["answers"], strict=True
        ):
            right = iter(answers["candidate_id"])
            for passage in passages:
                blanks = [(blank, next(right)) for blank in re.findall(r"#idiom\d+#", passage)]
                for blank, answer in blanks:
                    filled = passage
                    for other, idiom in blanks:
                        filled = filled.replace(
                            other, "#idiom#" if other == blank else candidates[idiom]
                        )
                    made["content"].append(filled)
                    made["candidates"].append(candidates)
                    made["answer"].append(answer)
        return made

    return table.map(split, batched=True, remove_columns=table.column_names)


def labelled(table: Any) -> Any:
    """Without the rows whose annotators did not agree (label "-", or -1 on the hub). (`cmnli.yaml`,
    `ocnli.yaml`)
    """
    return table.filter(lambda row: row["label"] not in ("-", -1, "-1"))


def with_marked_spans(table: Any) -> Any:
    """WSC with the column `marked`: the text, with "* " and " *" around the noun and "# " and " #"
    around the pronoun. SuperGLUE's own files hold the four columns of the spans in one, `target`.
    (`wsc_ppl.yaml`)
    """

    def mark(row: Mapping[str, Any]) -> dict[str, Any]:
        spans = {
            name: (row.get("target") or row)[name]
            for name in ("span1_text", "span1_index", "span2_text", "span2_index")
        }
        words = row["text"].split(" ")
        # the later span first, so that the places of the earlier one stay
        marks = sorted(((spans["span1_index"], 1, "*"), (spans["span2_index"], 2, "#")))
        for start, number, sign in reversed(marks):
            span = spans[f"span{number}_text"]
            words[start : start + len(span.split(" "))] = [f"{sign} {span} {sign}"]
        return {"marked": " ".join(words), "noun": spans["span1_text"], "it": spans["span2_text"]}

    return table.map(mark)
