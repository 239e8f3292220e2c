"""What a user should know about the calibration text before trusting what came of it: notes in
words, "" where there is nothing to say.

**How many tokens.** The statistics of the Fisher basis are square matrices, as wide as the shorter
side of the matrix they belong to. With few tokens a column they fit the calibration text only, and
the loss predicted on it is too low. Measured on smollm2, 576 wide (docs/fisher.md):

    tokens                    4,096     8,192    16,384    32,768
    tokens a column               7        14        28        57
    real / predicted rise       5.6       2.4       1.7      1.03 to 1.27

So `ENOUGH` tokens a column will do. For a width of 4,096 that is 204,800 tokens, about what others
calibrate a 7B model on.
"""

from __future__ import annotations

from collections.abc import Iterable

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.records import Calibration
from grasp.stages.curvature import Curvatures

ENOUGH = 50
"""Tokens a column of the widest statistics."""


def calibration_notes(
    decoder: Decoder, data: Calibration, collectors: Iterable[Collector]
) -> tuple[str, ...]:
    """All notes about a calibration set and what is to be fitted to it."""
    tokens = data.ids.numel() if data.mask is None else int(data.mask.sum())
    paths = frozenset[str]().union(
        *(one.paths for one in collectors if isinstance(one, Curvatures))
    )
    widths = [
        min(linear.shape)
        for layer in decoder.layers()
        for linear in layer.linears.values()
        if linear.path in paths
    ]
    notes = (too_few(tokens, data.seq_len, max(widths, default=0)), only_pydoc(data.source))
    return tuple(note for note in notes if note)


def too_few(tokens: int, seq_len: int, width: int) -> str:
    """Said where `tokens` are too few for statistics `width` columns wide."""
    enough = ENOUGH * width
    if tokens >= enough:
        return ""
    blocks = -(-enough // seq_len)
    return (
        f"{tokens:,} calibration tokens are few for statistics {width:,} columns wide: text that"
        f" they have not seen loses more than predicted ({_times(tokens / width)}); {enough:,}"
        f" would do: --num-samples {blocks:,} at --seq-len {seq_len}"
    )


def _times(tokens_a_column: float) -> str:
    """What was measured with so many tokens a column."""
    measured = (
        (5, "many times as much"),
        (10, "on smollm2 5.6 times as much"),
        (20, "on smollm2 2.4 times as much"),
    )
    return next(
        (said for most, said in measured if tokens_a_column < most),
        "on smollm2 up to 1.7 times as much",
    )


def only_pydoc(source: str) -> str:
    """Said where the only text was the embedded one."""
    if source != "pydoc":
        return ""
    return (
        "calibrated on pydoc, the Python reference: fine for a trial, poor for a model that reads"
        " other text (on smollm2 2.6 times the perplexity on WikiText-2, and 2.0 times on PTB, of a"
        " calibration on WikiText-2); name --data: a file like what the model will read, or"
        " wikitext2, c4"
    )
