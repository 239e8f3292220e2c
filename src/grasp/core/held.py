"""Passes that begin and end where something is looked at.

A method that goes through the layers one by one looks at one of them at a time. What lies in front
of it gives the same states as the time before, and what lies behind it is not needed. So a pass may
begin at a layer, with the states that were kept in front of it, and end behind another. Then a
method that looks at each of L layers once runs about L layers in all, not L^2.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from grasp.core.decoder import Decoder
from grasp.core.lending import lent
from grasp.core.scratch import Scratch, available_memory

Looked = tuple[int, int | None]
"""The first and the last layer that are looked at; None: to the head."""


def passes(looks: Iterable[tuple[int, int]], num_layers: int) -> float:
    """What looks at these layers cost, each as far up as the one before or further: in passes over
    all layers.
    """
    begin, layers = 0, 0
    for first, last in looks:
        layers += last + 1 - begin
        begin = first
    return layers / num_layers


class Seen(Exception):
    """The last layer that is looked at has been run."""


@dataclass
class States:
    """The hidden states in front of one layer, by block, (1, seq, width); `made_by`: the weights
    in front of it as they were.
    """

    made_by: list[tuple[Callable[[], Tensor | None], int]]
    as_tuple: bool = False
    blocks: dict[int, Tensor] = field(default_factory=dict)

    def hold(self, before: list[Tensor]) -> bool:
        """Whether the weights in front of the layer are still these, and none was changed."""
        return len(before) == len(self.made_by) and all(
            made() is now and version == now._version
            for (made, version), now in zip(self.made_by, before, strict=True)
        )


class Held:
    """The states in front of some layers of a model, in the computer's memory.

    They hold as long as nothing in front of them is changed. Those in front of lower layers go when
    new ones of a higher are there: who goes up through the layers does not come back.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.states: dict[int, States] = {}

    @contextmanager
    def passes(self, looked: Looked, num_blocks: int) -> Iterator[Pass]:
        """Inside, a pass begins at the last layer up to the first of `looked` whose states are
        held, and ends behind the last of them by raising `Seen`. Hooks that are there already see
        what they would see without. The model comes back unchanged.
        """
        first, last = looked
        self.states = {
            layer: states
            for layer, states in self.states.items()
            if layer in self.decoder.kept and states.hold(self._before(layer))
        }
        lower = [layer for layer in self.states if layer < first]
        is_new = first != self.decoder.kept[0] and first not in self.states
        if is_new:
            self.states[first] = States([(weakref.ref(p), p._version) for p in self._before(first)])
        offload = self.decoder.offload
        scratch = None if offload is None else offload.scratch()
        one = Pass(self.states, first, num_blocks, scratch)
        with ExitStack() as stack:
            for layer in self.decoder.layers():
                if layer.index < first:
                    forward = one.in_front(layer)
                    stack.enter_context(lent(layer.module, forward, partial(one.passes_by, layer)))
                if layer.index <= first:
                    hook = one.arriving(layer.index)
                    handle = layer.module.register_forward_pre_hook(
                        hook, with_kwargs=True, prepend=True
                    )
                    stack.callback(handle.remove)
                if layer.index == last:
                    stack.callback(layer.module.register_forward_hook(_end).remove)
            yield one
        for index in lower if is_new else ():
            del self.states[index]

    def _before(self, layer: int) -> list[Tensor]:
        """All weights but those of the layers from `layer` on."""
        behind = self.decoder.stack[self.decoder.kept.index(layer) :]
        own = {id(value) for value in _weights(behind)}
        return [value for value in _weights(self.decoder.model) if id(value) not in own]


class Pass:
    """One pass after another from where states are held; each begins with `begin`. `scratch`: where
    new ones are kept, if not in memory.
    """

    def __init__(
        self, states: dict[int, States], first: int, num_blocks: int, scratch: Scratch | None
    ):
        self.states, self.first, self.num_blocks = states, first, num_blocks
        self.scratch = scratch
        self.block, self.start, self.as_tuple = 0, -1, False

    def begin(self, block: int) -> None:
        """Block number `block` is about to be shown."""
        held = (
            n for n, states in self.states.items() if n <= self.first and block in states.blocks
        )
        self.block, self.start = block, max(held, default=-1)

    def passes_by(self, layer: Any) -> bool:
        """Whether states behind this layer are held, so that it need not run."""
        return bool(layer.index < self.start)

    def in_front(self, layer: Any) -> Callable[..., Any]:
        """What a layer in front of the first that is looked at does: nothing, where states behind
        it are held.
        """
        run = layer.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.passes_by(layer):
                hidden = args[0] if args else kwargs["hidden_states"]
                return (hidden,) if self.states[self.start].as_tuple else hidden
            output = run(*args, **kwargs)
            self.as_tuple = isinstance(output, tuple)
            return output

        return forward

    def arriving(self, layer: int) -> Callable[..., Any]:
        """A hook in front of a layer: puts in the states that are held, keeps others."""

        def hook(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if layer == self.start:
                given = args[0] if args else kwargs["hidden_states"]
                hidden = self.states[layer].blocks[self.block].to(given)
                if args:
                    return (hidden, *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": hidden}
            if layer == self.first and layer in self.states:
                self._keep(args[0] if args else kwargs["hidden_states"])
            return None

        return hook

    def _keep(self, hidden: Tensor) -> None:
        """Keep the states of one block; none where those of all would fill the memory."""
        states, free = self.states[self.first], available_memory()
        to_come = (self.num_blocks - len(states.blocks)) * hidden.numel() * hidden.element_size()
        if self.scratch is not None:
            states.blocks[self.block] = self.scratch.hold(hidden.detach())
        elif free is None or to_come < free / 2:
            states.blocks[self.block] = hidden.detach().to("cpu", copy=True)
        states.as_tuple = self.as_tuple


def _end(_module: nn.Module, _args: Any, _output: Any) -> None:
    raise Seen


def _weights(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
