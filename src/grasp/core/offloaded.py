"""The runner of a model whose layers are on the disk (`grasp.core.offload`).

A forward pass brings in one layer after the other. For a backward pass every layer is run without a
graph first, then once more with one, when the gradient comes back to it (`torch.utils.checkpoint`):
so neither weights nor activations of more than one layer are in memory. The collectors hook onto a
layer for its second run only, and see what they would see in memory.

Layers before the first at which a gradient is asked for are run once, without a graph.

New weights go to files with the edit that brings them, and the log keeps edits without tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Edit, from_spec, trial
from grasp.core.freed import given_back
from grasp.core.held import Looked
from grasp.core.journal import Journal
from grasp.core.layer import Layer
from grasp.core.lending import lent
from grasp.core.offload import Offload
from grasp.core.records import Calibration
from grasp.core.runner import Item, Resident
from grasp.core.sharing import Tensors


class Offloaded(Resident):
    """One layer is in memory at a time, and what is not in layers."""

    def __init__(self, decoder: Decoder, data: Calibration, journal: Journal | None = None):
        super().__init__(decoder, data, journal)
        assert decoder.offload is not None
        self.offload: Offload = decoder.offload
        self.journal.at_once = True
        self._standing_in: list[int] = []

    def holding(self, layer: int) -> AbstractContextManager[None]:
        if layer not in self.decoder.kept:
            return nullcontext()
        module = self.decoder.stack[self.decoder.kept.index(layer)]
        return self.offload.holding(module.parameters())

    def apply(self, edit: Edit) -> Edit:
        with self._needed(edit):
            edit.apply(self.decoder)
            self.offload.spool(self.decoder.stack)
        return from_spec(edit.spec())

    def each(
        self,
        work: Callable[[Item], Tensors],
        items: Sequence[Item],
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensors]:
        with given_back():
            yield from super().each(work, items, keep)

    def loss(self, block: int) -> tuple[Tensor, int]:
        with ExitStack() as stack:
            if torch.is_grad_enabled():
                self._attach_again((), stack)
            return super().loss(block)

    @contextmanager
    def standing_in(self, layer: int, forward: Callable[..., Any]) -> Iterator[None]:
        self._standing_in.append(layer)
        try:
            with super().standing_in(layer, forward):
                yield
        finally:
            self._standing_in.remove(layer)

    @contextmanager
    def _trial(self, edit: Edit) -> Iterator[None]:
        with ExitStack() as stack:
            with self._needed(edit):
                stack.enter_context(trial(self.decoder, edit))
            yield

    @contextmanager
    def _needed(self, edit: Edit) -> Iterator[None]:
        """Inside, the layers are in memory that an edit reads: its own, and the one before, which
        writes what its first reads. All of them where matrices are stored (in, out), as GPT-2's:
        they are turned when all have become narrow.
        """
        kept = self.decoder.kept
        places = [kept.index(layer) for layer in edit.layers if layer in kept]
        wanted = {kept[place] for one in places for place in (max(one - 1, 0), one)}
        if any(linear.transposed for linear in self.decoder.layer(kept[0]).linears.values()):
            wanted = set(kept)
        with ExitStack() as stack:
            for layer in wanted:
                stack.enter_context(self.holding(layer))
            yield

    def _attach(
        self, collectors: Sequence[Collector], stack: ExitStack, layers: Looked | None
    ) -> None:
        for collector in collectors:
            if collector.scratch is None:
                collector.scratch = self.offload.scratch()
        if any(collector.backward for collector in collectors):
            self._attach_again(collectors, stack)
        else:
            super()._attach(collectors, stack, layers)

    def _attach_again(self, collectors: Sequence[Collector], stack: ExitStack) -> None:
        """Until `stack` is left, run every layer again for its backward pass, and hook the
        collectors onto it then.
        """
        for layer in self.decoder.layers():
            if layer.index not in self._standing_in:
                forward = self._run_again(layer, collectors, stack)
                stack.enter_context(lent(layer.module, forward))

    def _run_again(
        self, layer: Layer, collectors: Sequence[Collector], stack: ExitStack
    ) -> Callable[..., Any]:
        """What stands for the forward of a layer."""
        module: nn.Module = layer.module
        forward, asks = module.forward, _asks_for_gradients(layer, collectors)

        def measured(opened: ExitStack, *args: Any, **kwargs: Any) -> Any:
            """The layer with its hooks and a graph; `opened` keeps both."""
            opened.enter_context(self.offload.holding(module.parameters()))
            for collector in collectors:
                collector.attach(layer)
                opened.callback(collector.detach, layer)
            with lent(module, forward):
                return module(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden, *rest = args or (kwargs.pop("hidden_states"),)
            opened = ExitStack()
            if not asks and not hidden.requires_grad:
                with opened:
                    return measured(opened, hidden, *rest, **kwargs)

            def both(states: Tensor) -> Any:
                if torch.is_grad_enabled():
                    return measured(opened, states, *rest, **kwargs)
                return forward(states, *rest, **kwargs)

            stack.callback(opened.close)  # where the pass does not come to its end
            if not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
            output = checkpoint(both, hidden, use_reentrant=True, preserve_rng_state=False)
            graph: Any = (output[0] if isinstance(output, tuple) else output).grad_fn
            graph.register_hook(lambda *_: opened.close())
            return output

        return run


def _asks_for_gradients(layer: Layer, collectors: Sequence[Collector]) -> bool:
    """Whether somebody asks for gradients of the layer's weights, or at its input, for which the
    collectors hook onto the layer itself (`ask_for_gradients_at`).
    """
    before = len(layer.module._forward_pre_hooks)
    with ExitStack() as stack:
        for collector in collectors:
            collector.attach(layer)
            stack.callback(collector.detach, layer)
        weights = any(parameter.requires_grad for parameter in layer.module.parameters())
        return weights or len(layer.module._forward_pre_hooks) > before
