"""One small module in the place of a span of decoder layers: a linear map, or an MLP.

A file that a checkpoint carries: it needs torch and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from .reading_grasp import check_floats, check_shape

EPSILON = 1e-6
"""Added to the mean square that an MLP's input is divided by."""
SETTINGS = ("attention_type", "is_sliding", "sliding_window", "layer_idx")
"""What models read off their layers, or keep their caches by."""


class Span(nn.Module):
    """Stands in the list of layers in the place of some of them, and is called like one.

    `as_tuple`: the layers of this model return a tuple.
    """

    def __init__(self, hidden: int, as_tuple: bool):
        super().__init__()
        self.hidden = hidden
        self.as_tuple = as_tuple
        self.layer_idx: int | None = None

    def added(self, hidden_states: Tensor) -> Tensor:
        """What is added to x (batch, seq, hidden)."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x (batch, seq, hidden) -> y of the same shape."""
        self._keep_count(hidden_states, (*args, *kwargs.values()))
        output = hidden_states + self.added(hidden_states)
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

    def _record(self, **found: Any) -> dict[str, Any]:
        return {**found, "hidden": self.hidden} | ({"tuple": True} if self.as_tuple else {})


class LinearSpan(Span):
    """`y = x + Wx + b` where a span of decoder layers was: what they did on average.

    `weight` (hidden, hidden), `bias` (hidden).
    """

    def __init__(self, hidden: int, as_tuple: bool, device: Any = None, dtype: Any = None):
        super().__init__(hidden, as_tuple)
        self.weight = _empty(hidden, hidden, device=device, dtype=dtype)
        self.bias = _empty(hidden, device=device, dtype=dtype)

    def added(self, hidden_states: Tensor) -> Tensor:
        return linear(hidden_states, self.weight, self.bias)

    def record(self) -> dict[str, Any]:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        return self._record(kind="span")

    def check(self, path: str) -> None:
        """Raise `ValueError` where a weight that was read is of another shape or type."""
        check_floats(path, weight=self.weight, bias=self.bias)
        check_shape(path, self.weight, (self.hidden, self.hidden))
        check_shape(path, self.bias, (self.hidden,))


class MLPSpan(Span):
    """`y = x + down silu(up x / rms(x))` where a span of decoder layers was: a small network that
    learnt what they did.

    `up` (width, hidden), `down` (hidden, width).
    """

    def __init__(
        self, hidden: int, width: int, as_tuple: bool, device: Any = None, dtype: Any = None
    ):
        super().__init__(hidden, as_tuple)
        self.width = width
        self.up = _empty(width, hidden, device=device, dtype=dtype)
        self.down = _empty(hidden, width, device=device, dtype=dtype)

    def added(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        rms = (wide.square().mean(-1, keepdim=True) + EPSILON).sqrt()
        return linear(silu(linear((wide / rms).to(hidden_states.dtype), self.up)), self.down)

    def record(self) -> dict[str, Any]:
        """How to place it, unfilled, before weights are read (`structure_grasp`)."""
        return self._record(kind="mlp-span", width=self.width)

    def check(self, path: str) -> None:
        """Raise `ValueError` where a weight that was read is of another shape or type."""
        check_floats(path, up=self.up, down=self.down)
        check_shape(path, self.up, (self.width, self.hidden))
        check_shape(path, self.down, (self.hidden, self.width))


def _empty(*shape: int, device: Any, dtype: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)


def in_place_of(old: nn.Module, new: Span) -> Span:
    """`new` with what models read off the decoder layer `old`."""
    for module in reversed(list(old.modules())):  # the layer's own settings come last, and count
        for name in SETTINGS:
            if isinstance(getattr(module, name, None), (bool, int, str)):
                setattr(new, name, getattr(module, name))
    return new


def check_record(path: str, record: dict[str, Any]) -> None:
    """Raise `ValueError` for a record that makes no sense."""
    for key, shown in (("hidden", "hidden size"), ("width", "width")):
        if key == "width" and record["kind"] == "span":
            continue
        if type(record.get(key)) is not int or record[key] < 1:
            raise ValueError(
                f"config.json: the {shown} of '{path}' is {record.get(key)!r}; it must be a whole"
                " number, 1 or more"
            )
    if type(record.get("tuple", False)) is not bool:
        raise ValueError(f"config.json: 'tuple' of '{path}' must be true or false")


def place(path: str, old: nn.Module, record: dict[str, Any]) -> Span:
    """The module that a record describes, without memory."""
    dtype = next(old.parameters()).dtype
    told = {"as_tuple": record.get("tuple", False), "device": "meta", "dtype": dtype}
    if record["kind"] == "span":
        return in_place_of(old, LinearSpan(record["hidden"], **told))
    return in_place_of(old, MLPSpan(record["hidden"], record["width"], **told))
