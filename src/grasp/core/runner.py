"""Who holds what in memory while a model is measured and edited: decided here and nowhere else.

A method gets a runner and asks it for what it needs: the calibration set shown to the model
(`sweep`), what an edit would do to the loss (`tried`), the weights of a layer (`holding`), a result
worth keeping (`once`). It does not know whether the model lies in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grasp.core.collector import Collector
from grasp.core.decoder import Decoder
from grasp.core.edits import Edit, trial
from grasp.core.held import Held, Looked, Seen
from grasp.core.journal import Journal, Sums
from grasp.core.lending import lent
from grasp.core.records import Calibration, Statistics
from grasp.core.sharing import Tensors, over_cores
from grasp.errors import NumericsError

Made = TypeVar("Made")
Item = TypeVar("Item")


class Runner(ABC):
    """A decoder, the calibration set it is measured on, and the journal of what is done."""

    def __init__(self, decoder: Decoder, data: Calibration, journal: Journal | None = None):
        self.decoder = decoder
        self.data = data
        self.journal = journal or Journal()

    @abstractmethod
    def sweep(
        self,
        collectors: Sequence[Collector],
        task: str = "sweep",
        blocks: int | None = None,
        layers: Looked | None = None,
    ) -> Statistics:
        """Show the model, as it is now, every block once, with a backward pass if a collector asks
        for gradients, and return what was collected. The model comes back unchanged, also where the
        sweep fails. `blocks`: only the first so many, or all where there are fewer.

        The loss is the cross-entropy summed over all predicted tokens of the set; its gradient is
        taken one block at a time, so memory does not grow with the number of blocks. `task` is what
        the progress is called.

        `layers`: the collectors look at these alone, from the first to the last (None: to the
        head), and ask for no gradients. Then the layers behind them are not run, nor are those in
        front where they give what they gave the last time (`grasp.core.held`). So a method that
        edits layer after layer names the first that it is going to edit as the first.

        Raises `NumericsError` naming the block and the layer where a loss is not finite.
        """

    @abstractmethod
    def tried(
        self,
        edits: Mapping[str, Callable[[], Edit | None]],
        num_blocks: int,
        task: str = "trying",
    ) -> dict[str, float]:
        """Name -> loss on the first `num_blocks` blocks of the set, or all where it has fewer, of
        the model as it is now with that edit alone (None: with none): mean cross-entropy in nats a
        token.

        Each edit is made, applied and undone before the next is made. Raises `NumericsError` where
        a loss is not finite.
        """

    @abstractmethod
    def holding(self, layer: int) -> AbstractContextManager[None]:
        """Inside, the weights of layer number `layer` are in memory. Several threads may hold the
        same layer or different ones.
        """

    def apply(self, edit: Edit) -> Edit:
        """Change the model. Returns the edit to remember: where memory is short, one without its
        tensors.
        """
        edit.apply(self.decoder)
        return edit

    @abstractmethod
    def loss(self, block: int) -> tuple[Tensor, int]:
        """The loss of the model, as it is now, on one block of the set: summed over the predicted
        tokens in nats, and their number. Gradients can be taken of it where they are asked for.
        """

    @abstractmethod
    def standing_in(self, layer: int, forward: Callable[..., Any]) -> AbstractContextManager[None]:
        """Inside, `forward` computes what layer number `layer` gives, called with the arguments of
        that layer; no weight of the model asks for a gradient. The model comes back unchanged.
        """

    def each(
        self,
        work: Callable[[Item], Tensors],
        items: Sequence[Item],
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[Tensors]:
        """`work` on every item, in order, on all cores (as many at once as `decoder.workers` says),
        and by all processes where there are several; what others made goes through `keep`. It must
        depend on nothing but the item and what all processes have.
        """
        yield from over_cores(work, items, self.decoder.workers)

    def once(self, key: str, make: Callable[[], Made]) -> Made:
        """The step that `make()` gives. `key` names it among all that a run makes: a run that goes
        on from its journal does not make it again. None is not remembered.
        """
        return self.journal.once(key, make)


class Losses:
    """The losses of what was tried, by name, as a journal keeps them."""

    name = "losses"

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def take(self, key: str, value: Tensor) -> None:
        self.sums[key] = value


class Resident(Runner):
    """The whole model is in memory."""

    def __init__(self, decoder: Decoder, data: Calibration, journal: Journal | None = None):
        super().__init__(decoder, data, journal)
        self._held = Held(decoder)

    def sweep(
        self,
        collectors: Sequence[Collector],
        task: str = "sweep",
        blocks: int | None = None,
        layers: Looked | None = None,
    ) -> Statistics:
        kept = self.journal.sweep(collectors, self.decoder.device)
        shown = self._own(range(self.data.num_blocks)[:blocks])
        loss, tokens = self.show(collectors, shown, task, kept, layers)
        loss, tokens = self._together(collectors, loss, tokens)
        tables = {collector.name: collector.result(collector.sums) for collector in collectors}
        return Statistics(tables, tokens, None if loss is None else loss / tokens)

    @torch.no_grad()
    def tried(
        self,
        edits: Mapping[str, Callable[[], Edit | None]],
        num_blocks: int,
        task: str = "trying",
    ) -> dict[str, float]:
        losses = Losses()
        kept = self.journal.sweep([losses], torch.device("cpu"))
        self.decoder.progress(task, kept.blocks, len(edits))
        # one trial counts as one block of the journal's
        for done, name in enumerate(list(edits)[kept.blocks :], kept.blocks + 1):
            edit = edits[name]()
            with nullcontext() if edit is None else self._trial(edit):
                found = [
                    self._loss(block, *self._block(block))
                    for block in self._own(range(self.data.num_blocks)[:num_blocks])
                ]
            own, tokens = sum(float(loss) for loss, _ in found), sum(count for _, count in found)
            total, tokens = self._together((), own, tokens)
            assert total is not None
            losses.take(name, torch.tensor(total / tokens, dtype=torch.float64))
            kept.add(total, tokens, last=done == len(edits))
            self.decoder.progress(task, done, len(edits))
        return {name: float(losses.sums[name]) for name in edits}

    def holding(self, layer: int) -> AbstractContextManager[None]:
        return nullcontext()

    def show(
        self,
        collectors: Sequence[Collector],
        blocks: Sequence[int],
        task: str = "sweep",
        kept: Sums | None = None,
        layers: Looked | None = None,
    ) -> tuple[float | None, int]:
        """Show the model some blocks of the set; what they give is added to the collectors' sums.
        `kept`: where these are kept, and how many of the blocks are in them already. `layers`: as
        in `sweep`.

        Returns (the loss summed over the predicted tokens in nats, or None where no collector asks
        for gradients; the number of those tokens, or else of all that are real).
        """
        backward = any(collector.backward for collector in collectors)
        kept = kept or Sums(Journal(), 0, collectors)
        with ExitStack() as stack:
            stack.enter_context(self._attached(collectors, layers))
            stack.enter_context(torch.set_grad_enabled(backward))
            part = stack.enter_context(self._held.passes(layers, len(blocks))) if layers else None
            self.decoder.progress(task, kept.blocks, len(blocks))
            to_show = blocks[kept.blocks :]
            idle = self._passes_of_all(len(to_show)) - len(to_show)
            for done, block in enumerate(to_show, kept.blocks + 1):
                if part:
                    part.begin(block)
                loss, count = self._pass(collectors, block, backward)
                kept.add(loss, count, last=done == len(blocks))
                self.decoder.progress(task, done, len(blocks))
            for _ in range(idle):
                self._pass_idly(collectors, backward)
        return kept.loss if backward else None, kept.tokens

    def _pass(
        self, collectors: Sequence[Collector], block: int, backward: bool
    ) -> tuple[float, int]:
        """Show one block. Returns (its loss, or 0 without `backward`; the tokens, as in `show`)."""
        ids, mask = self._block(block)
        for collector in collectors:
            collector.begin(block, mask)
        if backward:
            return self._backward(block, ids, mask)
        with suppress(Seen):
            self.decoder.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return 0.0, ids.numel() if mask is None else int(mask.sum())

    def _passes_of_all(self, passes: int) -> int:
        """How many passes every process makes, where this one has to make so many."""
        return passes

    def _pass_idly(self, collectors: Sequence[Collector], backward: bool) -> None:
        """Show a block that counts nowhere."""
        sums = [collector.sums for collector in collectors]
        try:
            for collector in collectors:
                collector.sums = {}
            self._pass(collectors, 0, backward)
        finally:
            for collector, own in zip(collectors, sums, strict=True):
                collector.sums = own

    def loss(self, block: int) -> tuple[Tensor, int]:
        return self.decoder.loss(*self._block(block))

    @contextmanager
    def standing_in(self, layer: int, forward: Callable[..., Any]) -> Iterator[None]:
        parameters = [(one, one.requires_grad) for one in self.decoder.model.parameters()]
        try:
            for parameter, _ in parameters:
                parameter.requires_grad_(False)
            with lent(self.decoder.layer(layer).module, forward):
                yield
        finally:
            for parameter, requires_grad in parameters:
                parameter.requires_grad_(requires_grad)

    def _own(self, blocks: Sequence[int]) -> Sequence[int]:
        """Those of these blocks that are shown here."""
        return blocks

    def _together(
        self, collectors: Sequence[Collector], loss: float | None, tokens: int
    ) -> tuple[float | None, int]:
        """The loss and the tokens of all blocks, wherever they are shown; the collectors' sums
        become those of all.
        """
        return loss, tokens

    def _trial(self, edit: Edit) -> AbstractContextManager[None]:
        """The edited model inside; afterwards the model as it was."""
        return trial(self.decoder, edit)

    def _block(self, block: int) -> tuple[Tensor, Tensor | None]:
        """(ids, mask) of one block, (1, seq_len), on the model's device."""
        device, mask = self.decoder.device, self.data.mask
        return (
            self.data.ids[block : block + 1].to(device),
            None if mask is None else mask[block : block + 1].to(device),
        )

    def _backward(self, block: int, ids: Tensor, mask: Tensor | None) -> tuple[float, int]:
        """The loss of one block after its backward pass, and the number of tokens predicted."""
        loss, count = self._loss(block, ids, mask)
        loss.backward()
        return float(loss.detach()), count

    def _loss(self, block: int, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
        """The loss of one block, summed over the tokens predicted, and their number."""
        loss, count = self.decoder.loss(ids, mask)
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"calibration block {block}: the loss is {float(loss.detach())};"
                f" {self.decoder.first_non_finite(ids, mask)}"
            )
        return loss, count

    @contextmanager
    def _attached(
        self, collectors: Sequence[Collector], layers: Looked | None = None
    ) -> Iterator[None]:
        """Gradients off except where a collector turns them on, hooks attached to `layers` or all;
        all of it undone at the end.
        """
        before = [
            (parameter, parameter.requires_grad, parameter.grad)
            for parameter in self.decoder.model.parameters()
        ]
        try:
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            with ExitStack() as stack:
                self._attach(collectors, stack, layers)
                if looking := [one for one in collectors if type(one).end is not Collector.end]:
                    handle = self.decoder.body.register_forward_hook(_told(looking))
                    stack.callback(handle.remove)
                yield
        finally:
            for parameter, requires_grad, grad in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad

    def _attach(
        self, collectors: Sequence[Collector], stack: ExitStack, layers: Looked | None
    ) -> None:
        """Hook the collectors onto `layers`, or all; `stack` undoes it."""
        first, last = layers or (0, None)
        for layer in self.decoder.layers():
            looked = first <= layer.index and (last is None or layer.index <= last)
            for collector in collectors if looked else ():
                collector.attach(layer)
                stack.callback(collector.detach, layer)


def _told(collectors: Sequence[Collector]) -> Callable[..., None]:
    """A hook for the body of the model: tells the collectors what it gave."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden: Any = output[0] if isinstance(output, tuple) else None
        hidden = getattr(output, "last_hidden_state", hidden)
        for collector in collectors if isinstance(hidden, Tensor) else ():
            collector.end(hidden.detach())

    return hook
