"""Prompts that are longer than the model reads, made shorter as text. lm-eval itself drops their
beginning, and stops where all of a text is to be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def shortened(
    text: str,
    room: int,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    *,
    head: float,
) -> str:
    """The beginning and the end of a text, of at most `room` tokens together, `head` the share of
    the beginning: 0.5 takes the middle out, 0 the beginning. A text that fits stays as it is.

    Cut between tokens and put together as text, which is then counted again: the tokens at the seam
    may be others.
    """
    ids = encode(text)
    left = room
    made, count = text, len(ids)
    while count > room:
        first = int(left * head)
        made = decode(ids[:first]) + decode(ids[len(ids) - left + first :])
        count = len(encode(made))
        left -= max(count - room, 0)
    return made
