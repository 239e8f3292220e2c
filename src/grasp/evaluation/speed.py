"""Decode speed: greedy tokens a second at batch 1 with a key-value cache, the models taken in turn so that noise hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from grasp.core.decoder import Decoder
from grasp.core.records import Score
from grasp.core.sweep import Progress, silent


@torch.no_grad()
def greedy(model: Decoder, prompt: str, new_tokens: int) -> str:
    """The greedy continuation of `prompt`, without the prompt."""
    assert model.tokenizer is not None
    inputs = model.tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=model.tokenizer.eos_token_id)
    return model.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def decode_speed(
    models: Mapping[str, Decoder], *, prompt_len: int = 64, new_tokens: int = 32, rounds: int = 3, progress: Progress = silent
) -> dict[str, Score]:
    """Median tokens a second of each model over `rounds` interleaved rounds, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in models}
    done, total = 0, (rounds + 1) * len(models)
    progress("decode speed", done, total)
    for number in range(rounds + 1):
        for name, model in models.items():
            ids = torch.arange(10, 10 + prompt_len, device=model.device)[None] % model.config.vocab_size
            begin = time.perf_counter()
            model.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
            if number:
                times[name].append(time.perf_counter() - begin)
            done += 1
            progress("decode speed", done, total)
    return {
        name: Score(
            "decode speed",
            new_tokens / statistics.median(seconds),
            "tokens/s",
            {
                "batch_size": 1,
                "prompt_len": prompt_len,
                "new_tokens": new_tokens,
                "rounds": rounds,
                "threads": torch.get_num_threads(),
            },
        )
        for name, seconds in times.items()
    }
