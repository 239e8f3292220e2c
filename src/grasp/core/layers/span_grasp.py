"""One small module in the place of a span of decoder layers.

A file that a checkpoint carries: it needs torch and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .reading_grasp import check_floats, check_shape

SETTINGS = ("attention_type", "is_sliding", "sliding_window", "layer_idx")
"""What models read off their layers, or keep their caches by."""


class LinearSpan(nn.Module):
    """`y = x + Wx + b` where a span of decoder layers was: what they did on average.

    `weight` (hidden, hidden), `bias` (hidden). It stands in the list of layers and is called like
    one. `as_tuple`: the layers of this model return a tuple.
    """

    def __init__(self, hidden: int, as_tuple: bool, device: Any = None, dtype: Any = None):
        super().__init__()
        self.hidden = hidden
        self.as_tuple = as_tuple
        self.layer_idx: int | None = None
        self.weight = nn.Parameter(
            torch.empty(hidden, hidden, device=device, dtype=dtype), requires_grad=False
        )
        self.bias = nn.Parameter(
            torch.empty(hidden, device=device, dtype=dtype), requires_grad=False
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (batch, seq, hidden) -> y of the same shape."""
        self._keep_count(hidden_states, (*args, *kwargs.values()))
        output = hidden_states + linear(hidden_states, self.weight, self.bias)
        return (output,) if self.as_tuple else output

    def _keep_count(self, hidden_states: Tensor, given: tuple[Any, ...]) -> None:
        """Put one empty number a token into the key-value cache: models read off it, at the first
        layer, how many tokens were seen.
        """
        cache = next((one for one in given if hasattr(one, "get_seq_length")), None)
        if cache is not None and self.layer_idx is not None:
            batch, seq, _ = hidden_states.shape
            nothing = hidden_states.new_zeros(batch, 1, seq, 1)
            cache.update(nothing, nothing, self.layer_idx)

    def record(self) -> dict[str, Any]:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        found = {"kind": "span", "hidden": self.hidden}
        return found | ({"tuple": True} if self.as_tuple else {})

    def check(self, path: str) -> None:
        """Raise `ValueError` where a weight that was read is of another shape or type."""
        check_floats(path, weight=self.weight, bias=self.bias)
        check_shape(path, self.weight, (self.hidden, self.hidden))
        check_shape(path, self.bias, (self.hidden,))


def span_like(old: nn.Module, hidden: int, as_tuple: bool, device: Any, dtype: Any) -> LinearSpan:
    """An unfilled `LinearSpan` in the place of the decoder layer `old`."""
    new = LinearSpan(hidden, as_tuple, device, dtype)
    for module in reversed(list(old.modules())):  # the layer's own settings come last, and count
        for name in SETTINGS:
            if isinstance(getattr(module, name, None), (bool, int, str)):
                setattr(new, name, getattr(module, name))
    return new


def check_record(path: str, record: dict[str, Any]) -> None:
    """Raise `ValueError` for a record that makes no sense."""
    if type(record.get("hidden")) is not int or record["hidden"] < 1:
        raise ValueError(
            f"config.json: the hidden size of '{path}' is {record.get('hidden')!r}; it must be a"
            " whole number, 1 or more"
        )
    if type(record.get("tuple", False)) is not bool:
        raise ValueError(f"config.json: 'tuple' of '{path}' must be true or false")


def place(path: str, old: nn.Module, record: dict[str, Any]) -> LinearSpan:
    """The module that a record describes, without memory."""
    dtype = next(old.parameters()).dtype
    return span_like(old, record["hidden"], record.get("tuple", False), "meta", dtype)
