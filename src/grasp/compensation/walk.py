"""A model gone through layer by layer: what every batch looks like in front of one layer, and what
that layer is called with.

The model's own code makes masks and positions for every layer, so it is run up to the layer, while
those in front do nothing. Memory: the states of all batches, and the weights of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from grasp.core.decoder import Decoder
from grasp.core.lending import lent
from grasp.data.rows import read_by_model

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with."""


class _Arrived(Exception):
    """The layer was reached: what follows need not run."""


class Walk:
    """The states of `batches` in front of layer number `place` of the stack, (rows, seq, hidden)
    each; from the first layer on, with `step`. `keep` says where states stay meanwhile.
    `computing`: within it layers are run.
    """

    def __init__(
        self,
        decoder: Decoder,
        batches: Sequence[Mapping[str, Tensor]],
        keep: Callable[[Tensor], Tensor] = Tensor.detach,
        computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.decoder, self.keep, self.computing = decoder, keep, computing
        self.batches = [
            {name: tensor.to(decoder.device) for name, tensor in batch.items()} for batch in batches
        ]
        self.place, self.as_tuple = 0, False
        self.states: list[Tensor | None] = [None] * len(batches)

    @property
    def layer(self) -> nn.Module:
        """The layer that is next."""
        return self.decoder.stack[self.place]

    @torch.no_grad()
    def call(self, number: int) -> Call:
        """What the next layer is called with on a batch."""
        caught: list[Call] = []

        def arrive(*args: Any, **kwargs: Any) -> Any:
            caught.append((args, kwargs))
            raise _Arrived

        with (
            self.computing(),
            self._passed(number),
            lent(self.layer, arrive, lambda: True),
            suppress(_Arrived),
        ):
            self._run(number, self.decoder.model.base_model)
        args, kwargs = caught[0]
        state = self.states[number]
        if state is None:
            return caught[0]
        given = args[0] if args else kwargs["hidden_states"]
        state = state.to(given)
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    def output(self, number: int) -> Tensor:
        """What the next layer makes of a batch, (rows, seq, hidden)."""
        args, kwargs = self.call(number)
        with self.computing():
            found = self.layer(*args, **kwargs)
        self.as_tuple = isinstance(found, tuple)
        hidden: Tensor = found[0] if self.as_tuple else found
        return hidden

    @torch.no_grad()
    def step(self) -> None:
        """Go past the next layer, as it is now."""
        with self.decoder.holding(*self.layer.parameters()):
            for number in range(len(self.batches)):
                self.states[number] = self.keep(self.output(number))
        self.place += 1

    @torch.no_grad()
    def logits(self, number: int) -> Tensor:
        """Behind the last layer: what the model predicts, (rows, seq, vocab)."""
        with self.computing(), self._passed(number):
            found: Tensor = self._run(number, self.decoder.model).logits
        return found

    def real(self, number: int) -> Tensor:
        """(rows, seq) Which positions of a batch are no padding."""
        batch = self.batches[number]
        length = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
        return length < batch["length"][:, None]

    def _run(self, number: int, model: nn.Module) -> Any:
        return model(**read_by_model(self.batches[number]), use_cache=False)

    @contextmanager
    def _passed(self, number: int) -> Iterator[None]:
        """Inside, the layers in front give the states of this batch and do nothing else."""
        state: Any = self.states[number]

        def skip(*args: Any, **kwargs: Any) -> Any:
            hidden = state.to(args[0] if args else kwargs["hidden_states"])
            return (hidden,) if self.as_tuple else hidden

        with ExitStack() as stack:
            for layer in self.decoder.stack[: self.place]:
                stack.enter_context(lent(layer, skip, lambda: True))
            yield
