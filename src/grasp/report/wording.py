"""Numbers and settings as people read them in the report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def number(value: float | int, digits: int = 4) -> str:
    """Four significant digits, thousands apart, no exponent below a million."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}"
    places = max(0, digits - len(str(int(abs(value))))) if abs(value) >= 1 else digits
    return f"{value:,.{places}f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float | int, places: int = 1) -> str:
    """A share of one in percent."""
    return f"{100 * share:.{places}f} %"


def count(value: int) -> str:
    """Parameters: millions or billions."""
    return (
        f"{value / 1e9:,.2f} B"
        if value >= 1e9
        else f"{value / 1e6:,.1f} M"
        if value >= 1e6
        else f"{value:,}"
    )


def size(num_bytes: float | int) -> str:
    """Bytes, in powers of ten."""
    for limit, unit, places in ((1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if num_bytes >= limit:
            return f"{num_bytes / limit:,.{places}f} {unit}"
    return f"{num_bytes:,.0f} bytes"


def duration(seconds: float | int) -> str:
    """Seconds, minutes or hours."""
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 120
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def short_name(name: str) -> str:
    """A text or model by its last part where it is a path."""
    return (
        ", ".join(PurePath(part).name or part for part in name.split(","))
        if "/" in name or "\\" in name
        else name
    )


def plain(value: Any) -> str:
    """A setting's value; of a path, its last part."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return (
            ", ".join(map(plain, value))
            if len(value) <= 12
            else f"{plain(value[0])} … {plain(value[-1])} ({len(value)})"
        )
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    text = str(value)
    is_path = "://" not in text and (re.match(r"[/~$.]|\w:\\", text) or text.count("/") > 1)
    return short_name(text) if is_path else text


def settings(values: Mapping[str, Any]) -> str:
    """Names and values on one line; of a hash, its beginning."""
    told = {
        key: f"{value[:12]}…" if key.endswith("sha256") and isinstance(value, str) else plain(value)
        for key, value in values.items()
    }
    return " · ".join(
        f"{key.replace('_', ' ')} {value}"
        for key, value in told.items()
        if values[key] not in (None, "")
    )
