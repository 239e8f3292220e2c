"""What each part of a model takes while the whole model runs: its layers, the attention and MLP of
each, its matrices.

Modules are timed from their call to their return, as the model reads a prompt and then decodes
token by token with its cache, batch 1. Looking costs time itself, so the model runs in turns that
look at different things: at layers with their attention and MLP, and at matrices.

Other work on the machine only ever adds time, in spikes. So what counts is where the lowest tenth
of many short times ends (`quiet`); the model's own time is the sum of its layers' and what is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grasp.core.clock import Clock
from grasp.core.decoder import Decoder
from grasp.core.stepping import Stepper

ROUNDS = 4
"""After one of warm-up."""
ENOUGH = 25.0
"""Seconds after which no other round begins."""
MOST_TOKENS, LEAST_TOKENS = 512, 128
PRODUCTS = 120e9
"""Multiply-adds of a prompt; larger models read shorter ones, so that measuring stays quick."""

Part = tuple[int, str]
"""(index of the layer, path inside it); "" is the layer itself."""
ENDS: Part = (-1, "ends")


@dataclass(frozen=True)
class Times:
    """Of a decode step and of reading a prompt: seconds, or shares of some other times."""

    decode: float
    prefill: float

    def mapped(self, change: Callable[[float, float], float], other: Times) -> Times:
        """Decode with decode, prefill with prefill."""
        return Times(change(self.decode, other.decode), change(self.prefill, other.prefill))


def prompt_length(decoder: Decoder) -> int:
    """Tokens to read: as many as the model can be shown quickly."""
    tokens = MOST_TOKENS
    while tokens > LEAST_TOKENS and tokens * decoder.num_parameters() > PRODUCTS:
        tokens //= 2
    limit = getattr(decoder.config, "max_position_embeddings", None)
    return tokens if limit is None else max(min(tokens, limit - steps_after(tokens)), 1)


def steps_after(tokens: int) -> int:
    """Decode steps after a prompt of so many tokens."""
    return max(tokens // 64, 1)


@dataclass(frozen=True)
class Samples:
    """Seconds of every decode step and of every prompt read."""

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)


def quiet(samples: Iterable[Samples]) -> Times:
    """What they take where nothing else runs."""
    found = list(samples)
    return Times(
        lowest_tenth([time for one in found for time in one.decode]),
        lowest_tenth([time for one in found for time in one.prefill]),
    )


def lowest_tenth(values: Sequence[float]) -> float:
    """Where the lowest tenth of the values ends; 0 of none."""
    return sorted(values)[(len(values) - 1) // 10] if values else 0.0


@torch.no_grad()
def time_in_place(decoder: Decoder, tokens: int, clock: Clock) -> dict[Part, Samples]:
    """Seconds of each layer, each part of one and each matrix, and under `ENDS` of all that is not
    in a layer.
    """
    steps, began = steps_after(tokens), time.monotonic()
    turns = [(look, Stepper(decoder, 1, tokens, steps, clock=clock)) for look in _parts(decoder)]
    found: dict[Part, Samples] = {part: Samples() for look, _ in turns for part in look}
    found[ENDS] = Samples()
    decoder.progress("timing the model", 0, ROUNDS + 1)
    for number in range(ROUNDS + 1):
        for phase in ("prefill", "decode"):
            for look, stepper in turns:
                for _ in range(1 if phase == "prefill" else steps):
                    with watched(look, clock) as seen:
                        whole = stepper.prefill() if phase == "prefill" else stepper.decode(1)[0]
                    seconds = seen()
                    inside = sum(time for (_, path), time in seconds.items() if not path)
                    if inside:
                        seconds[ENDS] = whole - inside
                    for part, time_taken in seconds.items() if number else ():
                        getattr(found[part], phase).append(time_taken)
        decoder.progress("timing the model", number + 1, ROUNDS + 1)
        if number and time.monotonic() - began > ENOUGH:
            break
    return found


@contextmanager
def watched(
    modules: Mapping[Part, nn.Module], clock: Clock
) -> Iterator[Callable[[], dict[Part, float]]]:
    """Inside, every call of the modules is timed. Gives what says the seconds of each."""
    begun: dict[Part, Any] = {}
    calls: dict[Part, list[tuple[Any, Any]]] = {}

    def begin(part: Part) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            begun[part] = clock.mark()

        return hook

    def end(part: Part) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls.setdefault(part, []).append((begun[part], clock.mark()))

        return hook

    handles: list[RemovableHandle] = []
    for part, module in modules.items():
        handles.append(module.register_forward_pre_hook(begin(part)))
        handles.append(module.register_forward_hook(end(part)))
    try:
        yield lambda: {
            part: sum(clock.seconds(*call) for call in made) for part, made in calls.items()
        }
    finally:
        for handle in handles:
            handle.remove()


def blocks(decoder: Decoder) -> tuple[str, str]:
    """Paths inside a layer of the modules that hold all matrices of the attention and of the MLP;
    "" where there is no such module.
    """
    family = decoder.family
    found = []
    for group in (family.attention, family.mlp):
        owners = {path.rpartition(".")[0] for _, path in group}
        found.append(owners.pop() if len(owners) == 1 else "")
    return found[0], found[1]


def _parts(decoder: Decoder) -> tuple[dict[Part, nn.Module], dict[Part, nn.Module]]:
    """(layers with their attention and MLP; dense matrices)."""
    inner: dict[Part, nn.Module] = {}
    matrices: dict[Part, nn.Module] = {}
    for layer in decoder.layers():
        inner[layer.index, ""] = layer.module
        for path in filter(None, blocks(decoder)):
            inner[layer.index, path] = layer.module.get_submodule(path)
        for name, linear in layer.linears.items():
            matrices[layer.index, name] = linear.module
    return inner, matrices
