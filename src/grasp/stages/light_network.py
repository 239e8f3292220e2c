"""A small network learns what a window of decoder layers does (LLM-Streamline, arXiv 2403.19135,
section 3.2). It is a copy, in float32: the model is not touched.

    mse    mean over tokens and dimensions of (net(h_in) - h_out)^2, with h_in and h_out the states
           before and behind the window in the original model
    lm     cross-entropy of the model with the net in the window's place, the rest of it frozen

Each step reads one block; the blocks come in a new order every epoch, drawn by the seed. AdamW, its
rate falling to 0 along a cosine. `HELD_OUT` of the blocks, at least one, are not learnt from: after
every epoch, and before the first, they say how good the net is, and a copy of the best is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from grasp.core.edits import Drop, trial
from grasp.core.edits.replace import gives_tuples
from grasp.core.layers.span_grasp import MLPSpan
from grasp.core.progress import Progress
from grasp.core.runner import Runner
from grasp.core.scratch import Scratch
from grasp.errors import NumericsError, RecipeError
from grasp.stages.windows import WindowStates

HELD_OUT = 1 / 8
"""Share of the blocks that judge and do not teach."""

Loss = Callable[[int], Tensor]
"""The loss on a block, of which gradients can be taken."""


@dataclass(frozen=True)
class Training:
    """How to learn."""

    learning_rate: float
    weight_decay: float
    epochs: int
    seed: int


def split(num_blocks: int) -> tuple[list[int], list[int]]:
    """(blocks to learn from, blocks that are held out). Raises `RecipeError` for too few."""
    if num_blocks < 2:
        raise RecipeError(
            f"--num-samples {num_blocks}: one block is held out, so at least 2 are needed to train"
            " a network; or take --net none"
        )
    held = max(1, math.floor(num_blocks * HELD_OUT))
    return list(range(num_blocks - held)), list(range(num_blocks - held, num_blocks))


@torch.enable_grad()
def learn(
    net: nn.Module, loss: Loss, num_blocks: int, how: Training, progress: Progress
) -> tuple[float, float]:
    """Train the parameters of `net` that ask for gradients; it is left in its best state. Returns
    the held-out loss (before, in that state). Raises `NumericsError` for one that is not finite.
    """
    teach, judge = split(num_blocks)
    wanted = {name: one for name, one in net.named_parameters() if one.requires_grad}
    optimizer = torch.optim.AdamW(
        list(wanted.values()), lr=how.learning_rate, weight_decay=how.weight_decay
    )
    steps = how.epochs * len(teach)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(how.seed)
    first = least = _mean(loss, judge)
    best = {name: one.detach().clone() for name, one in wanted.items()}
    for epoch in range(how.epochs):
        order = torch.randperm(len(teach), generator=generator).tolist()
        for number, place in enumerate(order):
            progress("training", epoch * len(teach) + number, steps)
            optimizer.zero_grad()
            found = loss(teach[place])
            _check(float(found.detach()), teach[place])
            found.backward()
            optimizer.step()
            schedule.step()
        now = _mean(loss, judge)
        if now < least:
            least, best = now, {name: one.detach().clone() for name, one in wanted.items()}
    net.load_state_dict(best, strict=False)
    progress("training", steps, steps)
    return first, least


@torch.no_grad()
def _mean(loss: Loss, blocks: Sequence[int]) -> float:
    found = [float(loss(block)) for block in blocks]
    for block, value in zip(blocks, found, strict=True):
        _check(value, block)
    return sum(found) / len(found)


def _check(value: float, block: int) -> None:
    if not math.isfinite(value):
        raise NumericsError(
            f"calibration block {block}: the loss in training is {value}; lower --learning-rate"
        )


# --- what it learns from


def error(
    found: Float[Tensor, "batch seq width"],
    wanted: Float[Tensor, "batch seq width"],
    mask: Bool[Tensor, "batch seq"] | None,
) -> Float[Tensor, ""]:
    """Mean square over real tokens and dimensions."""
    squares = (found - wanted).square()
    return squares.mean() if mask is None else squares[mask.to(squares.device)].mean()


def by_states(runner: Runner, net: nn.Module, window: Sequence[int], scratch: Scratch) -> Loss:
    """The "mse" loss: the states of all blocks are collected now, into `scratch`; nothing else of
    the model is needed then.
    """
    collector = WindowStates(window[0], window[-1], scratch)
    states = runner.sweep([collector], "states around the window")[WindowStates.name]
    asked, mask, device = _calls(runner, window[0]), runner.data.mask, runner.decoder.device

    def loss(block: int) -> Tensor:
        args, kwargs = asked[block if len(asked) > 1 else 0]
        output = net(states[f"in.{block}"].to(device), *args, **kwargs)
        found = output[0] if isinstance(output, tuple) else output
        real = None if mask is None else mask[block : block + 1].bool()
        return error(found, states[f"out.{block}"].to(device), real)

    return loss


def in_place(runner: Runner, net: nn.Module, window: Sequence[int], stack: ExitStack) -> Loss:
    """The "lm" loss: `net` stands in the model in the place of the window until `stack` is left. It
    may give hidden states alone where a layer gives a tuple.
    """
    decoder = runner.decoder
    as_tuple = gives_tuples(decoder, decoder.layer(window[0]).module)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = net(hidden_states.float(), *in_float32(args), **in_float32(kwargs))
        found = (output[0] if isinstance(output, tuple) else output).to(hidden_states.dtype)
        return (found,) if as_tuple else found

    for layer in reversed(window[1:]):
        stack.enter_context(trial(decoder, Drop(layer)))
    stack.enter_context(runner.standing_in(window[0], forward))

    def loss(block: int) -> Tensor:
        found, count = runner.loss(block)
        return found / max(count, 1)

    return loss


@torch.no_grad()
def _calls(runner: Runner, layer: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the model gives to a layer beside the hidden states (mask, places, rotary angles), by
    block; one for all blocks where they have no padding.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        beside = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        found.append((in_float32(args[1:]), in_float32(beside)))

    module = runner.decoder.layer(layer).module
    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for block in range(1 if runner.data.mask is None else runner.data.num_blocks):
            runner.loss(block)
    finally:
        handle.remove()
    return found


def new_mlp(hidden: int, width: int, seed: int) -> MLPSpan:
    """An MLP that gives back what it reads: `down` is 0, `up` drawn by the seed."""
    net = MLPSpan(hidden, width, as_tuple=False).requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(net.up, std=hidden**-0.5, generator=generator)
    nn.init.zeros_(net.down)
    return net


def in_float32(value: Any) -> Any:
    """Tensors of floats in float32, wherever they are in tuples and tables."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(in_float32(one) for one in value)
    if type(value) is dict:
        return {name: in_float32(one) for name, one in value.items()}
    return value
