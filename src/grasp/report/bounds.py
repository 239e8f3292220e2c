"""How much of what was found a page shows: a file of results of any size makes a page that a
browser opens.

Texts and lists beyond a limit are shown in part, with a note of what was left out; the limits fall
until the whole fits in `BUDGET`.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from grasp.core.results import Result, Results

BUDGET = 2_000_000
"""Characters of the results of one file, as JSON."""
LIMITS = ((20_000, 2_000), (4_000, 500), (1_000, 200), (200, 50))
"""(longest text in characters, longest list in entries), from wide to narrow."""


def bounded(results: Results) -> Results:
    """The results with as much of their texts, rows and lists as fits; what is small enough comes
    back as it is.
    """
    whole = results.to_json()
    if _size(whole, BUDGET) < BUDGET:
        return results
    for longest, most in LIMITS:
        shown = shortened(whole, longest, most)
        if _size(shown, BUDGET) < BUDGET:
            break
    note = (
        f"the file is large: texts above {longest:,} characters and lists above {most:,} entries"
        f" ({len(results.rows):,} rows) are shown in part"
    )
    rows = tuple(Result.from_json(row) for row in shown["rows"] if isinstance(row, dict))
    return dataclasses.replace(
        results,
        rows=rows,
        about={"shown": note, **shown["about"]},
        **{name: shown[name] for name in ("title", "command", "versions", "machine")},
    )


def shortened(value: Any, longest: int, most: int) -> Any:
    """JSON with long texts cut and said to be, and of long lists and tables the first entries."""
    if isinstance(value, str):
        return (
            value
            if len(value) <= longest
            else f"{value[:longest]}… ({len(value) - longest:,} more characters)"
        )
    if isinstance(value, dict):
        return {
            shortened(key, longest, most): shortened(item, longest, most)
            for key, item in list(value.items())[:most]
        }
    if isinstance(value, (list, tuple)):
        return [shortened(item, longest, most) for item in value[:most]]
    return value


def _size(value: Any, enough: int) -> int:
    """Characters of the JSON, or `enough` as soon as there are so many."""
    count = 0
    for part in json.JSONEncoder(default=str).iterencode(value):
        count += len(part)
        if count >= enough:
            return enough
    return count
