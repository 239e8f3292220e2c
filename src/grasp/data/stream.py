"""Text -> token ids, the one road: what calibration, evaluation and training read is made here, and
they only cut it.

A whole text becomes a `Stream`: its ids, and the token that every block of it must begin with, for
models that need one (`grasp.core.bos`). The tokenizer's own special tokens stand around a text only
where there is no such token. A short text by itself, a prompt or an answer, is `encode`d. Ids that
the model does not have are refused on the way, as are counts and lengths that cannot be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grasp.core.bos import num_rows
from grasp.core.decoder import Decoder
from grasp.data.tokens import check_ids, tokenise
from grasp.errors import DataError


@dataclass(frozen=True)
class Stream:
    """A text as `ids` (num_tokens,) int64. `bos`: the token in front of every block, or None; it
    counts as one of the block's tokens.
    """

    ids: Tensor
    bos: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def body(self, seq_len: int) -> int:
        """Tokens of the text in a block of `seq_len` tokens."""
        return seq_len - (self.bos is not None)

    def block(self, start: int, seq_len: int) -> Tensor:
        """The block (at most `seq_len`,) whose text begins at token `start`; shorter at the end."""
        text = self.ids[start : start + self.body(seq_len)]
        return text if self.bos is None else torch.cat([torch.tensor([self.bos]), text])

    def check_length(self, where: str, seq_len: int) -> None:
        """Raise `DataError` where the text is shorter than a block; `where` names it."""
        if len(self) < self.body(seq_len):
            raise DataError(
                f"{where}: {len(self):,} tokens are too few for one block of --seq-len {seq_len};"
                " give more text or a smaller --seq-len"
            )


def stream_of(decoder: Decoder, text: str, most: int | None = None) -> Stream:
    """The whole text for one model. `most`: so many tokens are enough. Raises `DataError` for ids
    that the model does not have.
    """
    ids = tokenise(
        tokenizer_of(decoder),
        text,
        special=decoder.block_bos is None,
        rows=num_rows(decoder.model),
        most=most,
        progress=decoder.progress,
    )
    return Stream(ids, decoder.block_bos)


def encode(decoder: Decoder, text: str, special: bool = True) -> list[int]:
    """The ids of a short text by itself; with `special` as the tokenizer begins and ends texts, and
    as the model needs them to begin.
    """
    tokenizer = tokenizer_of(decoder)
    ids = list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
    return begun(decoder, ids) if special else known(decoder, ids)


def begun(decoder: Decoder, ids: list[int]) -> list[int]:
    """Ids of a whole text, with the token in front that the model needs, where it is missing."""
    bos = decoder.block_bos
    return known(decoder, ids if bos is None or ids[:1] == [bos] else [bos, *ids])


def known(decoder: Decoder, ids: list[int]) -> list[int]:
    """The ids. Raises `DataError` for one that the model does not have."""
    check_ids(decoder.tokenizer, ids, num_rows(decoder.model))
    return ids


def tokenizer_of(decoder: Decoder) -> Any:
    """The model's tokenizer. Raises `DataError` where it has none."""
    if decoder.tokenizer is None:
        source = decoder.source
        place = f"{source} has no tokenizer files" if source else "this model has none"
        raise DataError(
            f"text needs a tokenizer, and {place}; copy tokenizer.json and those beside it there"
            " (in Python: tokenizer=...)"
        )
    return decoder.tokenizer


def check_vocabulary(decoder: Decoder) -> None:
    """Raise `DataError` where the tokenizer's own vocabulary is larger than the model's, as that of
    another model may be. Tokens that were added to it count only where a text holds them: some
    models' tokenizers name more of those than the model has.
    """
    if decoder.tokenizer is not None:
        added = set(decoder.tokenizer.get_added_vocab().values())
        own = (token for token in decoder.tokenizer.get_vocab().values() if token not in added)
        known(decoder, [max(own, default=0)])


def check_lengths(
    decoder: Decoder, num_samples: int, seq_len: int, flag: str = "--seq-len"
) -> None:
    """Raise `DataError` for block counts and lengths that cannot be; `flag` is what gave the
    length.
    """
    check_count("--num-samples", num_samples)
    limit = getattr(decoder.config, "max_position_embeddings", None)
    if seq_len < 2 or (limit is not None and seq_len > limit):
        raise DataError(
            f"{flag} {seq_len}: must be from 2 to {limit or 'the length'}, the longest the model"
            " reads"
        )


def check_count(flag: str, count: int | None) -> None:
    """Raise `DataError` for a number of blocks that cannot be. None: as many as there are."""
    if count is not None and count < 1:
        raise DataError(f"{flag} {count}: must be 1 or more")


def shares(total: int, names: Sequence[object]) -> list[int]:
    """`total` in equal parts for several texts; the first get what is over."""
    return [total // len(names) + (place < total % len(names)) for place in range(len(names))]
