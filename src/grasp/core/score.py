"""A number about a model. Apart from the other records, since reading results needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One number about a model with the protocol that made it. `unit` says what it counts;
    `protocol` repeats it.

    `stderr`: standard error, where the tool that made the number gives one. `interval`: (low,
    high), 95 % by bootstrap.
    """

    name: str
    value: float
    unit: str
    protocol: Mapping[str, Any] = field(default_factory=dict)
    stderr: float | None = None
    interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The number with its protocol."""
        known: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.stderr is not None:
            known["stderr"] = self.stderr
        if self.interval is not None:
            known["interval"] = list(self.interval)
        return {**known, **self.protocol}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Score:
        """The inverse of `to_json`."""
        rest = dict(found)
        name, value, unit, stderr, interval = (
            rest.pop(key, None) for key in ("name", "value", "unit", "stderr", "interval")
        )
        between = None if interval is None else (float(interval[0]), float(interval[1]))
        return cls(
            str(name),
            float(value),
            str(unit),
            rest,
            None if stderr is None else float(stderr),
            between,
        )
