"""What a user should know about the calibration text before trusting what came of it: notes in
words, "" where there is nothing to say.

**How many tokens.** The statistics of the Fisher basis are square matrices, as wide as the shorter
side of the matrix they belong to. With few tokens a column they fit the calibration text only, and
the loss on it is too low. Measured on smollm2, 576 wide, with ranks alone (docs/fisher.md):

    tokens                    4,096     8,192    16,384    32,768
    tokens a column               7        14        28        57
    real / predicted rise       5.6       2.4       1.7      1.03 to 1.27

So `ENOUGH` tokens a column will do. For a width of 4,096 that is 204,800 tokens, about what others
calibrate a 7B model on. Where the loss is forecast from two halves (`grasp.stages.forecast`), the
forecast itself says whether they are too few for the size asked for (`with_few_tokens`); below
`TRUSTED` tokens a column it was not tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.records import Calibration
from grasp.stages.curvature import Curvatures

TRUSTED, ENOUGH = 10, 50
"""Tokens a column of the widest statistics."""


def calibration_notes(
    decoder: Decoder, data: Calibration, collectors: Iterable[Collector]
) -> tuple[str, ...]:
    """All notes about a calibration set and what is to be fitted to it."""
    curvatures = [one for one in collectors if isinstance(one, Curvatures)]
    paths = frozenset[str]().union(*(one.paths for one in curvatures))
    is_forecast = data.num_blocks > 1 and any(one.half is not None for one in curvatures)
    widths = [
        min(linear.shape)
        for layer in decoder.layers()
        for linear in layer.linears.values()
        if linear.path in paths
    ]
    width = max(widths, default=0)
    few = too_few(data.num_tokens, data.seq_len, width)
    if is_forecast and data.num_tokens >= TRUSTED * width:
        few = ""
    notes = (few, only_pydoc(data.source))
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


SHARE, LEAST = 1 / 3, 0.02
"""Of the rise to expect that may be there because the tokens are few, and nats a token at least."""
FALLS = 0.75
"""Power of the tokens with which that part falls: four times the tokens had a third of the gap
between a half and the other, at every size (docs/log.md).
"""


def with_few_tokens(
    notes: tuple[str, ...], data: Calibration, expected: float, seen: float
) -> tuple[str, ...]:
    """The notes, and one more where the set has so few tokens that the rise to expect of unseen
    text is far above the rise on the set, unless they say so; and how many would do. Nats a token.

    With N tokens the two are about `T + c / N^FALLS` and `T - c / N^FALLS`, so c and T follow.
    """
    gap, middle = expected - seen, (expected + seen) / 2
    if gap <= max(SHARE * expected, LEAST):
        return notes
    said = f"{data.num_tokens:,} calibration tokens are few for"
    if any(note.startswith(said) for note in notes):
        return notes
    too_much = gap * (2 - SHARE) / (2 * SHARE * middle)
    enough = math.ceil(data.num_tokens * too_much ** (1 / FALLS))
    blocks = -(-enough // data.seq_len)
    few = (
        f"{said} this size: unseen text is expected to lose {expected:.2f} nats a token, the"
        f" calibration text {seen:.2f}; {blocks * data.seq_len:,} would do: --num-samples"
        f" {blocks:,} at --seq-len {data.seq_len}"
    )
    return (few, *notes)


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
