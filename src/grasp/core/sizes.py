"""Sizes in bytes as people write them: 8GB, 300MB, 1.5GiB."""

from __future__ import annotations

import math
import re

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30}
"""Bytes of what stands before the B."""
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]|[kmg]i)?b?", re.IGNORECASE)


def bytes_of(text: str) -> int:
    """The bytes that `text` says; 0 where it is no size."""
    found = SIZE.fullmatch(text.strip())
    return int(float(found[1]) * UNITS[(found[2] or "").lower()]) if found else 0


def at_least(num_bytes: float) -> str:
    """So many bytes, rounded up to what one would write: 91MB, 4.6GB."""
    scale, unit = next(
        (one for one in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if num_bytes >= one[0]), (1, "B")
    )
    return f"{math.ceil(num_bytes / scale * 10) / 10:g}{unit}"
