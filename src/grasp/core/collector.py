"""A collector measures one statistic while a model reads a calibration set, as plain sums.

It hooks onto one decoder layer at a time, so the layers may come all at once (a model in memory) or
one by one with every block each (a model read from disk). Everything it has seen is in `sums`, flat
and additive: what several processes saw, each on blocks of its own, is one sum over the processes,
and `result` makes the table of that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from grasp.core.layer import Layer
from grasp.core.scratch import Scratch

LARGE = 1 << 16
"""Numbers of a sum that is kept in a file, where there is one."""


def add(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of two parts of a set together: all keys of both, tensors under one key added.
    Neither part is changed.
    """
    both = {**one, **other}
    return {
        key: one[key] + other[key] if key in one and key in other else value
        for key, value in both.items()
    }


class Collector(ABC):
    """Measures one statistic. `name` is its table in `Statistics`; `backward` asks for gradients of
    the loss.

    Every block is shown to every layer once: `begin(block, mask)`, then the passes, then
    `end(hidden)`. A layer is measured between `attach` and `detach`, in whatever order the layers
    and the blocks come.
    `sums` holds float tensors of 32 bits or wider and int64 counts. `scratch`: where large ones are
    kept; None: in memory.
    """

    name: ClassVar[str]
    backward: ClassVar[bool] = False

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.block = 0
        self.mask: Tensor | None = None
        self.scratch: Scratch | None = None
        self._attached: dict[int, ExitStack] = {}

    def begin(self, block: int, mask: Tensor | None) -> None:
        """Block number `block` of the whole set is about to be shown; `mask` (batch, seq) is True
        on real tokens, None if all are.
        """
        self.block, self.mask = block, mask

    def end(self, hidden: Tensor) -> None:
        """The block has been read; `hidden` (batch, seq, width) is what the body of the model gives
        to its head, behind the final norm.
        """

    def attach(self, layer: Layer) -> None:
        """Hook onto one layer, and ask for the gradients of its weights that are needed."""
        with ExitStack() as undo:
            self._hook(layer, undo)
            self._attached[layer.index] = undo.pop_all()

    def detach(self, layer: Layer) -> None:
        """Take off what `attach` put on; the weights' `requires_grad` and `.grad` are as before.
        Collectors that share a layer leave it in the reverse order.
        """
        self._attached.pop(layer.index).close()

    @abstractmethod
    def _hook(self, layer: Layer, undo: ExitStack) -> None:
        """Hook onto one layer; `undo` takes what will undo it."""

    def take(self, key: str, value: Tensor) -> None:
        """Begin the sum `key`, which is not there yet, with what was summed up before; `value` is
        a tensor of its own.
        """
        self.sums[key] = value

    @abstractmethod
    def result(self, sums: Mapping[str, Tensor]) -> Mapping[Any, Any]:
        """The finished table of these sums, of this collector or of several like it added up. They
        are not changed. Raises `NumericsError` where they are missing or not finite.
        """

    def _tokens(self, values: Tensor) -> Tensor:
        """(batch, seq, width), or (batch * seq, width) as in OPT's MLP -> (real tokens, width)."""
        values = values.detach().flatten(0, -2)
        return values if self.mask is None else values[self.mask.bool().flatten()]

    def _add(self, key: str, value: Tensor) -> None:
        """Add `value` to the sum `key`, which is at least float32, or int64, and a tensor of its
        own.
        """
        if key in self.sums:
            self.sums[key].add_(value.to(self.sums[key].device))
            return
        is_float = value.is_floating_point()
        dtype = torch.promote_types(value.dtype, torch.float32 if is_float else torch.int64)
        is_large = dtype == torch.float32 and value.numel() >= LARGE
        self.sums[key] = (
            self.scratch.hold(value)
            if self.scratch is not None and self.scratch.folder is not None and is_large
            else value.to(dtype, copy=True)
        )


def ask_for_gradient(parameter: nn.Parameter, undo: ExitStack) -> None:
    """Let gradients of `parameter` be computed but not kept: only hooks see them."""

    def forget(weight: Tensor) -> None:
        weight.grad = None

    def restore(requires_grad: bool, grad: Tensor | None) -> None:
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad

    undo.callback(restore, parameter.requires_grad, parameter.grad)
    parameter.requires_grad_(True)
    parameter.grad = None
    undo.callback(parameter.register_post_accumulate_grad_hook(forget).remove)


def ask_for_gradients_at(layer: Layer, undo: ExitStack) -> None:
    """Let gradients reach the input of `layer`, whether or not any weight asks for one."""

    def ask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not hidden.requires_grad:
            hidden.requires_grad_(True)

    undo.callback(layer.module.register_forward_pre_hook(ask, with_kwargs=True).remove)
