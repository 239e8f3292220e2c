"""The axes of a decoder layer: what the rows and columns of its matrices count.

Whoever makes a layer narrower, or rotates what flows through it, must take the same places out of
every matrix that shares an axis. There are four:

- `hidden`: the width of the residual stream;
- `heads`: query heads x numbers a head, what q gives and o reads;
- `kv_heads`: key-value heads x numbers a head, what k and v give. With grouped queries, `group`
  query heads in a row read one key-value head, and a KV group goes as a whole;
- `channels`: the inner width of the MLP.

An axis is made of units, each of so many numbers: a head is one of its head width, a channel and a
hidden dimension are one of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIDDEN, HEADS, KV_HEADS, CHANNELS = "hidden", "heads", "kv_heads", "channels"

AXES = {
    "q": (HEADS, HIDDEN),
    "k": (KV_HEADS, HIDDEN),
    "v": (KV_HEADS, HIDDEN),
    "o": (HIDDEN, HEADS),
    "gate": (CHANNELS, HIDDEN),
    "up": (CHANNELS, HIDDEN),
    "down": (HIDDEN, CHANNELS),
}
"""Role of a matrix -> (axis of its rows, axis of its columns), of W (out, in)."""

STACKED, INTERLEAVED = "stacked", "interleaved"
"""How the roles of a fused matrix share its rows: one role after another, or head after head, each
with its rows of every role.
"""


WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
"""Under which names a configuration gives the inner width of the MLPs."""


def width_entry(config: Any) -> str:
    """That of them under which this one does."""
    return next((name for name in WIDTHS if getattr(config, name, None) is not None), WIDTHS[-1])


@dataclass(frozen=True)
class Sizes:
    """How long the axes of one layer are. `of(config)`: those of every layer as it was built; of a
    layer that was made narrower, `dataclasses.replace` with what is left.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """The sizes that a text model's configuration gives, under whatever names."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        # GPT-2's, where n_inner is not set
        channels = getattr(config, width_entry(config), None) or 4 * hidden
        return cls(
            hidden,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or hidden // heads,
            channels,
        )

    @property
    def group(self) -> int:
        """Query heads that read one key-value head."""
        return self.heads // self.kv_heads

    def units(self, axis: str) -> tuple[int, int]:
        """(units of an axis, numbers a unit)."""
        return {
            HIDDEN: (self.hidden, 1),
            HEADS: (self.heads, self.head_dim),
            KV_HEADS: (self.kv_heads, self.head_dim),
            CHANNELS: (self.channels, 1),
        }[axis]

    def length(self, axis: str) -> int:
        """Numbers of an axis."""
        count, size = self.units(axis)
        return count * size

    def places(self, axis: str, units: Sequence[int] | None = None) -> Tensor:
        """Where these units (None: all) lie on their axis: (units x numbers a unit,) int64."""
        count, size = self.units(axis)
        chosen = torch.arange(count) if units is None else torch.as_tensor(units, dtype=torch.long)
        return (chosen[:, None] * size + torch.arange(size)).flatten()

    def queries(self, kv_heads: Sequence[int]) -> list[int]:
        """The query heads that read these key-value heads."""
        return [head * self.group + place for head in kv_heads for place in range(self.group)]


def fused_places(roles: Sequence[str], role: str, split: str, sizes: Sizes) -> Tensor:
    """Which rows of a matrix that holds `roles` are those of `role`, in the order of the role's own
    axis: (length of that axis,) int64.
    """
    count, size = sizes.units(AXES[role][0])
    if split == INTERLEAVED:
        place = roles.index(role)
        starts = (torch.arange(count) * len(roles) + place) * size
        return (starts[:, None] + torch.arange(size)).flatten()
    before = sum(sizes.length(AXES[other][0]) for other in roles[: roles.index(role)])
    return before + torch.arange(count * size)
