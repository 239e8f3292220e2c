"""Does `--budget latency` know what a model will take? Costs predicted from the dense model alone,
beside the times of the edited models.

    python benchmarks/latency_model.py [MODEL] [--dtype float32] [--rounds 5] [--storage pivoted]

The edits keep the first channels or ranks: what the models say is noise, and takes as long. The
models run in turn with the dense one; measured = ½ decode + ½ prefill, each as the median ratio to
the dense model's neighbour in time. On two cores smollm2 takes about three minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from operator import add
from typing import Any

import torch

from grasp.core.decoder import Decoder
from grasp.core.edits import Drop, Factorize, Narrow
from grasp.core.layer import is_low_rank, matrix_in
from grasp.core.models import load_model
from grasp.evaluation.speed import take_turns
from grasp.stages.in_place import Times
from grasp.stages.latency import Latency, mixed


def ranked(decoder: Decoder, share: float, pivoted: bool, names: tuple[str, ...] = ()) -> None:
    """Pairs of this share of the numbers of every matrix, or of those in `names`."""
    for layer in list(decoder.layers()):
        for linear in layer.linears.values():
            if names and linear.name.rpartition(".")[2] not in names:
                continue
            m, n = linear.shape
            stored = [r * (m + n - (r if pivoted else 0)) for r in range(min(m, n))]
            rank = sum(size <= share * m * n for size in stored) - 1
            rows = m - rank if pivoted else m
            places = torch.arange(m, dtype=torch.int32) if pivoted else None
            a, b = torch.randn(rank, n) / n**0.5, torch.randn(rows, rank) / rank**0.5
            Factorize(linear.path, a, b, places).apply(decoder)


def narrowed(decoder: Decoder, share: float) -> None:
    down = decoder.family.path("down")
    for layer in list(decoder.layers()):
        width = int(share * layer.linears[down].shape[1]) // 32 * 32
        Narrow(layer.index, "channels", torch.arange(width)).apply(decoder)


def dropped(decoder: Decoder, layers: int) -> None:
    for index in list(decoder.kept)[4 : 4 + layers]:
        Drop(index).apply(decoder)


def edits(pivoted: bool, layers: int) -> dict[str, Callable[[Decoder], None]]:
    def both(decoder: Decoder) -> None:
        narrowed(decoder, 0.5)
        ranked(decoder, 0.5, pivoted, ("q_proj", "k_proj", "v_proj", "o_proj"))
        dropped(decoder, layers // 2)

    return {
        "pairs of 78 %": lambda decoder: ranked(decoder, 0.78, pivoted),
        "pairs of 30 %": lambda decoder: ranked(decoder, 0.3, pivoted),
        "MLPs of 62 %": lambda decoder: narrowed(decoder, 0.62),
        f"{layers} layers dropped": lambda decoder: dropped(decoder, layers),
        "all three": both,
    }


def predicted(costs: Latency, decoder: Decoder) -> Times:
    """Of an edited model, in shares of the dense one's time."""
    family, total = decoder.family, costs.ends_times
    for index in decoder.kept:
        module = decoder.stack[decoder.kept.index(index)]
        kind = costs.kinds[costs.kind_of[index]]
        down: Any = matrix_in(module, family.path("down"))
        channels = down.in_features / kind.matrices[family.path("down")].shape[1]
        total = total.mapped(add, costs.layer_times(index, channels=channels))
        for name in kind.matrices:
            found: Any = matrix_in(module, name)
            rank = found.rank if is_low_rank(found) else None
            shape = (found.out_features, found.in_features)
            path = f"{family.layers}.{index}.{name}"
            total = total.mapped(add, costs.times(path, shape, rank))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--storage", default="pivoted", choices=("pivoted", "pair"))
    asked = parser.parse_args()
    models = {"dense": load_model(asked.model, dtype=asked.dtype)}
    began = time.perf_counter()
    costs = Latency(models["dense"], asked.storage == "pivoted")
    print("costs: of decoding and prefill alone in brackets")
    print(f"the model: {time.perf_counter() - began:.1f} s, {costs.whole}", flush=True)
    for name, edit in edits(asked.storage == "pivoted", models["dense"].num_layers // 4).items():
        models[name] = load_model(asked.model, dtype=asked.dtype)
        torch.manual_seed(0)
        edit(models[name])
    began = time.perf_counter()
    guesses = {name: predicted(costs, model) for name, model in models.items()}
    print(f"its shapes: {time.perf_counter() - began:.1f} s", flush=True)
    timings = take_turns(models, prompt_len=costs.tokens, new_tokens=16, rounds=asked.rounds)
    dense = timings["dense"]
    for name, timing in timings.items():
        turns = zip(timing.turns, dense.turns, strict=True)
        prompts = zip(timing.prefill, dense.prefill, strict=True)
        decode = statistics.median(sum(mine) / sum(its) for mine, its in turns)
        prefill = statistics.median(mine / its for mine, its in prompts)
        found, guess = Times(decode, prefill), guesses[name]
        print(
            f"{name:20s} predicted {mixed(guess):.3f} ({guess.decode:.3f}, {guess.prefill:.3f})"
            f" measured {mixed(found):.3f} ({decode:.3f}, {prefill:.3f}):"
            f" {mixed(guess) / mixed(found) - 1:+.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
