"""How close a model stays to the dense one it was made from, token by token on the same blocks.

- KL(dense || model), nats a token, mean over positions: 0 where both predict alike.
- top-1 agreement: share of positions where both think the same token most likely.
- perplexity ratio: exp of the mean difference of the losses.

Perplexity on one text can hide what changed; a divergence over all predictions cannot (Dutta et al.
2024, arXiv 2407.09141). Intervals are 95 % percentile bootstrap over blocks, the same resample for
both models: positions within a block are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from scipy.stats import bootstrap
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from grasp.core.decoder import Decoder
from grasp.core.linalg import wide
from grasp.core.progress import Progress, silent
from grasp.core.score import Score
from grasp.core.sharing import by_turns
from grasp.data.blocks import Blocks
from grasp.errors import NumericsError, RecipeError
from grasp.evaluation.perplexity import block_logits, block_loss, score_of

CHUNK = 256
"""Positions whose distributions are compared at a time: two (CHUNK, vocab) tables in float32 are
held.
"""
RESAMPLES = 2000


@dataclass(frozen=True)
class Fidelity:
    """Both perplexities from one pass over the blocks, and how the models' predictions compare."""

    model: Score
    dense: Score
    divergence: Score
    agreement: Score
    ratio: Score


def check_same_tokens(decoder: Decoder, dense: Decoder) -> None:
    """Raise `RecipeError` where the two models do not read and predict the same token ids."""
    mine, other = decoder.tokenizer, dense.tokenizer
    if mine is None or other is None:
        raise RecipeError("--against: comparing two models on a text needs both their tokenizers")
    if mine.get_vocab() != other.get_vocab():
        raise RecipeError(
            f"--against {dense.source}: its tokenizer ({len(other):,} tokens) is not that of"
            f" {decoder.source} ({len(mine):,} tokens), so their predictions cannot be compared;"
            " give the model it was made from"
        )


@torch.no_grad()
def fidelity(
    decoder: Decoder, dense: Decoder, blocks: Blocks, progress: Progress = silent
) -> Fidelity:
    """Compare `model` with `dense` on blocks. Raises `NumericsError` on a non-finite loss or
    divergence.
    """
    task, count = f"against dense on {blocks.name}", len(blocks.ids)

    def compared(block: int) -> tuple[float, ...]:
        """Loss of the model, loss of the dense one, divergence, agreements."""
        progress(task, block, count)
        ids, fresh = blocks.ids[block], blocks.fresh[block]
        logits = block_logits(decoder, ids, fresh)  # fresh, vocab
        reference = block_logits(dense, ids, fresh).to(decoder.device)
        if logits.shape != reference.shape:
            raise RecipeError(
                f"--against {dense.source}: predicts {reference.shape[-1]} tokens, {decoder.source}"
                f" {logits.shape[-1]}"
            )
        losses = (
            block_loss(one, out, ids, blocks.name, block)
            for one, out in ((decoder, logits), (dense, reference))
        )
        return (*losses, *_compare(logits, reference, blocks.name, block))

    rows = by_turns(compared, count)
    progress(task, count, count)
    table, tokens = numpy.array(rows), numpy.array(blocks.fresh, dtype=float)
    mine, theirs, divergences, agreements = table.T
    protocol: dict[str, Any] = {
        **blocks.protocol,
        "num_blocks": count,
        "num_tokens": int(tokens.sum()),
        "against": dense.source,
    }

    def score(unit: str, statistic: Callable[..., Any], *columns: Any) -> Score:
        return Score(
            blocks.name,
            float(statistic(*columns)),
            unit,
            protocol,
            interval=_interval(statistic, *columns),
        )

    return Fidelity(
        score_of(decoder, blocks, mine.tolist()),
        score_of(dense, blocks, theirs.tolist()),
        score("nats/token", _mean, divergences, tokens),
        score("top-1 agreement", _mean, agreements, tokens),
        score("perplexity ratio", _ratio, mine, theirs, tokens),
    )


def _compare(logits: Tensor, reference: Tensor, name: str, block: int) -> tuple[float, float]:
    """Total KL(reference || logits) in nats and number of equal top tokens, over (fresh, vocab)."""
    divergence, agreements = 0.0, 0
    for start in range(0, len(logits), CHUNK):
        mine, theirs = (
            log_softmax(wide(part[start : start + CHUNK]), dim=-1) for part in (logits, reference)
        )
        divergence += float(kl_div(mine, theirs, reduction="sum", log_target=True))
        agreements += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
    if not numpy.isfinite(divergence):
        raise NumericsError(
            f"{name}: the divergence from the dense model in block {block} is {divergence}; try"
            " --dtype float32"
        )
    return divergence, float(agreements)


def _mean(sums: Any, tokens: Any, axis: int = -1) -> Any:
    return sums.sum(axis) / tokens.sum(axis)


def _ratio(mine: Any, theirs: Any, tokens: Any, axis: int = -1) -> Any:
    return numpy.exp((mine - theirs).sum(axis) / tokens.sum(axis))


def _interval(statistic: Callable[..., Any], *columns: Any) -> tuple[float, float] | None:
    """95 % by bootstrap over blocks; None from fewer than two."""
    if len(columns[0]) < 2:
        return None
    found = bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=numpy.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
