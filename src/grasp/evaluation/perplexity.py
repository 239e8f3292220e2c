"""Token perplexity: `exp` of the mean cross-entropy of the next token, over the counted tokens of
fixed blocks (`blocks.py`).

A block whose loss is not finite stops the evaluation: skipping it would flatter the model. Beside
it, in the protocol, the same loss a word and a byte of the text, which do not depend on the
tokenizer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from grasp.core.decoder import Decoder
from grasp.core.linalg import wide
from grasp.core.progress import Progress, silent
from grasp.core.score import Score
from grasp.core.sharing import by_turns
from grasp.data.blocks import Blocks
from grasp.errors import NumericsError


@torch.no_grad()
def perplexity(decoder: Decoder, blocks: Blocks, progress: Progress = silent) -> Score:
    """Perplexity of a model on blocks, of which each of several processes reads some. Raises
    `NumericsError` on a non-finite loss.
    """
    task, count = f"perplexity on {blocks.name}", len(blocks.ids)

    def loss(block: int) -> tuple[float]:
        progress(task, block, count)
        ids = blocks.ids[block]
        logits = block_logits(decoder, ids, blocks.fresh[block])
        return (block_loss(decoder, logits, ids, blocks.name, block),)

    losses = [found for (found,) in by_turns(loss, count)]
    progress(task, count, count)
    return score_of(decoder, blocks, losses)


def block_logits(decoder: Decoder, ids: Tensor, fresh: int) -> Tensor:
    """Logits (fresh, vocab) that predict the last `fresh` tokens of `ids` (seq,), in the model's
    dtype.
    """
    return decoder.model(input_ids=ids[None, :-1].to(decoder.device), use_cache=False).logits[
        0, -fresh:
    ]


def block_loss(decoder: Decoder, logits: Tensor, ids: Tensor, name: str, block: int) -> float:
    """Summed cross-entropy in nats of the last tokens of `ids` (seq,) under `logits` (fresh,
    vocab).
    """
    labels = ids[-len(logits) :].to(logits.device)
    loss = float(cross_entropy(wide(logits), labels, reduction="sum"))
    if not math.isfinite(loss):
        raise NumericsError(
            f"{name}: the loss of block {block} is {loss} (dtype {decoder.model.dtype}); non-finite"
            " blocks are never skipped; try --dtype float32"
        )
    return loss


def score_of(decoder: Decoder, blocks: Blocks, losses: list[float]) -> Score:
    """The perplexity that the summed losses of all blocks come to, with its protocol."""
    predicted = sum(blocks.fresh)
    loss = math.fsum(losses) / predicted
    protocol: dict[str, Any] = {
        **blocks.protocol,
        "num_blocks": len(blocks.ids),
        "num_tokens": predicted,
        "dtype": str(decoder.model.dtype).removeprefix("torch."),
        "loss": loss,
    }
    if blocks.tokens_per_word is not None and blocks.tokens_per_byte is not None:
        protocol["word_perplexity"] = math.exp(min(loss * blocks.tokens_per_word, 700.0))
        protocol["bits_per_byte"] = loss * blocks.tokens_per_byte / math.log(2)
    return Score(blocks.name, math.exp(min(loss, 700.0)), "perplexity", protocol)
