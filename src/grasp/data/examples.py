"""A text source as training examples: token ids, and which of them the model is asked for.

A row of the source is an instruction with its answer (Alpaca's columns, in Alpaca's own words), a
chat (`messages`, through the tokenizer's template), or plain text. Prompts are read, not learnt; of
plain text every token counts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grasp.core.decoder import Decoder
from grasp.data.stream import begun, encode, stream_of, tokenizer_of
from grasp.data.text import Source, cell_text, is_missing, row_texts, through_template
from grasp.errors import DataError

logger = logging.getLogger(__name__)

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n###"
    " Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Stanford Alpaca's prompts."""


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model is asked to predict it. The first never is: nothing
    comes before it.
    """

    ids: list[int]
    asked: list[bool]


@dataclass(frozen=True)
class Examples:
    """The examples of one source, and what had to be left out of them."""

    name: str
    examples: list[Example]
    without_answer: int = 0
    cut: int = 0
    cut_away: int = 0


def read_examples(
    decoder: Decoder, source: Source, *, max_length: int, text_field: str | None = None
) -> Examples:
    """Every row of `source` as at most `max_length` tokens. Raises `DataError` where nothing is
    left to learn from.
    """
    tokenizer = tokenizer_of(decoder)
    turns = [
        _turns(row, number, source.where) if text_field is None else None
        for number, row in enumerate(source.rows, start=1)
    ]
    if not any(turn is not None for turn in turns):
        text = source.join.join(row_texts(source, text_field, tokenizer))
        found = Examples(source.name, _blocks(decoder, text, max_length))
    else:
        found = _answers(decoder, source, turns, max_length)
    if not found.examples:
        reasons = []
        if found.without_answer:
            reasons.append(f"{found.without_answer:,} rows have no answer")
        if found.cut_away:
            reasons.append(
                f"{found.cut_away:,} lose all of it at --max-length {max_length}: every token would"
                " be masked"
            )
        raise DataError(
            f"{source.where}: nothing to learn from: {' and '.join(reasons) or 'it holds no text'};"
            " give rows with answers that fit"
        )
    for count, what in (
        (found.without_answer, "have no answer and were left out"),
        (found.cut, f"were cut at --max-length {max_length}"),
        (found.cut_away, f"lose their whole answer at --max-length {max_length} and were left out"),
    ):
        if count:
            logger.warning(
                "%s: %s of %s rows %s", source.where, f"{count:,}", f"{len(source.rows):,}", what
            )
    return found


def _turns(row: Any, number: int, where: str) -> Mapping[str, Any] | None:
    """The row where it asks and answers (Alpaca's columns or chat messages), None where it is plain
    text.
    """
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        if not all(isinstance(message, dict) for message in row["messages"]):
            raise DataError(
                f"{where}: row {number}: a message is not an object with role and content"
            )
        return row
    if isinstance(row, dict) and "instruction" in row and "output" in row:
        return {
            name: cell_text(row.get(name), number, where) or ""
            for name in ("instruction", "input", "output")
        }
    return None


def _answers(
    decoder: Decoder, source: Source, turns: Sequence[Mapping[str, Any] | None], max_length: int
) -> Examples:
    """Examples of rows that ask and answer; all rows must be of that kind."""
    examples, without, cut, cut_away = [], 0, 0, 0
    for number, row in enumerate(turns, start=1):
        if row is None and _is_empty(source.rows[number - 1]):
            without += 1
            continue
        if row is None:
            raise DataError(
                f"{source.where}: some rows have instruction and output, or messages, and some have"
                " not; give one kind a file"
            )
        example = (
            _chat(decoder, row["messages"], number, source.where)
            if "messages" in row
            else _alpaca(decoder, row)
        )
        if not any(example.asked):
            without += 1
            continue
        kept = Example(example.ids[:max_length], example.asked[:max_length])
        if not any(kept.asked):
            cut_away += 1
            continue
        cut += len(kept.ids) < len(example.ids)
        examples.append(kept)
    return Examples(source.name, examples, without, cut, cut_away)


def _is_empty(row: Any) -> bool:
    """Whether a row says nothing: null, or columns that are all null."""
    if isinstance(row, dict):
        return ("messages" in row and row["messages"] is None) or all(map(is_missing, row.values()))
    return is_missing(row)


def _alpaca(decoder: Decoder, row: Mapping[str, Any]) -> Example:
    """Alpaca's prompt, then the answer and an end-of-sequence token. They are tokenised apart, so
    that no token holds both.
    """
    answer = row["output"].strip()
    if not answer:
        return Example([], [])
    prompt = (PROMPT_WITH_INPUT if row["input"] else PROMPT).format(
        instruction=row["instruction"], input=row["input"]
    )
    asked_for, given = encode(decoder, prompt), encode(decoder, answer, special=False)
    ending = tokenizer_of(decoder).eos_token_id
    end = [] if ending is None else [ending]
    if asked_for[-1:] == end:  # some tokenizers end every text by themselves
        asked_for = asked_for[:-1]
    return Example(asked_for + given + end, [False] * len(asked_for) + [True] * len(given + end))


def _chat(
    decoder: Decoder, messages: Sequence[Mapping[str, Any]], number: int, where: str
) -> Example:
    """A chat through the template; what the assistant says is asked for. A turn's place is where
    the template of the chat up to it ends.
    """

    def template(some: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        if not some:
            return []
        found = through_template(
            decoder.tokenizer, some, number, where, tokenize=True, return_dict=True, **options
        )["input_ids"]
        return begun(decoder, list(found))

    ids = template(messages)
    asked = [False] * len(ids)
    for place, message in enumerate(messages):
        if message.get("role") == "assistant" and str(message.get("content") or "").strip():
            start = template(messages[:place], add_generation_prompt=True)
            end = template(messages[: place + 1])
            if ids[: len(start)] != start or ids[: len(end)] != end:
                raise DataError(
                    f"{where}: row {number}: the chat template rewrites earlier turns, so answers"
                    " cannot be told from prompts; give Alpaca columns or plain text"
                )
            asked[len(start) : len(end)] = [True] * (len(end) - len(start))
    return Example(ids, [False, *asked[1:]] if ids else [])


def _blocks(decoder: Decoder, text: str, max_length: int) -> list[Example]:
    """Plain text in blocks of `max_length` tokens, the last one shorter."""
    if not text.strip():
        return []
    stream = stream_of(decoder, text)
    starts = range(0, len(stream), stream.body(max_length))
    blocks = (stream.block(start, max_length).tolist() for start in starts)
    return [Example(ids, [False] + [True] * (len(ids) - 1)) for ids in blocks if len(ids) > 1]
