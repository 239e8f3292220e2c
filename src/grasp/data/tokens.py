"""Text -> token ids. A long text is tokenised in pieces, since a tokenizer's own record of it takes
some two hundred times its size.

Pieces overlap, and are joined where both say the same: at a place in the overlap where a token
begins in either piece and the tokens that follow are equal. So the ids are those of the whole text.
A tokenizer that does not tell where its tokens begin is given whole lines.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from grasp.core.progress import Progress, silent
from grasp.errors import DataError

PIECE, OVERLAP = 1 << 18, 4096
"""Characters of a piece, and how many more are read on both sides of it."""
LONG = 16 * PIECE
"""Characters of a text above which it is tokenised in pieces."""
AGREE = 32
"""Tokens that must be equal behind a place where pieces are joined."""


def tokenise(
    tokenizer: Any,
    text: str,
    *,
    special: bool,
    rows: int,
    most: int | None = None,
    progress: Progress = silent,
) -> Tensor:
    """The ids (num_tokens,) int64 of a text, the special tokens of the tokenizer's own around them
    where `special`.

    `rows`: how many ids the model can read. `most`: enough tokens; of a long text nothing is read
    that is not needed for them. Raises `DataError` for an id that the model cannot read.
    """
    found, count = [], 0
    for number, ids in enumerate(_pieces(tokenizer, text, special)):
        if number:
            progress("reading text", number, len(text) // PIECE + 1)
        part = numpy.asarray(ids, dtype=numpy.int32)
        check_ids(tokenizer, part, rows)
        found.append(part)
        count += len(part)
        if most is not None and count >= most:
            break
    if len(found) > 1:
        progress("reading text", len(text) // PIECE + 1, len(text) // PIECE + 1)
    return torch.from_numpy(numpy.concatenate(found)).long()


def check_ids(tokenizer: Any, ids: Any, rows: int) -> None:
    """Raise `DataError` where an id is none of the model's `rows` embeddings."""
    largest = (
        int(max(ids, default=-1)) if isinstance(ids, list) else int(ids.max()) if len(ids) else -1
    )
    if largest >= rows:
        raise DataError(
            f"the tokenizer gives id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but"
            f" the model has {rows:,} embeddings, for ids 0 to {rows - 1}: tokens were added and"
            " the embeddings not resized; use the model's own tokenizer, or"
            " model.resize_token_embeddings(len(tokenizer)) and save both"
        )


def _pieces(tokenizer: Any, text: str, special: bool) -> Iterator[list[int]]:
    """The ids of a text, piece by piece; those of a text that is not long are one."""
    if len(text) <= LONG:
        yield tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    elif getattr(tokenizer, "is_fast", False):
        yield from _overlapping(tokenizer, text, special)
    else:
        yield from _lines(tokenizer, text, special)


def _overlapping(tokenizer: Any, text: str, special: bool) -> Iterator[list[int]]:
    """Pieces of a tokenizer that tells where its tokens begin."""
    ids, starts = _encode(tokenizer, text, 0, special)
    for begin in range(PIECE, len(text), PIECE):
        more_ids, more_starts = _encode(tokenizer, text, begin, special)
        here, there = _join(ids, starts, more_ids, more_starts, begin)
        yield ids[:here]
        ids, starts = more_ids[there:], more_starts[there:]
    yield ids


def _encode(tokenizer: Any, text: str, begin: int, special: bool) -> tuple[list[int], list[int]]:
    """Ids of the piece at `begin` with what overlaps, and where in the text each begins; special
    tokens at the ends of the whole text only.
    """
    first, last = max(begin - OVERLAP, 0), min(begin + PIECE + OVERLAP, len(text))
    made = tokenizer(
        text[first:last],
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    marks, ids = made["special_tokens_mask"], made["input_ids"]
    low, high = 0, len(ids)
    while first > 0 and low < high and marks[low]:
        low += 1
    while last < len(text) and high > low and marks[high - 1]:
        high -= 1
    starts = [first + start for start, _ in made["offset_mapping"][low:high]]
    # special tokens at the end say that they begin at 0
    for place in range(len(starts) - 1, -1, -1):
        if not marks[low + place]:
            break
        starts[place] = last
    return ids[low:high], starts


def _join(
    ids: list[int], starts: list[int], more_ids: list[int], more_starts: list[int], begin: int
) -> tuple[int, int]:
    """Where the first list ends and the second goes on: the place nearest behind `begin` from which
    both say the same.
    """
    for place in range(bisect_left(starts, begin), len(ids)):
        other = bisect_left(more_starts, starts[place])
        same = min(AGREE, len(ids) - place, len(more_ids) - other)
        if (
            same
            and starts[place] != starts[place - 1]
            and ids[place : place + same] == more_ids[other : other + same]
        ):
            return place, other
    return bisect_left(starts, begin), bisect_left(more_starts, begin)


def _lines(tokenizer: Any, text: str, special: bool) -> Iterator[list[int]]:
    """Pieces that end at a line's end, or at a blank, where there is one."""
    begin = 0
    while begin < len(text):
        end = min(begin + PIECE, len(text))
        if end < len(text):
            end = next(
                (cut for mark in ("\n", " ") if (cut := text.rfind(mark, begin + 1, end)) > 0), end
            )
        yield tokenizer(
            text[begin:end], add_special_tokens=special and begin == 0, verbose=False
        ).input_ids
        begin = end
