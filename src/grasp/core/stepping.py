"""One model, stepped by hand and timed: a loop of our own around its forward.

`generate()` is not used for timing: its logits processors and stopping rules cost time that is not
the model's. The loop asks of the model what a greedy `generate()` asks, and no more: the whole
prompt once, logits of its last position; then one token a row and step, with the cache. A step ends
when the host knows the token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grasp.core.cache import new_cache
from grasp.core.clock import Clock
from grasp.core.decoder import Decoder


class Stepper:
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
        clock: Clock | None = None,
    ):
        self.clock = clock or Clock()
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
        begin = self.clock.mark()
        self.token = self._step(self.ids)
        return self.clock.seconds(begin, self.clock.mark())

    def decode(self, steps: int) -> list[float]:
        """So many steps on. Returns the seconds of each."""
        seconds = []
        for _ in range(steps):
            begin = self.clock.mark()
            self.token = self._step(self.token)
            seconds.append(self.clock.seconds(begin, self.clock.mark()))
        return seconds

    def _step(self, ids: Tensor) -> Tensor:
        logits = self.forward(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()  # waits for the device
        return token
