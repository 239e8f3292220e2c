"""A text cut into the blocks that a model is measured on.

Two protocols:

- `cut` (GPTQ's, and SVD-LLM's at 2048): the text is tokenised once and cut into blocks of `seq_len`
  tokens, the rest is dropped. In the first block every token but the first is predicted; with a
  stride below `seq_len`, blocks overlap and each later one counts its last `stride` tokens only.
- `rolling` (lm-eval's `wikitext`): every token of every document counts. A document starts after
  one prefix token; each later window of `seq_len` tokens predicts as many new ones as fit, with one
  token of context or, in the last window, more.

A model that needs its beginning-of-sequence token (`grasp.core.bos`) gets it before every block or
window; lm-eval gives it to the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grasp.core.bos import AS_TOKENISED, EVERY_BLOCK
from grasp.core.decoder import Decoder
from grasp.core.records import Text
from grasp.data.stream import Stream, check_count, stream_of, tokenizer_of
from grasp.data.tokens import LONG
from grasp.errors import DataError, RecipeError


@dataclass(frozen=True)
class Blocks:
    """`ids[i]` (seq_i,): a block, the last `fresh[i]` tokens of which are counted. `protocol` says
    how they were cut.

    `tokens_per_word` and `tokens_per_byte` of the text they cover, where it is known: they turn a
    loss a token into a loss a word.
    """

    name: str
    ids: tuple[Tensor, ...]
    fresh: tuple[int, ...]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    tokens_per_word: float | None = None
    tokens_per_byte: float | None = None


def blocks_of(
    decoder: Decoder,
    text: Text,
    *,
    seq_len: int,
    stride: int | None = None,
    num_blocks: int | None = None,
    rolling_windows: bool = False,
) -> Blocks:
    """The blocks of a text for one model's tokenizer. Raises `DataError` where it is shorter than a
    block.
    """
    if rolling_windows:
        if stride is not None:
            raise RecipeError("--rolling sets its own stride; leave out --stride")
        rows, documents = _documents(
            decoder, text, None if num_blocks is None else num_blocks * seq_len
        )
        found = rolling(
            documents,
            _prefix(decoder),
            name=text.name,
            seq_len=seq_len,
            num_blocks=num_blocks,
            bos=decoder.block_bos,
        )
        covered = "".join(rows)
        words = sum(len(row.split()) for row in rows)
        count = sum(len(document) for document in documents)
    else:
        stream = stream_of(
            decoder, text.whole, None if num_blocks is None else max(num_blocks, 0) * seq_len
        )
        found = cut(stream, name=text.name, seq_len=seq_len, stride=stride, num_blocks=num_blocks)
        # tokens from the first to the last that is covered
        count = (len(found.ids) - 1) * found.protocol["stride"] + stream.body(seq_len)
        covered = _decoded(decoder, stream.ids[:count])
        words = len(covered.split())
    return Blocks(
        found.name,
        found.ids,
        found.fresh,
        {**found.protocol, "join": text.rule},
        count / max(words, 1),
        count / max(len(covered.encode("utf-8", "replace")), 1),
    )


def _documents(decoder: Decoder, text: Text, most: int | None) -> tuple[list[str], list[Tensor]]:
    """The rows that are not blank, and their tokens; of a long text no more of them than hold
    `most` tokens.
    """
    rows, documents, tokens, read = list[str](), list[Tensor](), 0, 0
    for row in text.rows:
        if not row.strip():
            continue
        ids = stream_of(decoder, row, most).ids
        cut_short = most is not None and len(row) > LONG
        rows.append(_decoded(decoder, ids) if cut_short else row)
        documents.append(ids)
        tokens, read = tokens + len(ids), read + len(row)
        if most is not None and tokens >= most and read > LONG:
            break
    return rows, documents


def _decoded(decoder: Decoder, ids: Tensor) -> str:
    """The text that tokens stand for."""
    return str(
        tokenizer_of(decoder).decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )


def cut(
    stream: Stream,
    *,
    name: str,
    seq_len: int,
    stride: int | None = None,
    num_blocks: int | None = None,
) -> Blocks:
    """Blocks of a stream. `num_blocks`: only the first so many."""
    body = stream.body(seq_len)
    step = body if stride is None else stride
    if not 1 <= step <= body:
        raise RecipeError(f"--stride {stride}: must be from 1 to --seq-len ({body})")
    check_count("--num-blocks", num_blocks)
    stream.check_length(name, seq_len)
    available = (len(stream) - body) // step + 1
    count = min(available, num_blocks or available)
    starts = range(0, count * step, step)
    ids = [stream.block(start, seq_len) for start in starts]
    fresh = [
        len(block) - 1 if start == 0 else min(step, len(block) - 1)
        for start, block in zip(starts, ids, strict=True)
    ]
    protocol = {
        "seq_len": seq_len,
        "stride": step,
        "bos": AS_TOKENISED if stream.bos is None else EVERY_BLOCK,
    }
    return Blocks(name, tuple(ids), tuple(fresh), protocol)


def rolling(
    documents: Sequence[Tensor],
    prefix: int,
    *,
    name: str,
    seq_len: int,
    num_blocks: int | None = None,
    bos: int | None = None,
) -> Blocks:
    """Windows over whole documents, each (num_tokens,), so that every token is predicted once;
    `prefix` comes before the first, and `bos`, where a model needs it, before every later window in
    place of a token.
    """
    check_count("--num-blocks", num_blocks)
    ids, fresh = [], []
    for document in documents:
        stream = torch.cat([torch.tensor([prefix]), document])
        done = 0
        while done < len(document):
            more = min(len(document) - done, seq_len - (bos is not None and done > 0))
            end = done + more + 1  # in `stream`, where every token sits one place later
            window = stream[max(end - seq_len - 1, 0) : end]
            ids.append(
                window
                if bos is None or end <= seq_len + 1
                else torch.cat([torch.tensor([bos]), window[1:]])
            )
            fresh.append(more)
            done += more
    if not ids:
        raise DataError(f"{name}: holds no tokens")
    place = "document" if bos is None else "document and window"
    protocol = {
        "seq_len": seq_len,
        "stride": "rolling",
        "bos": f"token {prefix} before every {place}",
    }
    return Blocks(name, tuple(ids[:num_blocks]), tuple(fresh[:num_blocks]), protocol)


def _prefix(decoder: Decoder) -> int:
    """The token a document starts after: as lm-eval chooses, beginning- or else end-of-sequence."""
    tokenizer = decoder.tokenizer
    for token in (
        getattr(tokenizer, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        if token is not None:
            return int(token)
    raise DataError(
        "--rolling: the tokenizer has neither a beginning- nor an end-of-sequence token to start a"
        " document with"
    )
