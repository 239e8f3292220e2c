"""Prefill and decode, timed: the models taken in turn so that noise hits all alike. What one model
does in its turn is in `grasp.core.stepping`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from grasp.core.cache import cache_bytes
from grasp.core.decoder import Decoder
from grasp.core.progress import Progress, silent
from grasp.core.score import Score
from grasp.core.stepping import Stepper

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
        name: Stepper(model, batch_size, prompt_len, new_tokens, compile)
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
