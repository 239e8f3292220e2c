"""Speed and memory of models side by side: what `grasp bench` shows.

1. For each batch size, the models take turns (A B A B ...) after a round of warm-up: see
   `grasp.evaluation.speed`.
2. Medians, with the lowest and highest round beside them. Ratios to the first model are taken
   between neighbours in time, so slow drift of the machine cancels; their median and spread are
   over those pairs.
3. Peak memory comes from a fresh process a model: see `grasp.evaluation.peak`.
4. The roofline share says how near decoding is to the least time that reading its bytes takes: see
   `grasp.evaluation.hardware`. Low: the kernels, or the work around them, are what costs, and fewer
   bytes will not help much.

Scores of every model and batch size (`protocol` holds the setting):

    prefill, decode                     tokens/s over the whole batch; decode alone, without the
                                        prompt
    time to first token, token latency  s; latency is of one decode step, with "p95"
    prefill vs A, decode vs A           ratio of the speed to that of the first model A: above 1 =
                                        faster
    roofline share                      0 to 1 (a cache that keeps weights between steps can bring
                                        it above)
    peak memory, parameter bytes, bytes on disk     bytes
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grasp.core.checkpoint import bytes_on_disk
from grasp.core.decoder import Decoder
from grasp.core.progress import Progress, silent
from grasp.core.score import Score
from grasp.errors import RecipeError
from grasp.evaluation.hardware import kernels, low_rank_products, read_bandwidth, step_bytes
from grasp.evaluation.peak import peak_memory
from grasp.evaluation.speed import TURN, Timing, take_turns


def bench(
    models: Mapping[str, Decoder],
    *,
    batch_sizes: Sequence[int] = (1,),
    prompt_len: int = 512,
    new_tokens: int = 128,
    rounds: int = 5,
    compile: bool = False,
    progress: Progress = silent,
) -> dict[str, tuple[Score, ...]]:
    """Time every model at every batch size, in turn; measure its memory.

    Args:
        models: by name. Ratios are to the first.
        batch_sizes: sequences at once, all of the same length.
        prompt_len, new_tokens: tokens read, and decode steps after the first token.
        rounds: measured rounds, after one of warm-up.
        compile: under `torch.compile`, with a cache of fixed size; compiling takes minutes and is
            not timed.

    Raises `RecipeError` for sizes below 1 or beyond what a model reads.
    """
    check(models, batch_sizes, prompt_len, new_tokens, rounds)
    scores: dict[str, list[Score]] = {name: [] for name in models}
    bandwidth = {model.device: read_bandwidth(model.device) for model in models.values()}
    first = next(iter(models))
    for batch_size in batch_sizes:
        timings = take_turns(
            models,
            batch_size=batch_size,
            prompt_len=prompt_len,
            new_tokens=new_tokens,
            rounds=rounds,
            compile=compile,
            progress=progress,
        )
        for name, model in models.items():
            setting = {
                "batch_size": batch_size,
                "prompt_len": prompt_len,
                "new_tokens": new_tokens,
                "rounds": rounds,
                "turn": TURN,
                "loop": "forward by hand, greedy, logits of the last position",
                "cache": "fixed size" if compile else "growing",
                "compile": compile,
                **kernels(model),
                "low_rank": low_rank_products(model, compile),
            }
            scores[name] += speeds(timings[name], setting)
            if name != first:
                scores[name] += ratios(timings[name], timings[first], first, setting)
            scores[name].append(roofline(model, timings[name], bandwidth[model.device], setting))
    for number, (name, model) in enumerate(models.items()):
        progress("memory, in new processes", number, len(models))
        scores[name] += memory(model, max(batch_sizes), prompt_len, new_tokens)
    progress("memory, in new processes", len(models), len(models))
    return {name: tuple(found) for name, found in scores.items()}


def check(
    models: Mapping[str, Decoder],
    batch_sizes: Sequence[int],
    prompt_len: int,
    new_tokens: int,
    rounds: int,
) -> None:
    """Raise `RecipeError` for what cannot be measured."""
    if not models or not batch_sizes:
        raise RecipeError("--batch-sizes: is empty; give one or more numbers from 1, like 1,4,16")
    for flag, value in [
        *(("--batch-sizes", size) for size in batch_sizes),
        ("--prompt-len", prompt_len),
        ("--new-tokens", new_tokens),
    ]:
        if value < 1:
            raise RecipeError(f"{flag} {value}: must be at least 1")
    if rounds < 1:
        raise RecipeError(f"--rounds {rounds}: must be at least 1")
    for model in models.values():
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and prompt_len + new_tokens > limit:
            room = (
                f"at most {limit - new_tokens}" if new_tokens < limit else "lower --new-tokens too"
            )
            raise RecipeError(
                f"--prompt-len {prompt_len}: with --new-tokens {new_tokens} it is longer than the"
                f" {limit} positions that {model.source or 'the model'} reads; {room}"
            )


def speeds(timing: Timing, setting: Mapping[str, Any]) -> list[Score]:
    """Tokens a second and latencies, each with the spread of its rounds or turns."""
    batch = setting["batch_size"]
    prefill = [batch * setting["prompt_len"] / seconds for seconds in timing.prefill]
    decode = [batch * len(turn) / sum(turn) for turn in timing.turns]
    steps = sorted(timing.steps)
    p95 = steps[min(len(steps) - 1, int(0.95 * len(steps)))]
    return [
        Score("prefill", statistics.median(prefill), "tokens/s", {**setting, **_spread(prefill)}),
        Score("decode", statistics.median(decode), "tokens/s", {**setting, **_spread(decode)}),
        Score(
            "time to first token",
            statistics.median(timing.prefill),
            "s",
            {**setting, **_spread(timing.prefill)},
        ),
        Score(
            "token latency",
            statistics.median(steps),
            "s",
            {**setting, "p95": p95, **_spread(steps)},
        ),
    ]


def ratios(mine: Timing, theirs: Timing, first: str, setting: Mapping[str, Any]) -> list[Score]:
    """How many times as fast as the first model, pair by pair of neighbours in time."""
    prefill = [b / a for a, b in zip(mine.prefill, theirs.prefill, strict=True)]
    decode = [sum(b) / sum(a) for a, b in zip(mine.turns, theirs.turns, strict=True)]
    return [
        Score(
            f"{what} vs {first}",
            statistics.median(pairs),
            "ratio",
            {**setting, **_spread(pairs), "pairs": len(pairs)},
        )
        for what, pairs in (("prefill", prefill), ("decode", decode))
    ]


def roofline(
    decoder: Decoder, timing: Timing, bandwidth: float, setting: Mapping[str, Any]
) -> Score:
    """The least time of a decode step, bytes / bandwidth, as a share of the time measured."""
    moved = step_bytes(decoder, setting["batch_size"], timing.cache_bytes)
    measured = statistics.median(timing.steps)
    protocol = {
        **setting,
        "step_bytes": round(moved),
        "cache_bytes": round(timing.cache_bytes),
        "bandwidth": round(bandwidth),
        "step_seconds": measured,
    }
    return Score("roofline share", moved / bandwidth / measured, "share", protocol)


def memory(decoder: Decoder, batch_size: int, prompt_len: int, new_tokens: int) -> list[Score]:
    """Bytes: of the parameters, on disk if the model is a directory, and at most while it runs."""
    scores = [
        Score(
            "parameter bytes",
            float(decoder.num_bytes()),
            "bytes",
            {"parameters": decoder.num_parameters()},
        )
    ]
    found = peak_memory(decoder, batch_size, prompt_len, new_tokens)
    if found is None:
        return scores
    if decoder.source and Path(decoder.source).is_dir():
        scores.append(
            Score(
                "bytes on disk",
                float(bytes_on_disk(Path(decoder.source))),
                "bytes",
                {"path": decoder.source},
            )
        )
    what = (
        "allocator of the GPU"
        if decoder.device.type == "cuda"
        else "resident set of a fresh process"
    )
    setting = {
        "batch_size": batch_size,
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
        "of": what,
    }
    return [
        *scores,
        Score(
            "peak memory",
            float(found["peak"]),
            "bytes",
            {**setting, "before_loading": found["before_loading"]},
        ),
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"low": min(values), "high": max(values)}
