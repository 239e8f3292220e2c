"""Prefill and decode, timed: a loop of our own around the model's forward, the models taken in turn
so that noise hits all alike.

`generate()` is not used for timing: its logits processors and stopping rules cost time that is not
the model's. The loop asks of the model what a greedy `generate()` asks, and no more: the whole
prompt once, logits of its last position; then one token a row and step, with the cache. A step ends
when the host knows the token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grasp.core.cache import cache_bytes, new_cache
from grasp.core.decoder import Decoder
from grasp.core.progress import Progress, silent
from grasp.core.score import Score

TURN = 8
"""Decode steps of one model before it is the next one's turn: neighbours in time meet the same
noise.
"""


@dataclass
class Timing:
    """Seconds of one model: each round's prefill, and of each turn the decode steps. Equal places
    in two models' lists are neighbours in time.
    """

    prefill: list[float] = field(default_factory=list)
    turns: list[list[float]] = field(default_factory=list)
    cache_bytes: float = 0.0

    @property
    def steps(self) -> list[float]:
        """Every decode step."""
        return [seconds for turn in self.turns for seconds in turn]


class Runner:
    """One model with its prompt (batch_size, prompt_len) of random tokens and its cache, to be
    stepped by hand.

    With `compile`, its forward under `torch.compile` with a cache of fixed size: one graph for the
    prompt, one for the steps.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch_size: int,
        prompt_len: int,
        new_tokens: int,
        compile: bool = False,
    ):
        ids = torch.randint(
            decoder.config.vocab_size,
            (batch_size, prompt_len),
            generator=torch.Generator().manual_seed(0),
        )
        self.decoder, self.ids = decoder, ids.to(decoder.device)
        self.forward: Any = decoder.model
        self.cache: Any = None
        self.fixed = compile
        if compile:
            self.cache = new_cache(decoder, prompt_len + new_tokens)
            self._step(self.ids[:, :1])  # sets the cache up outside the graphs
            self.forward = torch.compile(decoder.model.forward, dynamic=False)

    def prefill(self) -> float:
        """Read the prompt with an empty cache. Returns the seconds until the first token."""
        if self.fixed:
            self.cache.reset()
        else:
            self.cache = new_cache(self.decoder)
        begin = time.perf_counter()
        self.token = self._step(self.ids)
        return time.perf_counter() - begin

    def decode(self, steps: int) -> list[float]:
        """So many steps on. Returns the seconds of each."""
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.token = self._step(self.token)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def _step(self, ids: Tensor) -> Tensor:
        logits = self.forward(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()  # waits for the device
        return token


@torch.no_grad()
def take_turns(
    models: Mapping[str, Decoder],
    *,
    batch_size: int = 1,
    prompt_len: int,
    new_tokens: int,
    rounds: int,
    compile: bool = False,
    progress: Progress = silent,
) -> dict[str, Timing]:
    """Time the models round by round (A B A B ...), decode steps in turns of `TURN`, after one
    round of warm-up.
    """
    task = f"timing, batch size {batch_size}"
    progress(task, 0, rounds + 1)
    runners = {
        name: Runner(model, batch_size, prompt_len, new_tokens, compile)
        for name, model in models.items()
    }
    timings = {name: Timing() for name in models}
    for number in range(rounds + 1):
        for name, runner in runners.items():
            seconds = runner.prefill()
            if number:
                timings[name].prefill.append(seconds)
            timings[name].cache_bytes = cache_bytes(runner.cache) / 2
        for start in range(0, new_tokens, TURN):
            for name, runner in runners.items():
                turn = runner.decode(min(TURN, new_tokens - start))
                if number:
                    timings[name].turns.append(turn)
        for name, runner in runners.items():
            # the mean of the first and the last step's
            timings[name].cache_bytes += cache_bytes(runner.cache) / 2
        progress(task, number + 1, rounds + 1)
    return timings


def decode_speed(
    models: Mapping[str, Decoder],
    *,
    prompt_len: int = 64,
    new_tokens: int = 32,
    rounds: int = 3,
    progress: Progress = silent,
) -> dict[str, Score]:
    """Median greedy tokens a second of each model at batch 1, decoding alone, models in turn."""
    timings = take_turns(
        models, prompt_len=prompt_len, new_tokens=new_tokens, rounds=rounds, progress=progress
    )
    protocol = {
        "batch_size": 1,
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    return {
        name: Score(
            "decode",
            1 / statistics.median(sum(turn) / len(turn) for turn in timing.turns),
            "tokens/s",
            protocol,
        )
        for name, timing in timings.items()
    }
